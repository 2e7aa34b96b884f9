"""``ldae export``: write the backbone of a run as a folder for timm and the hub."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ldae.backbones.card import model_card
from ldae.backbones.run import load_run
from ldae.backbones.timm_folder import write_timm_folder
from ldae.backbones.whitening import SHRINKAGE, add_whitening, whitening
from ldae.data.open import open_source
from ldae.data.source import Source
from ldae.distributed import device_for
from ldae.errors import InputError
from ldae.evals.features import Encoder
from ldae.evals.scores import score_table
from ldae.evals.whitening import WhiteningProtocol
from ldae.models.contract import NoPlainViT
from ldae.runs.kinds import KINDS, Exported, pretraining_in
from ldae.tokenizers.moments import Moments
from ldae.tree import AnyPath

_WHITENED_BY = (
    "`head`, from {images:,} images of {data} ({split}), shrinkage {shrinkage:g}; "
    "`num_classes=0` leaves it out"
)


def export(
    run: Annotated[AnyPath, tyro.conf.arg(metavar="RUN")],
    out: Annotated[AnyPath, tyro.conf.arg(metavar="OUT")],
    /,
    timestep: int | None = None,
    license: str = "",
    whiten: Annotated[AnyPath | None, tyro.conf.arg(metavar="SOURCE")] = None,
    whiten_shrinkage: float = SHRINKAGE,
    workers: int = 4,
    device: str = "auto",
) -> Path:
    """Write the backbone of a run as a folder that timm and the Hugging Face hub open.

    The folder holds config.json, model.safetensors and a model card, README.md. Before it appears
    under its name, the folded encoder is compared with the unfolded one, and the file that timm
    reads with the weights that were written. The card shows the scores that lie beside the run.

    Args:
        run: a run folder; its newest checkpoint is exported.
        out: the folder to write; it must not exist yet, or must hold this export already.
        timestep: the t that is folded into the weights of a denoising pre-training; by default 10
            of 1000 noise levels, or the same share of another number.
        license: license of the weights, in the hub's spelling, such as cc-by-nc-4.0; by default
            config.json and the card claim none.
        whiten: images, with or without labels; their train split gives the mean and covariance of
            features. The layer ``head`` of the exported ViT whitens features by these.
        whiten_shrinkage: as in ldae knn.
        workers: processes that decode the images of whiten.
        device: auto, cpu, cuda or cuda:N; it computes the features of whiten.

    Raises: InputError when ``run`` has no checkpoint, ``out`` holds something else, the images of
        ``whiten`` are too few, or the verification fails.

    Examples:
        >>> folder = ldae.export("runs/l_dae", "exported", license="cc-by-4.0")
        >>> backbone = timm.create_model(f"local-dir:{folder}", pretrained=True)
    """
    run, out = Path(run), Path(out)
    WhiteningProtocol(whiten is not None, whiten_shrinkage)  # checks the shrinkage
    kind = pretraining_in(run)
    method, state = load_run(run, kind)
    try:
        exported = KINDS[kind].opened().export(method, timestep)
    except NoPlainViT as error:
        raise InputError(f"{error}: ldae knn and linear grade the run itself") from None
    vit = exported.vit
    source = open_source(str(whiten), "train") if whiten else None
    record = _record(source, whiten_shrinkage) if source else None
    if out.exists():
        if not _holds(out, vit, license, record):
            raise InputError(f"{out} exists already; export to another folder")
        print(f"{out} is this export already; its model card stays as it is")
        return out
    vit.images_seen, vit.pretrained_cfg["license"] = state["images_seen"], license or None
    card = _model_card(run, exported, state, license, record)
    if source:
        moments = _moments(vit, source, workers, device_for(device))
        add_whitening(vit, whitening(moments, whiten_shrinkage))
    verify = partial(_verify_file, vit)
    write_timm_folder(out, vit, vit.model_args, verify, card=card, whitening=record)
    print(f"exported {run} at {state['images_seen']:,} images to {out}")
    return out


def _record(source: Source, shrinkage: float) -> dict:
    """Return what decides a whitening, beside the backbone."""
    return {
        "data": source.spec,
        "split": source.split,
        "images": len(source),
        "fingerprint": source.fingerprint(),
        "shrinkage": shrinkage,
    }


def _moments(vit: VisionTransformer, source: Source, workers: int, device: torch.device) -> Moments:
    """Return the moments of the features of all images."""
    moments, encoder = Moments(vit.embed_dim), Encoder(vit, device, workers=workers)
    for rows, _ in encoder.share(source):
        moments.update(rows.double())
    vit.cpu()
    return moments


def _holds(out: Path, vit: VisionTransformer, license: str, whitened: dict | None) -> bool:
    """Return whether a folder has these weights and no others, and this record of a whitening.

    If a license is given, the folder must have it too.
    """
    try:
        written = load_file(out / "model.safetensors")
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        claimed = config["pretrained_cfg"].get("license")
    except (OSError, SafetensorError, ValueError, KeyError):
        return False
    state, head = vit.state_dict(), {"head.weight", "head.bias"} if whitened else set()
    return (
        license in ("", claimed)
        and config.get("whitening") == whitened
        and written.keys() == state.keys() | head
        and all(torch.equal(written[name], value) for name, value in state.items())
    )


def _verify_file(vit: VisionTransformer, opened: nn.Module) -> None:
    """Raises: InputError when the opened file and the ViT differ on random images."""
    images = torch.randn(2, *vit.pretrained_cfg["input_size"])
    with torch.no_grad():
        if not torch.equal(opened(images), vit(images)):
            raise InputError("not exported: timm does not read back what was written")


def _model_card(
    run: Path, exported: Exported, state: dict, license: str, whitened: dict | None
) -> str:
    vit, describe = exported.vit, state["describe"]
    params = sum(parameter.numel() for parameter in vit.parameters())
    table = score_table(run, params, state["images_seen"])
    measured = f"Scores in percent, measured on the run{exported.graded}:"
    name, heads = vit.pretrained_cfg["architecture"], vit.blocks[0].attn.num_heads
    chans, side, _ = vit.pretrained_cfg["input_size"]
    return model_card(
        run.resolve().name,
        ["image-feature-extraction", "timm", "self-supervised-learning", exported.tag],
        exported.description,
        {
            "row": describe["row"],
            "architecture": f"{name}: {len(vit.blocks)} blocks, width {vit.embed_dim}, "
            f"{heads} heads",
            "input": f"{chans} x {side} x {side}, patch {vit.patch_embed.patch_size[0]}",
            "pre-trained on": f"{describe['images']:,} images, {state['images_seen']:,} seen",
        }
        | exported.facts
        | ({"whitened by": _WHITENED_BY.format(**whitened)} if whitened else {}),
        f"features = model(transform(image).unsqueeze(0))  # (1, {vit.embed_dim})",
        license=license,
        scores=f"{measured}\n\n{table}" if table else "",
    )
