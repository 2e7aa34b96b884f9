"""Pictures of a run: what the denoiser does, what the tokenizer sees, heat maps of its grades."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ldae.log import write
from ldae.method import LDAE
from ldae.tokenizers import PatchTokenizer, Tokenizer

# Of a heat map: a cell's width and height and the height of letters in pixels, the colours of the
# least and of the largest number.
_CELL, _FONT = (56, 30), 15
_COLOURS = ((240, 240, 230), (20, 80, 130))
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


@dataclass(frozen=True)
class HeatMap:
    """Numbers by two settings."""

    title: str
    rows: list[str]
    columns: list[str]
    columns_are: str
    values: list[list[float]]
    """A list for each row."""
    framed: tuple[int, int] | None = None
    """Row and column of the one to point at."""


def save_heat_maps(maps: list[HeatMap], path: Path) -> None:
    """Heat maps one below the other as a PNG file, all in the same colours, each number readable.

    Raises: InputError when it can not be written.
    """
    numbers = [value for one in maps for row in one.values for value in row]
    pictures = [_heat_map(one, min(numbers), max(numbers)) for one in maps]
    size = (max(p.width for p in pictures), sum(p.height for p in pictures))
    sheet, top = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    _save(sheet, path)


def _heat_map(one: HeatMap, low: float, high: float) -> Image.Image:
    font = ImageFont.load_default(_FONT)
    left = _CELL[0] // 4 + round(max(font.getlength(text) for text in one.rows))
    cell, top = _CELL, 3 * _CELL[1]
    width = max(len(one.columns) * cell[0], round(font.getlength(one.title)) + cell[0] // 4)
    size = (left + width + cell[0] // 4, top + len(one.rows) * cell[1] + cell[1] // 2)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)

    def center(column: float, row: float) -> tuple[float, float]:
        return left + (column + 0.5) * cell[0], top + (row + 0.5) * cell[1]

    draw.text((left, cell[1] / 2), one.title, "black", font, anchor="lm")
    draw.text((left, center(0, -2)[1]), one.columns_are, "black", font, anchor="lm")
    for column, text in enumerate(one.columns):
        draw.text(center(column, -1), text, "black", font, anchor="mm")
    for row, (text, values) in enumerate(zip(one.rows, one.values, strict=True)):
        draw.text((left - cell[0] / 8, center(0, row)[1]), text, "black", font, anchor="rm")
        for column, value in enumerate(values):
            x, y = center(column, row)
            box = (x - cell[0] / 2, y - cell[1] / 2, x + cell[0] / 2 - 2, y + cell[1] / 2 - 2)
            share = (value - low) / (high - low) if high > low else 1.0
            colour = tuple(round(a + share * (b - a)) for a, b in zip(*_COLOURS))
            frame = {"outline": "black", "width": 3} if (row, column) == one.framed else {}
            draw.rectangle(box, colour, **frame)
            ink = "white" if share > 0.5 else "black"
            draw.text((x - 1, y - 1), f"{value:.1f}", ink, font, anchor="mm")
    return picture
