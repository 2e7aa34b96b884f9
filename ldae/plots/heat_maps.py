"""Heat maps of numbers that depend on two settings."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldae.plots.pictures import save_png

_CELL = (56, 30)  # width and height in pixels
_FONT = 15  # height in pixels
_COLOURS = ((240, 240, 230), (20, 80, 130))  # of the smallest and the largest number


@dataclass(frozen=True)
class HeatMap:
    """A table of numbers with a label for each row and column."""

    title: str
    rows: list[str]
    columns: list[str]
    column_label: str
    values: list[list[float]]
    """One list per row."""
    framed: tuple[int, int] | None = None
    """Row and column of a cell to highlight."""


def save_heat_maps(maps: list[HeatMap], path: Path) -> None:
    """Save heat maps below each other as a PNG file, with one colour scale for all.

    Raises: InputError when the file cannot be written.
    """
    numbers = [value for heat_map in maps for row in heat_map.values for value in row]
    pictures = [_draw(heat_map, min(numbers), max(numbers)) for heat_map in maps]
    size = (max(p.width for p in pictures), sum(p.height for p in pictures))
    sheet, top = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    save_png(sheet, path)


def _draw(heat_map: HeatMap, low: float, high: float) -> Image.Image:
    font = ImageFont.load_default(_FONT)
    left = _CELL[0] // 4 + round(max(font.getlength(text) for text in heat_map.rows))
    cell, top = _CELL, 3 * _CELL[1]
    title_width = round(font.getlength(heat_map.title)) + cell[0] // 4
    width = max(len(heat_map.columns) * cell[0], title_width)
    size = (left + width + cell[0] // 4, top + len(heat_map.rows) * cell[1] + cell[1] // 2)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)

    def center(column: float, row: float) -> tuple[float, float]:
        return left + (column + 0.5) * cell[0], top + (row + 0.5) * cell[1]

    draw.text((left, cell[1] / 2), heat_map.title, "black", font, anchor="lm")
    draw.text((left, center(0, -2)[1]), heat_map.column_label, "black", font, anchor="lm")
    for column, text in enumerate(heat_map.columns):
        draw.text(center(column, -1), text, "black", font, anchor="mm")
    for row, (text, values) in enumerate(zip(heat_map.rows, heat_map.values, strict=True)):
        draw.text((left - cell[0] / 8, center(0, row)[1]), text, "black", font, anchor="rm")
        for column, value in enumerate(values):
            x, y = center(column, row)
            box = (x - cell[0] / 2, y - cell[1] / 2, x + cell[0] / 2 - 2, y + cell[1] / 2 - 2)
            share = (value - low) / (high - low) if high > low else 1.0
            colour = tuple(round(a + share * (b - a)) for a, b in zip(*_COLOURS))
            frame = {"outline": "black", "width": 3} if (row, column) == heat_map.framed else {}
            draw.rectangle(box, colour, **frame)
            text_colour = "white" if share > 0.5 else "black"
            draw.text((x - 1, y - 1), f"{value:.1f}", text_colour, font, anchor="mm")
    return picture
