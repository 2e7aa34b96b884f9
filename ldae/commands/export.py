"""``ldae export``: write a network as a folder for timm and the hub, and as ONNX or a program."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import timm
import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ldae import files
from ldae.backbones.preprocessing import preprocessing
from ldae.backbones.resize import resize_input
from ldae.backbones.timm_folder import README, write_timm_folder
from ldae.backbones.whitening import SHRINKAGE, add_whitening, whitening
from ldae.data.open import open_source
from ldae.data.source import Source
from ldae.deployment.graphs import Graphs, add_graphs, graph_table
from ldae.deployment.model_card import with_graphs
from ldae.deployment.open import Opened, open_network, read_config
from ldae.devices import device_for
from ldae.errors import InputError
from ldae.evals.features import Encoder
from ldae.evals.scores import public_name
from ldae.evals.whitening import WhiteningProtocol
from ldae.moments import Moments
from ldae.precision import unchanged_generators
from ldae.tree import COUNT, AnyPath


@unchanged_generators()
def export(
    backbone: Annotated[AnyPath, tyro.conf.arg(metavar="BACKBONE")],
    out: Annotated[AnyPath, tyro.conf.arg(metavar="OUT")],
    /,
    *,
    onnx: bool = False,
    torch_export: bool = False,
    uint8: bool = False,
    tokens: bool = False,
    img_size: Annotated[int | None, COUNT] = None,
    in_chans: Annotated[int, COUNT] = 3,
    classifier: bool | None = None,
    timestep: int | None = None,
    license: str = "",
    whiten: Annotated[AnyPath | None, tyro.conf.arg(metavar="SOURCE")] = None,
    whiten_shrinkage: float = SHRINKAGE,
    workers: int = 4,
    device: str = "auto",
    push: Annotated[str, tyro.conf.arg(metavar="USER/NAME")] = "",
    private: bool = False,
) -> Path:
    """Write a backbone or a classifier as a folder that timm and the Hugging Face hub open.

    The folder holds config.json, model.safetensors and a model card, README.md. Before it appears
    under its name, the folded encoder of a run is compared with the unfolded one, and the file that
    timm reads with the weights that were written. The card shows the scores that lie beside a run.

    With --onnx and --torch-export the folder gets model.onnx and model.pt2 too, for batches of any
    size. They are refused when their outputs differ from timm's by more than 1e-5 of the norm.
    graphs.json describes their inputs and outputs. The same command with another of these adds it.

    Args:
        backbone: a run folder, whose newest checkpoint is exported; an exported folder, a timm name
            or NAME@FILE; or a classifier: the folder of a fine-tuning or of ldae linear --save.
        out: the folder to write; it must not exist yet, or must hold this export already.
        onnx: write model.onnx, which onnxruntime has run (extra: onnx).
        torch_export: write model.pt2, which torch.export.load opens without timm.
        uint8: let these graphs take uint8 pixels and normalise them inside.
        tokens: let these graphs give the token map (batch, h, w, D) too.
        img_size: side of the images in pixels; positions are interpolated. By default the network's
            own.
        in_chans: channels of the images, of a timm name.
        classifier: keep the classifier, whose outputs are logits; by default if BACKBONE is the
            folder of one.
        timestep: the t that is folded into the weights of a denoising pre-training; by default 10
            of 1000 noise levels, or the same share of another number.
        license: license of the weights, in the hub's spelling, such as cc-by-nc-4.0; by default
            that of the backbone, and for a run config.json and the card claim none.
        whiten: images, with or without labels; their train split gives the mean and covariance of
            features. The layer ``head`` of the exported ViT whitens features by these.
        whiten_shrinkage: shrink the covariance of --whiten by this share, from 0 to 1, towards
            the identity times the mean variance.
        workers: processes that decode the images of whiten.
        device: auto, cpu, cuda or cuda:N; it computes the features of whiten.
        push: upload the folder to this repository of the hub, with the token of `hf auth login`.
        private: create that repository as a private one.

    Returns: ``out``.

    Raises: InputError for a backbone that cannot be opened or is no timm model, when ``out`` holds
        something else, the images of ``whiten`` are too few, a verification fails, or the hub
        refuses the folder.

    Examples:
        >>> folder = ldae.export("runs/l_dae", "exported", onnx=True, license="cc-by-4.0")
        >>> backbone = timm.create_model(f"local-dir:{folder}", pretrained=True)
        >>> session = onnxruntime.InferenceSession(folder / "model.onnx")
    """
    spec, out = str(backbone), Path(out).expanduser()
    WhiteningProtocol(whiten is not None, whiten_shrinkage)  # checks the shrinkage
    graphs = Graphs(onnx, torch_export, uint8, tokens)
    graphs.check()
    if push:
        from ldae.deployment.hub import check_repository

        check_repository(push)
    elif private:
        raise InputError("--private is of a repository: name it with --push USER/NAME")
    if not out.exists():
        files.check_writable(out.parent)
    opened = open_network(spec, timestep, classifier, in_chans, license)
    model = opened.model
    if img_size is not None:
        COUNT.check("img_size", img_size)
        model.model_args = model.model_args | resize_input(model, img_size, spec, "img_size")
    source = open_source(str(whiten), "train") if whiten else None
    if source and (model.num_classes or not isinstance(model, VisionTransformer)):
        raise InputError(f"--whiten needs a ViT without a head, and {spec} is none")
    record = _record(source, whiten_shrinkage) if source else opened.whitening
    if out.exists():
        head = {"head.weight", "head.bias"} if source else set()
        if not _holds(out, model, head, license, record):
            raise InputError(f"{out} exists already; export to another folder")
        print(f"{out} is this export already; its model card stays as it is")
        if graphs.files:
            reopened = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
            _extend(out, reopened, graphs)
    else:
        card = opened.card(record)  # of the network without the whitening
        if source:
            moments = _moments(model, source, workers, device_for(device))
            add_whitening(model, whitening(moments, whiten_shrinkage))
        _write(out, opened, card, record, graphs)
        seen = getattr(model, "images_seen", None)
        print(f"exported {spec}{'' if seen is None else f' at {seen:,} images'} to {out}")
    if push:
        from ldae.deployment.hub import push as upload

        print(f"pushed {out} to {upload(out, push, private)}")
    return out


def _write(out: Path, opened: Opened, card: str, whitened: dict | None, graphs: Graphs) -> None:
    """Write a network and its graphs as a new folder, which appears when it has been verified.

    Raises: InputError when timm does not read back what was written, and as ``add_graphs``.
    """
    model = opened.model
    write_timm_folder(
        out,
        model,
        model.model_args,
        card=card,
        classes=opened.classes or None,
        whitening=whitened,
        extend=lambda folder, reopened: _extend(folder, reopened, graphs),
    )


def _extend(folder: Path, model: nn.Module, graphs: Graphs) -> None:
    """Add graphs to a folder, and to its model card. Raises: InputError as ``add_graphs``."""
    if not graphs.files:
        return
    table = graph_table(add_graphs(folder, model, graphs))
    card = folder / README
    if card.is_file():
        text = with_graphs(card.read_text(encoding="utf-8"), table)
        files.write(card, text.encode())


def _record(source: Source, shrinkage: float) -> dict:
    """Return what decides a whitening, beside the backbone."""
    return {
        "data": public_name(source.spec),
        "split": source.split,
        "images": len(source),
        "fingerprint": source.fingerprint(),
        "shrinkage": shrinkage,
    }


def _moments(vit: VisionTransformer, source: Source, workers: int, device: torch.device) -> Moments:
    """Return the moments of the features of all images."""
    encoder = Encoder(vit, device, workers=workers)
    moments = Moments.of((rows for rows, _ in encoder.share(source)), vit.embed_dim)
    vit.cpu()
    return moments


def _holds(
    out: Path, model: nn.Module, head: set[str], license: str, whitened: dict | None
) -> bool:
    """Return whether a folder has the weights of a model, those named ``head``, and no others.

    Its architecture, preprocessing and record of a whitening must be these, and a license that is
    given its own.
    """
    try:
        written = load_file(out / "model.safetensors")
        config = read_config(out)
        cfg, written_args = config["pretrained_cfg"], config["model_args"]
        claimed, architecture = cfg.get("license"), config["architecture"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return False
    state = model.state_dict()
    # timm writes img_size in another form, and a whitening changes num_classes. The size of the
    # images and the weights tell both.
    names = model.model_args.keys() - {"img_size", "num_classes"}
    args = {name: model.model_args[name] for name in names}
    return (
        license in ("", claimed)
        and architecture == model.pretrained_cfg["architecture"]
        and files.as_json(args).items() <= written_args.items()
        and files.as_json(asdict(preprocessing(model))).items() <= cfg.items()
        and config.get("whitening") == whitened
        and written.keys() == state.keys() | head
        and all(torch.equal(written[name], value) for name, value in state.items())
    )
