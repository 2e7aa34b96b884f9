"""The token map of a backbone as features: one vector a place instead of one an image."""

import math

import torch
from torch import nn

from ldae.errors import InputError, first_line
from ldae.evals.taps import Tap
from ldae.patches import patchify


class TokenMapReader:
    """The map after the last block, behind the model's final norm: (B, C, H, W) -> [(B, h * w * D)].

    Tokens come row by row. Of raw pixels they are patches of ``pixel_patch`` pixels a side.

    Raises: InputError, naming the model, for one that is of neither kind.
    """

    def __init__(self, model: nn.Module, pixel_patch: int) -> None:
        self.model, self._patch = model, pixel_patch
        self.shape = (0, 0, 0)  # h, w, D
        config = getattr(model, "pretrained_cfg", {})
        self.name = config.get("architecture", type(model).__name__)
        self._pixels = self.name == "pixels"
        if self._pixels and config["input_size"][1] % pixel_patch:
            raise InputError(
                f"pixels:{config['input_size'][1]} can not be cut into patches of {pixel_patch} pixels"
            )
        if not self._pixels and not hasattr(model, "forward_intermediates"):
            raise InputError(f"{self.name} gives no token map: it is no timm model that has one")

    def __call__(
        self, images: torch.Tensor, indices: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        return [self.tokens(images).flatten(1)]

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """(B, h, w, D)."""
        if self._pixels:
            rows = images.shape[2] // self._patch
            return patchify(images, self._patch).unflatten(1, (rows, -1))
        (grid,) = self.model.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return grid.permute(0, 2, 3, 1)

    def columns(self, image: torch.Tensor) -> dict[Tap, slice]:
        """All of them are the last block's; from now on ``shape`` is known.

        Raises: InputError when the model gives no map.
        """
        try:
            self.shape = tuple(self.tokens(image).shape[1:])
        except (AssertionError, TypeError, ValueError) as error:  # of timm, for what is not there
            raise InputError(f"{self.name} gives no token map: {first_line(error)}") from None
        return {Tap(): slice(0, math.prod(self.shape))}
