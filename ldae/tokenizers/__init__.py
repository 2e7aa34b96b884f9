"""Tokenizers: images to low-dimensional latent tokens and back."""

import json
from pathlib import Path

import safetensors
import safetensors.torch

from ldae.errors import InputError
from ldae.log import write
from ldae.tokenizers.patch import PatchPCA, PatchTokenizer, PixelTokenizer

_CLASSES = {"patch_pca": PatchPCA, "pixel": PixelTokenizer}


def create(
    name: str, *, img_size: int, patch_size: int, in_chans: int, dim: int, scale: str
) -> PatchTokenizer:
    """An unfitted tokenizer.

    Raises: InputError when its settings do not fit together, or for a tokenizer that is not built.
    """
    if name not in _CLASSES:
        raise InputError(
            f"tokenizer.name {name} is not built yet, so rows 1 to 7 can be shown but not run; "
            f"there are {', '.join(_CLASSES)}"
        )
    return _CLASSES[name](img_size, patch_size, in_chans, dim, scale)


def _describe(tokenizer: PatchTokenizer) -> dict:
    name = next(name for name, kind in _CLASSES.items() if type(tokenizer) is kind)
    keys = ("img_size", "patch_size", "in_chans", "dim", "scale")
    return {"name": name} | {key: getattr(tokenizer, key) for key in keys}


def save(tokenizer: PatchTokenizer, path: Path) -> None:
    """Write a fitted tokenizer as safetensors.

    Raises: InputError when the disk does not take it.
    """
    metadata = {"tokenizer": json.dumps(_describe(tokenizer))}
    write(path, safetensors.torch.save(tokenizer.state_dict(), metadata))


def load(tokenizer: PatchTokenizer, path: Path) -> None:
    """Fill ``tokenizer`` from a file that ``save`` wrote.

    Raises: InputError when the file is missing or damaged, or fits another tokenizer.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = json.loads(file.metadata()["tokenizer"])
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError, TypeError, KeyError):
        raise InputError(f"tokenizer file {path} is missing or damaged") from None
    wanted = _describe(tokenizer)
    for key, value in wanted.items():
        if found[key] != value:
            raise InputError(f"tokenizer file {path} has {key} {found[key]}, this run {value}")
    tokenizer.load_state_dict(state)
