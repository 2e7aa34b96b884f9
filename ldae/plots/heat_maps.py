"""Heat maps: numbers by two settings."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldae.plots.pictures import _save

# Of a heat map: a cell's width and height and the height of letters in pixels, the colours of the
# least and of the largest number.
_CELL, _FONT = (56, 30), 15
_COLOURS = ((240, 240, 230), (20, 80, 130))


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
