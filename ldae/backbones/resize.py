"""Another size of the images that a network takes."""

from typing import Any

import torch

from ldae.backbones.open import TimmModel, adapt_cfg
from ldae.errors import InputError, first_line


def resize_input(model: TimmModel, side: int, spec: str, setting: str) -> dict[str, Any]:
    """Make a timm model take square images of ``side`` pixels, in place.

    Positions are interpolated, and ``pretrained_cfg`` gets the size.

    Args:
        spec, setting: the model and the setting of the side as the user named them, for errors.

    Returns: the arguments with which timm builds the resized model.

    Raises: InputError when the model does not take such images.
    """
    args: dict[str, Any] = {}
    chans = model.pretrained_cfg["input_size"][0]
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    if any(side % part for part in patch):  # timm would ignore the remaining pixels
        raise InputError(
            f"{setting} {side} does not fit {spec}: its patches have {patch[0]} x {patch[1]} pixels"
        )
    try:
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(side, side))
            args = {"img_size": side}
        with torch.no_grad():
            model(torch.zeros(1, chans, side, side))
    except Exception as error:  # architectures raise different types
        raise InputError(f"{setting} {side} does not fit {spec}: {first_line(error)}") from None
    adapt_cfg(model, chans, side)
    return args
