"""ViTDet's simple feature pyramid: maps of five sizes from the last map of a plain ViT."""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

SCALES = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Sides of the maps as multiples of that of the token map: strides 4 to 64 for patches of 16."""


class SimpleFeaturePyramid(nn.Module):
    """Five maps of one width, each computed from the token map by itself.

    The map is resized by deconvolutions (4 and 2 times the side), not at all, or by max pooling (a
    half). Then come a 1x1 and a 3x3 convolution, each with a LayerNorm over channels. The fifth map
    takes every second value of the fourth one.

    Source: Li et al. 2022, Exploring plain vision transformer backbones for object detection,
    section 3 and appendix A.2, and its code in detectron2.

    Args:
        dim: channels of the token map; a multiple of 4.
        out_channels: channels of the maps.
    """

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(channels, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for layers, channels in (
                ([_double(dim), LayerNorm2d(dim // 2), nn.GELU(), _double(dim // 2)], dim // 4),
                ([_double(dim)], dim // 2),
                ([], dim),
                ([nn.MaxPool2d(2)], dim),
            )
        )

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Return maps (B, out_channels, s h, s w), s in ``SCALES``, of a token map (B, dim, h, w).

        ``h`` and ``w`` are even; the sides of the fifth map are rounded up.
        """
        maps = [level(tokens) for level in self.levels]
        return [*maps, F.max_pool2d(maps[-1], 1, stride=2)]


def _double(dim: int) -> nn.ConvTranspose2d:
    """Return a deconvolution that doubles the sides and halves the channels."""
    return nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
