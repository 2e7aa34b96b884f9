"""The folder that timm and the Hugging Face hub open: written aside, read back, then named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from torch import nn

from ldae.errors import InputError


def write_timm_folder(
    out: Path,
    model: nn.Module,
    model_args: dict[str, Any],
    verify: Callable[[nn.Module], None],
    *,
    card: str = "",
    classes: list[str] | None = None,
) -> None:
    """Write config.json, model.safetensors and, of a ``card``, README.md into the folder ``out``.

    It appears once ``verify`` has accepted the model, in eval mode, that timm reads back from it.
    ``model_args`` build the architecture; ``classes`` name the outputs.

    Raises: InputError when it can not be written, and what ``verify`` raises.
    """
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        timm.models.save_for_hf(
            model,
            str(aside),
            model_config={"label_names": classes} if classes else None,
            model_args=model_args,
            safe_serialization=True,
        )
        if card:
            (aside / "README.md").write_text(card)
        # safetensors' files are for their owner alone; a folder to share is as readable as its rest.
        shutil.copymode(aside / "config.json", aside / "model.safetensors")
        verify(timm.create_model(f"local-dir:{aside}", pretrained=True).eval())
        aside.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{out} can not be written: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
