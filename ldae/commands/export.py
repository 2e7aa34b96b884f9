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
from ldae.backbones.fold import default_timestep, fold
from ldae.backbones.run import load_run
from ldae.backbones.timm_folder import write_timm_folder
from ldae.backbones.whitening import SHRINKAGE, add_whitening, whitening
from ldae.data.open import open_source
from ldae.data.source import Source
from ldae.distributed import device_for
from ldae.errors import InputError
from ldae.evals.features import Encoder
from ldae.evals.whitening import WhiteningProtocol
from ldae.method import LDAE
from ldae.models.contract import NoPlainViT
from ldae.tokenizers.moments import Moments

_IMAGES_AT_ONCE = 256
_WHITENED_BY = (
    "`head`, from {images:,} images of {data} ({split}), shrinkage {shrinkage:g}; "
    "`num_classes=0` leaves it out"
)


def export(
    run: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")],
    /,
    timestep: int | None = None,
    whiten: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None,
    whiten_shrinkage: float = SHRINKAGE,
    workers: int = 4,
    device: str = "auto",
) -> Path:
    """Write the backbone of a run as a folder that timm and the Hugging Face hub open.

    The folder holds config.json, model.safetensors and a model card, README.md. Before it appears
    under its name, the folded encoder is compared with the unfolded one, and the file that timm
    reads with the weights that were written.

    Args:
        run: a run folder; its newest checkpoint is exported.
        out: the folder to write; it must not exist yet, or must hold this export already.
        timestep: the t that is folded into the weights; by default 10 of 1000 noise levels, or
            the same share of another number.
        whiten: images, with or without labels; their train split gives the mean and covariance of
            features. The layer ``head`` of the exported ViT whitens features by these.
        whiten_shrinkage: as in ldae knn.
        workers: processes that decode the images of whiten.
        device: auto, cpu, cuda or cuda:N; it computes the features of whiten.

    Raises: InputError when ``run`` has no checkpoint, ``out`` holds something else, the images of
        ``whiten`` are too few, or the verification fails.
    """
    run, out = Path(run), Path(out)
    method, state = load_run(run)
    timestep = default_timestep(method) if timestep is None else timestep
    if not 0 <= timestep < len(method.sigma):
        raise InputError(f"timestep {timestep} is not in 0 .. {len(method.sigma) - 1}")
    WhiteningProtocol(whiten is not None, whiten_shrinkage)  # checks the shrinkage
    try:
        vit = fold(method, timestep)
    except NoPlainViT as error:
        raise InputError(f"{error}: ldae knn and linear grade the run itself") from None
    source = open_source(whiten, "train") if whiten else None
    record = _record(source, whiten_shrinkage) if source else None
    if out.exists():
        if not _holds(out, vit, record):
            raise InputError(f"{out} exists already; export to another folder")
        print(f"{out} is this export already")
        return out
    if source:
        moments = _moments(vit, source, workers, device_for(device))
        add_whitening(vit, whitening(moments, whiten_shrinkage))
    card = _model_card(run, vit, method, state, timestep, record)
    verify = partial(_verify_file, vit, method)
    write_timm_folder(out, vit, vit.model_args, verify, card=card, whitening=record)
    print(f"exported {run} at {state['images_seen']:,} images to {out}")
    return out


def _record(source: Source, shrinkage: float) -> dict:
    """Return what decides a whitening, beside the backbone."""
    return {
        "data": source.spec,
        "split": source.split,
        "images": len(source),
        "shrinkage": shrinkage,
    }


def _moments(vit: VisionTransformer, source: Source, workers: int, device: torch.device) -> Moments:
    """Return the moments of the features of all images."""
    moments, encoder = Moments(vit.embed_dim), Encoder(vit, device)
    for rows, _ in encoder.share(source, _IMAGES_AT_ONCE, workers):
        moments.update(rows.double())
    vit.cpu()
    return moments


def _holds(out: Path, vit: VisionTransformer, whitened: dict | None) -> bool:
    """Return whether a folder has these weights and this record of a whitening, and no others."""
    try:
        written = load_file(out / "model.safetensors")
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError):
        return False
    state, head = vit.state_dict(), {"head.weight", "head.bias"} if whitened else set()
    return (
        config.get("whitening") == whitened
        and written.keys() == state.keys() | head
        and all(torch.equal(written[name], value) for name, value in state.items())
    )


def _verify_file(vit: VisionTransformer, method: LDAE, opened: nn.Module) -> None:
    """Raises: InputError when the opened file and the ViT differ on random images."""
    side = method.tokenizer.img_size
    images = torch.randn(2, method.tokenizer.in_chans, side, side)
    with torch.no_grad():
        if not torch.equal(opened(images), vit(images)):
            raise InputError("not exported: timm does not read back what was written")


def _model_card(
    run: Path,
    vit: VisionTransformer,
    method: LDAE,
    state: dict,
    timestep: int,
    whitened: dict | None,
) -> str:
    tokenizer, describe = method.tokenizer, state["describe"]
    name, heads = vit.pretrained_cfg["architecture"], vit.blocks[0].attn.num_heads
    patch, side = tokenizer.patch_size, tokenizer.img_size
    return model_card(
        run.resolve().name,
        ["image-feature-extraction", "timm", "self-supervised-learning", "denoising-autoencoder"],
        "An image encoder pre-trained by latent denoising "
        "([l-DAE](https://arxiv.org/abs/2401.14404)) with\n"
        "ldae: a plain ViT, no class token, averaged features.",
        {
            "row of the paper": describe["row"],
            "architecture": f"{name}: {len(vit.blocks)} blocks, width {vit.embed_dim}, "
            f"{heads} heads",
            "input": f"{tokenizer.in_chans} x {side} x {side}, patch {patch}",
            "pre-trained on": f"{describe['images']:,} images, {state['images_seen']:,} seen",
            "tokenizer": f"{type(tokenizer).__name__}, d = {tokenizer.dim}, "
            f"scale {tokenizer.scale}",
            "folded at": f"t = {timestep}, clean input",
        }
        | ({"whitened by": _WHITENED_BY.format(**whitened)} if whitened else {}),
        f"features = model(transform(image).unsqueeze(0))  # (1, {vit.embed_dim})",
    )
