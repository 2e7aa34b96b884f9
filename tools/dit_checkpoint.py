#!/usr/bin/env python3
"""Make a run of row ``dit`` from a checkpoint of DiT, for `ldae sample`, `fid`, `knn` and `grid`.

    python tools/dit_checkpoint.py DiT-XL-2-256x256.pt runs/dit-xl --data /data/imagenet

The VAE is downloaded from the hub, or is a folder of diffusers on this machine (--vae DIR).

Three things differ from DiT's own code. Samples have fixed variances, since the variances that DiT
predicts are left out. Guidance acts on all channels of the latents, where DiT's acts on three of
four. Features are those after the first half of the blocks, at t = 10 without a label.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch

from ldae import files, tokenizers, trajectory, tree
from ldae.backbones.layouts import StateDict
from ldae.backbones.weights import read_checkpoint
from ldae.data.open import open_source
from ldae.errors import InputError, report
from ldae.method import LDAE, build
from ldae.patches import grid_side, is_sincos
from ldae.runs import kinds, layout
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.environment import environment
from ldae.settings import Config
from ldae.train.optim import adamw
from ldae.tree import COUNT, NOT_NEGATIVE

# Steps of 256 images. Source: Peebles and Xie 2023, section 5.1.
PUBLISHED = {"DiT-XL-2-256x256.pt": 7_000_000 * 256, "DiT-XL-2-512x512.pt": 3_000_000 * 256}
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT-S, B, L and XL, by their widths
# The beginnings of names: DiT's -> those here.
_NAMES = {
    "x_embedder.proj.": "embed.",
    "t_embedder.": "t_embed.",
    "y_embedder.embedding_table.": "y_embed.",
    "final_layer.": "final.",
}
_MARKS = {
    "pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight",
    "final_layer.linear.weight", "final_layer.linear.bias",
}  # fmt: skip
_TOKEN = 16  # pixels a side: the VAE's latents are 8 times smaller, and a token is 2 x 2 of them
_IMAGENET = 1_281_167


class Weights(NamedTuple):
    """The weights in a checkpoint of DiT, by DiT's names."""

    average: StateDict
    """The moving average, which is all that the published files hold."""
    model: StateDict


def dit_checkpoint(
    file: Path,
    run: Path,
    /,
    *,
    data: str = "",
    vae: str = "stabilityai/sd-vae-ft-ema",
    images_seen: Annotated[int | None, NOT_NEGATIVE] = None,
    num_heads: Annotated[int | None, COUNT] = None,
) -> None:
    """Make a run of row dit in the folder RUN from the checkpoint FILE of DiT.

    Args:
        file: a published file, or a checkpoint of DiT's train.py.
        run: a new folder.
        data: the labelled images of the training, for `ldae fid` and the names of the classes,
            which are numbers without it.
        vae: the AutoencoderKL of the latents: a folder of diffusers, or USER/NAME on the hub.
        images_seen: images of the training; not needed for a published file of that name.
        num_heads: attention heads; not needed for DiT-S, B, L and XL.

    Raises: InputError when the file is no DiT that row dit has, or something is missing.
    """
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"run folder {run} is not empty")
    files.check_writable(run)
    weights = read_weights(file)
    config = config_of(file, weights.average, data, vae, num_heads)
    seen = PUBLISHED.get(file.name) if images_seen is None else images_seen
    if seen is None:
        raise InputError(f"say how many images {file} was trained on: --images-seen N")
    config = tree.replace(config, {"optim.epochs": max(seen, 1) / _IMAGENET})
    images, classes = _images(data, len(weights.average["y_embedder.embedding_table.weight"]) - 1)
    method = build(config, num_classes=len(classes))
    # Published latents have a given scale, so that any image fits it.
    size = config.data.img_size
    method.tokenizer.fit_latents([torch.zeros(1, 3, size, size, dtype=torch.uint8)])
    state = {
        "images_seen": seen,
        "average": _state(method, weights.average, file),
        "model": _state(method, weights.model, file),
        "optimizer": adamw(method, config.optim).state_dict(),
        "describe": {"row": "dit", "images": images, "classes": classes},
    }
    run.mkdir(parents=True, exist_ok=True)
    files.write(run / layout.CONFIG, kinds.to_yaml(config, "pretraining").encode())
    files.write_json(run / layout.ENVIRONMENT, environment())
    tokenizers.save(method.tokenizer, run / layout.TOKENIZER)
    print(f"{run}: {Checkpoints(run).save(state).name}, {len(classes)} classes")


def read_weights(file: Path) -> Weights:
    """Read a checkpoint of DiT.

    Raises: InputError when it cannot be read or is none.
    """
    content = read_checkpoint(file)
    content = content if isinstance(content, dict) else {}
    average = content.get("ema", content)
    if not _MARKS <= average.keys():
        raise InputError(f"{file} is no checkpoint of DiT")
    return Weights(average, content.get("model", average))


def config_of(file: Path, weights: StateDict, data: str, vae: str, num_heads: int | None) -> Config:
    """Return row dit with the sizes of DiT's weights, and DiT's recipe.

    Raises: InputError when row dit has no network of these sizes.
    """
    positions = weights["pos_embed"][0]
    tokens, width = positions.shape
    _, chans, patch, _ = weights["x_embedder.proj.weight"].shape
    depth, side = _depth(weights), grid_side(tokens)
    if patch != 2:
        raise InputError(
            f"{file}: its tokens are {patch} x {patch} latents, those of row dit 2 x 2"
        )
    if depth % 2:
        raise InputError(f"{file}: its {depth} blocks have no half, which is the encoder")
    if num_heads is None and width not in HEADS:
        raise InputError(f"{file} has the width {width} of no published DiT: set --num-heads")
    if not is_sincos(positions):
        raise InputError(f"{file} has other positions than the constant ones of DiT")
    changes: dict[str, Any] = {
        "data.source": data, "data.img_size": _TOKEN * side, "data.flip": True,
        "tokenizer.dim": 4 * chans, "tokenizer.pretrained": vae, "tokenizer.scale": "raw",
        "model.patch_size": _TOKEN, "model.depth": depth // 2, "model.embed_dim": width,
        "model.num_heads": num_heads or HEADS[width], "model.cond_ratio": 1.0,
        "optim.batch_size": 256, "optim.blr": 1e-4, "optim.min_lr": 1e-4,
        "optim.warmup_epochs": 0, "optim.ema": 0.9999,
    }  # fmt: skip
    return tree.replace(trajectory.config("dit"), changes)


def denoiser_state(weights: StateDict) -> StateDict:
    """Return DiT's weights by the names and in the order of ``ldae.models.dit.DiT``.

    A token here is by channel, (C, 2, 2). DiT's output is pixel by pixel, (2, 2, C), or (2, 2, 2 C)
    with the predicted variances behind the noise of each pixel.
    """
    chans = weights["x_embedder.proj.weight"].shape[1]
    half = _depth(weights) // 2
    state = {}
    for name, value in weights.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            stack = "encoder" if int(number) < half else "decoder"
            state[f"{stack}.{int(number) % half}.{rest}"] = value
        elif name != "pos_embed":  # constants
            theirs = next(filter(name.startswith, _NAMES), "")
            state[_NAMES.get(theirs, "") + name.removeprefix(theirs)] = value
    state["embed.weight"] = state["embed.weight"].flatten(1)
    for name in ("final.linear.weight", "final.linear.bias"):
        noise = state[name].unflatten(0, (2, 2, -1))[:, :, :chans]
        state[name] = noise.movedim(2, 0).flatten(0, 2)
    return state


def _depth(weights: StateDict) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith("blocks.")})


def _state(method: LDAE, weights: StateDict, file: Path) -> StateDict:
    """Return the state of the method with DiT's weights.

    Raises: InputError naming the first weight that does not fit.
    """
    own = method.state_dict()
    state = {f"denoiser.{name}": value.float() for name, value in denoiser_state(weights).items()}
    for name in sorted({name for name in own if name.startswith("denoiser.")} | state.keys()):
        there, here = (
            tuple(part[name].shape) if name in part else "missing" for part in (state, own)
        )
        if there != here:
            raise InputError(f"{file} is no DiT of row dit: {name} is {there} there, {here} here")
    return own | state


def _images(data: str, classes: int) -> tuple[int, list[str]]:
    """Return the number of images of a source and the names of its classes: numbers without one.

    Raises: InputError when the source cannot be opened or has another number of classes.
    """
    if not data:
        return 0, [str(number) for number in range(classes)]
    source = open_source(data, "train")
    names = list(source.classes or ())
    if len(names) != classes:
        raise InputError(f"{data} has {len(names)} classes, and the checkpoint {classes}")
    return len(source), names


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return the exit status as ``ldae`` does."""
    import tyro

    try:
        tyro.cli(dit_checkpoint, args=argv)
    except InputError as error:
        report(error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
