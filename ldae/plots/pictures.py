"""Pictures of a run: denoised images, reconstructed images and the tokenizer's filters."""

from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from ldae.files import write
from ldae.method import LDAE
from ldae.tokenizers import PatchTokenizer, Tokenizer

_MIN_TILE = 64  # pixels; smaller pictures are enlarged by a whole factor to be recognisable


def grid(rows: list[torch.Tensor], gap: int = 2) -> Image.Image:
    """Arrange rows of pictures, each (n, C, H, W) in [0, 1], in one image on white.

    Of three or more channels, the first three are shown; of fewer, the first is shown as grey.
    """
    tiles = torch.stack([row.cpu().float() for row in rows])  # (R, n, C, H, W)
    tiles = tiles[:, :, :3] if tiles.shape[2] >= 3 else tiles[:, :, :1].expand(-1, -1, 3, -1, -1)
    factor = -(-_MIN_TILE // tiles.shape[-1])
    tiles = tiles.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    tiles = torch.nn.functional.pad(tiles, (gap, 0, gap, 0), value=1.0)
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in tiles], dim=1)
    pixels = (sheet * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def save_grid(rows: list[torch.Tensor], path: Path) -> None:
    """Save the rows that ``grid`` arranges as a PNG file.

    Raises: InputError when the file cannot be written.
    """
    save_png(grid(rows), path)


def save_png(image: Image.Image, path: Path) -> None:
    """Save an image as a PNG file; an interrupted save leaves no partial file.

    Raises: InputError when the file cannot be written.
    """
    content = BytesIO()
    image.save(content, "PNG")
    write(path, content.getvalue())


def save_denoising(method: LDAE, images: torch.Tensor, path: Path) -> None:
    """Save a row each of clean, noised and denoised pictures (paper, Fig. 8).

    ``images`` is uint8 (n, C, H, W). The noise level is the middle of the schedule.
    """
    t = len(method.sigma) // 2
    positions = torch.arange(len(images), device=images.device)
    save_grid(list(method.denoise_images(images, positions, t)), path)


@torch.no_grad()
def save_reconstruction(tokenizer: Tokenizer, images: torch.Tensor, path: Path) -> None:
    """Save clean pictures above reconstructed ones; ``images`` is uint8 (n, C, H, W)."""
    x = tokenizer.normalize(images)
    reconstructed = tokenizer.decode(tokenizer.encode(x))
    save_grid([tokenizer.denormalize(rows).clamp(0, 1) for rows in (x, reconstructed)], path)


@torch.no_grad()
def save_filters(tokenizer: PatchTokenizer, path: Path, columns: int = 16) -> None:
    """Save the patch filter of each latent dimension (paper, Fig. 4).

    Each filter is scaled to the full range around mid grey.
    """
    size = (-1, tokenizer.in_chans, tokenizer.patch_size, tokenizer.patch_size)
    unit = torch.eye(tokenizer.patch_dim, device=tokenizer.scales.device)
    filters = (tokenizer.project(unit) - tokenizer.project(torch.zeros_like(unit))).T.reshape(size)
    filters = 0.5 + 0.5 * filters / filters.abs().amax(dim=(1, 2, 3), keepdim=True)
    columns = min(columns, len(filters))
    blank = torch.ones_like(filters[:1]).expand(-len(filters) % columns, -1, -1, -1)
    save_grid(list(torch.cat([filters, blank]).split(columns)), path)
