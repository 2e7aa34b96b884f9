"""Writing a model as a folder that timm and the Hugging Face hub open."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from ldae.backbones.preprocessing import preprocessing
from ldae.errors import InputError
from ldae.files import partial_folder

README = "README.md"
"""The model card in such a folder."""


def write_timm_folder(
    out: Path,
    model: nn.Module,
    model_args: dict[str, Any],
    *,
    card: str = "",
    classes: list[str] | None = None,
    whitening: dict[str, Any] | None = None,
    extend: Callable[[Path, nn.Module], None] | None = None,
) -> None:
    """Write a model to the folder ``out``, which appears once timm has read back the same model.

    The folder holds config.json, model.safetensors and, if ``card`` is given, README.md. It is
    written under another name and renamed at the end. config.json has the model's ``images_seen``
    and ``timestep``, if any.

    Args:
        model: in eval mode on the CPU. Its ``pretrained_cfg`` has the size of its images.
        model_args: arguments with which timm builds the architecture.
        card: text of the README.md; empty: none.
        classes: names of the outputs.
        whitening: the record of a head that whitens features; timm ignores it.
        extend: called with the folder and the model that timm reads back, to add files.

    Raises: InputError when the folder cannot be written, and when the outputs of what timm reads
        back differ in a bit on random images; as ``extend`` does.
    """
    config = {"label_names": classes, "whitening": whitening}
    config |= {name: getattr(model, name, None) for name in ("images_seen", "timestep")}
    try:
        with partial_folder(out) as aside:
            timm.models.save_for_hf(
                model,
                str(aside),
                model_config={name: value for name, value in config.items() if value is not None},
                model_args=model_args,
                safe_serialization=True,
            )
            if card:
                (aside / README).write_text(card, encoding="utf-8")
            # safetensors makes its file readable by the owner only, but the folder is for sharing.
            shutil.copymode(aside / "config.json", aside / "model.safetensors")
            opened = timm.create_model(f"local-dir:{aside}", pretrained=True).eval()
            images = torch.randn(2, *preprocessing(model).input_size)
            with torch.no_grad():
                if not torch.equal(opened(images), model(images)):
                    raise InputError(f"{out} is not written: timm reads back another network")
            if extend:
                extend(aside, opened)
            aside.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{out} cannot be written: {error}") from None
