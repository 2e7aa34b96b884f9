"""Tokenizers: images to low-dimensional latent tokens and back."""

import json
from pathlib import Path

import safetensors
import safetensors.torch

from ldae.errors import InputError, first_line
from ldae.files import write
from ldae.tokenizers.contract import PatchTokenizer, Tokenizer
from ldae.tokenizers.conv import ConvTokenizer
from ldae.tokenizers.learned import TrainedTokenizer
from ldae.tokenizers.linear import PatchAE, PatchVAE
from ldae.tokenizers.orthonormal import OrthonormalTokenizer, PatchPCA, PixelTokenizer

__all__ = [
    "ConvTokenizer", "OrthonormalTokenizer", "PatchAE", "PatchPCA", "PatchTokenizer", "PatchVAE",
    "PixelTokenizer", "Tokenizer", "TrainedTokenizer",
]  # fmt: skip

_CLASSES = {
    "patch_pca": PatchPCA,
    "pixel": PixelTokenizer,
    "patch_ae": PatchAE,
    "patch_vae": PatchVAE,
    "conv_vae": ConvTokenizer,
}


def create(
    name: str,
    *,
    img_size: int,
    patch_size: int,
    in_chans: int,
    dim: int,
    scale: str,
    width: int = 128,
    codes: int = 0,
    pretrained: str = "",
) -> Tokenizer:
    """An unfitted tokenizer; ``width``, ``codes`` and ``pretrained`` are read by ``conv_vae``.

    Raises: InputError when its settings do not fit together.
    """
    sizes = (img_size, patch_size, in_chans, dim, scale)
    if name == "conv_vae":
        return ConvTokenizer(*sizes, width, codes, pretrained)
    return _CLASSES[name](*sizes)


def name_of(tokenizer: Tokenizer) -> str:
    """The ``tokenizer.name`` that makes such a tokenizer."""
    return next(name for name, kind in _CLASSES.items() if type(tokenizer) is kind)


def describe(tokenizer: Tokenizer) -> dict:
    """The name and the sizes that make such a tokenizer."""
    keys = ("img_size", "patch_size", "in_chans", "dim", "scale")
    if isinstance(tokenizer, ConvTokenizer):
        keys += ("width", "codes", "pretrained")
    return {"name": name_of(tokenizer)} | {key: getattr(tokenizer, key) for key in keys}


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write a fitted tokenizer as safetensors.

    Raises: InputError when the disk does not take it.
    """
    metadata = {"tokenizer": json.dumps(describe(tokenizer))}
    state = {name: value.cpu().contiguous() for name, value in tokenizer.state_dict().items()}
    write(path, safetensors.torch.save(state, metadata))


def load(tokenizer: Tokenizer, path: Path) -> None:
    """Fill ``tokenizer`` from a file that ``save`` wrote.

    Raises: InputError when the file is missing or damaged, or fits another tokenizer.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = json.loads(file.metadata()["tokenizer"])
        state = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"there is no tokenizer file {path}") from None
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path} is no file of a tokenizer that ldae wrote") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"tokenizer file {path} is damaged ({first_line(error)}): put a copy in its place, or "
            "fit it again in a new run"
        ) from None
    wanted = describe(tokenizer)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise InputError(f"tokenizer file {path} has {key} {found.get(key)}, this run {value}")
    try:
        tokenizer.load_state_dict(state)
    except RuntimeError:
        raise InputError(f"tokenizer file {path} holds another network than this run's") from None
