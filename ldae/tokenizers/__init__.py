"""Tokenizers: the maps from images to latent tokens and back, their registry and their files."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ldae.errors import InputError, first_line, unknown
from ldae.files import write
from ldae.tokenizers.contract import PatchTokenizer, Tokenizer
from ldae.tokenizers.conv import ConvTokenizer
from ldae.tokenizers.orthonormal import OrthonormalTokenizer, PatchPCA, PixelTokenizer
from ldae.tokenizers.patch_autoencoder import PatchAE, PatchVAE
from ldae.tokenizers.trained import Posterior, TrainedTokenizer
from ldae.tree import taken_by

__all__ = [
    "TOKENIZERS", "ConvTokenizer", "OrthonormalTokenizer", "PatchAE", "PatchPCA", "PatchTokenizer",
    "PatchVAE", "PixelTokenizer", "Posterior", "Tokenizer", "TrainedTokenizer",
]  # fmt: skip

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "patch_pca": PatchPCA,
    "pixel": PixelTokenizer,
    "patch_ae": PatchAE,
    "patch_vae": PatchVAE,
    "conv_vae": ConvTokenizer,
}
"""The tokenizers by name. The parameters of a constructor name the settings that it reads."""


def create(name: str, **settings: Any) -> Tokenizer:
    """Return an unfitted tokenizer with the settings that its constructor takes.

    Raises: InputError when the settings do not fit together.
    """
    cls = TOKENIZERS[name]
    return cls(**taken_by(cls, settings))


def name_of(tokenizer: Tokenizer) -> str:
    """Return the name of a tokenizer in ``TOKENIZERS``."""
    return next(name for name, kind in TOKENIZERS.items() if type(tokenizer) is kind)


def describe(tokenizer: Tokenizer) -> dict:
    """Return the name and the settings from which ``create`` makes such a tokenizer."""
    return {"name": name_of(tokenizer)} | taken_by(type(tokenizer), vars(tokenizer))


def check_kind(kind: type[Tokenizer], tokenizer: Tokenizer, what: str) -> None:
    """Check that a tokenizer is an instance of ``kind``, which the setting ``what`` needs.

    Raises: InputError naming the tokenizers of that kind.
    """
    if not isinstance(tokenizer, kind):
        names = [name for name, other in TOKENIZERS.items() if issubclass(other, kind)]
        raise InputError(
            f"{what} needs tokenizer.name {' or '.join(names)}, not {name_of(tokenizer)}"
        )


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write a fitted tokenizer as safetensors.

    Raises: InputError when the file cannot be written.
    """
    metadata = {"tokenizer": json.dumps(describe(tokenizer))}
    state = {name: value.cpu().contiguous() for name, value in tokenizer.state_dict().items()}
    write(path, safetensors.torch.save(state, metadata))


def open_fitted(path: Path) -> Tokenizer:
    """Return the tokenizer in a file that ``save`` wrote.

    Raises: InputError when the file is missing or damaged.
    """
    described, _ = _read(path)
    if described["name"] not in TOKENIZERS:
        raise unknown(f"tokenizer file {path} has the name", described["name"], TOKENIZERS)
    tokenizer = create(**described)
    load(tokenizer, path)
    return tokenizer


def load(tokenizer: Tokenizer, path: Path) -> None:
    """Load a file that ``save`` wrote into ``tokenizer``.

    A patch-wise tokenizer may have been fitted to images of another size.

    Raises: InputError when the file is missing or damaged, or belongs to another tokenizer.
    """
    saved, state = _read(path)
    described = describe(tokenizer)
    if isinstance(tokenizer, PatchTokenizer):
        del described["img_size"]
    for key, value in described.items():
        if saved.get(key) != value:
            raise InputError(f"tokenizer file {path} has {key} {saved.get(key)}, this run {value}")
    try:
        tokenizer.load_state_dict(state)
    except RuntimeError:
        raise InputError(f"the network in tokenizer file {path} does not fit this run's") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the description and the state dict in a tokenizer's file.

    Raises: InputError when it is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            described = json.loads(file.metadata()["tokenizer"])
        return described, safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"there is no tokenizer file {path}") from None
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path} is not a tokenizer file of ldae") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"tokenizer file {path} is damaged ({first_line(error)}): replace it by a copy, or fit "
            "the tokenizer again in a new run"
        ) from None
