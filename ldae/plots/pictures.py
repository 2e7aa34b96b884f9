"""Pictures of a run: what the denoiser does, what the tokenizer sees."""

from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from ldae.files import write
from ldae.method import LDAE
from ldae.tokenizers import PatchTokenizer, Tokenizer

_MIN_TILE = 64  # smaller pictures are enlarged by whole pixels, so that they can be looked at


def grid(rows: list[torch.Tensor], gap: int = 2) -> Image.Image:
    """Rows of pictures (n, C, H, W) in [0, 1] as one image on white.

    One channel is grey, three or more show the first three.
    """
    tiles = torch.stack([row.cpu().float() for row in rows])  # (R, n, C, H, W)
    tiles = tiles[:, :, :3] if tiles.shape[2] >= 3 else tiles[:, :, :1].expand(-1, -1, 3, -1, -1)
    factor = -(-_MIN_TILE // tiles.shape[-1])
    tiles = tiles.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    tiles = torch.nn.functional.pad(tiles, (gap, 0, gap, 0), value=1.0)
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in tiles], dim=1)
    pixels = (sheet * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def save(rows: list[torch.Tensor], path: Path) -> None:
    """``grid`` as a PNG file, whole or not at all.

    Raises: InputError when it can not be written.
    """
    _save(grid(rows), path)


def _save(image: Image.Image, path: Path) -> None:
    content = BytesIO()
    image.save(content, "PNG")
    write(path, content.getvalue())


def save_denoising(method: LDAE, images: torch.Tensor, path: Path) -> None:
    """Clean, noised and denoised pictures, one above the other (paper, Fig. 8).

    ``images`` is uint8 (n, C, H, W). The noise is that of the middle of the schedule.
    """
    t = len(method.sigma) // 2
    positions = torch.arange(len(images), device=images.device)
    save(list(method.denoise_images(images, positions, t)), path)


@torch.no_grad()
def save_reconstruction(tokenizer: Tokenizer, images: torch.Tensor, path: Path) -> None:
    """Clean pictures over reconstructed ones; ``images`` is uint8 (n, C, H, W)."""
    x = tokenizer.normalize(images)
    made = tokenizer.decode(tokenizer.encode(x))
    save([tokenizer.denormalize(part).clamp(0, 1) for part in (x, made)], path)


@torch.no_grad()
def save_filters(tokenizer: PatchTokenizer, path: Path, columns: int = 16) -> None:
    """What each latent number sees of a patch, each stretched to the full range around mid grey
    (paper, Fig. 4)."""
    size = (-1, tokenizer.in_chans, tokenizer.patch_size, tokenizer.patch_size)
    unit = torch.eye(tokenizer.patch_dim, device=tokenizer.scales.device)
    filters = (tokenizer.project(unit) - tokenizer.project(torch.zeros_like(unit))).T.reshape(size)
    filters = 0.5 + 0.5 * filters / filters.abs().amax(dim=(1, 2, 3), keepdim=True)
    columns = min(columns, len(filters))
    blank = torch.ones_like(filters[:1]).expand(-len(filters) % columns, -1, -1, -1)
    save(list(torch.cat([filters, blank]).split(columns)), path)
