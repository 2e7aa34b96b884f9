"""Conversion of images to tokens and back, and position embeddings of the tokens."""

import math

import torch

from ldae.errors import InputError


def patches_a_side(img_size: int, patch_size: int) -> int:
    """Return the number of patches along an edge of a square image.

    Raises: InputError when ``patch_size`` does not divide ``img_size``.
    """
    if img_size % patch_size:
        raise InputError(
            f"data.img_size {img_size} is not a multiple of model.patch_size {patch_size}"
        )
    return img_size // patch_size


def grid_side(count: int) -> int:
    """Return the side of a square grid of ``count`` tokens; 0 when they are no square."""
    side = math.isqrt(count)
    return side if side * side == count else 0


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images (B, C, H, W) into tokens (B, N, C * p * p), row by row.

    A token is channel-major, so a Linear on tokens equals a convolution of stride p with the same
    weight in the shape (out, C, p, p).
    """
    batch, chans, height, width = images.shape
    p = patch_size
    grid = images.reshape(batch, chans, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, chans * p * p)


def unpatchify(tokens: torch.Tensor, patch_size: int, chans: int) -> torch.Tensor:
    """Convert tokens (B, N, C * p * p) of square images back to images (B, C, H, W)."""
    batch, count, _ = tokens.shape
    p = patch_size
    side = grid_side(count)
    grid = tokens.reshape(batch, side, side, chans, p, p)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, chans, side * p, side * p)


def patch_moments(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the standard deviation (..., 1) of each patch (..., D).

    1e-6 is added to the unbiased variance (He et al. 2022, MAE), so no patch has a deviation of 0.
    """
    variance = patches.var(-1, keepdim=True)
    return patches.mean(-1, keepdim=True), (variance + 1e-6).sqrt()


def sincos_positions(embed_dim: int, side: int) -> torch.Tensor:
    """Return 2-D sine-cosine position embeddings of a square grid, (side * side, embed_dim).

    The first half of the channels encodes the column, the second half the row, as in DiT and MAE.
    """
    quarter = embed_dim // 4
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, embed_dim / 2)
    column = line.expand(side, side, -1)
    row = line[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(side * side, embed_dim).float()


def is_sincos(positions: torch.Tensor, atol: float = 1e-3) -> bool:
    """Return whether positions (N, W) are those of ``sincos_positions``, to within ``atol``."""
    count, width = positions.shape
    side = grid_side(count)
    if not side or width % 4:
        return False
    expected = sincos_positions(width, side)
    return torch.allclose(positions.float().cpu(), expected, rtol=0, atol=atol)
