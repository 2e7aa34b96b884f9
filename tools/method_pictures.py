"""Draw the pictures of the method, docs/pictures/NAME-light.svg and NAME-dark.svg.

python tools/method_pictures.py

The digits and the axes in them are those of the committed demo, in benchmarks/results/demo.
"""

import base64
import io
from pathlib import Path

from drawing import DARK, LIGHT, PICTURES, Colours, Drawing
from PIL import Image

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "benchmarks" / "results" / "demo"

# denoised.png and filters.png: tiles of 64 pixels, each with a gap of 2 to its left and above.
GAP, TILE = 2, 64
SIDE, PATCH = 32, 4  # pixels of an image and of a patch of the demo
AXES = 8  # of a patch, in filters.png
DIGIT = 2  # column of denoised.png
CLEAN, NOISED, DENOISED = range(3)  # rows of denoised.png


class Raster:
    """A picture of the demo at its own size, as the source of an SVG image."""

    def __init__(self, file: str, row: int, column: int, pixels: int) -> None:
        step, left, top = TILE + GAP, GAP, GAP
        x, y = column * step + left, row * step + top
        with Image.open(DEMO / file) as sheet:
            tile = sheet.convert("L").crop((x, y, x + TILE, y + TILE))
        self.pixels = pixels
        content = io.BytesIO()
        # BMP is not compressed: the same bytes by every version of Pillow.
        tile.resize((pixels, pixels), Image.Resampling.NEAREST).save(content, "BMP")
        self.source = f"data:image/bmp;base64,{base64.b64encode(content.getvalue()).decode()}"


def digit(row: int, column: int = DIGIT) -> Raster:
    """Return an image of the demo: clean, noised or denoised."""
    return Raster("denoised.png", row, column, SIDE)


def axis(number: int) -> Raster:
    """Return a principal axis of the demo's patches."""
    return Raster("filters.png", 0, number, PATCH)


class Picture(Drawing):
    """A drawing that holds pictures of the demo."""

    def image(self, raster: Raster, x: float, y: float, side: float) -> None:
        self.parts.append(
            f'<image x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" '
            f'image-rendering="pixelated" href="{raster.source}"/>'
        )
        self.box(x, y, side, side)

    def patches(self, raster: Raster, x: float, y: float, side: float, gap: float) -> None:
        """Draw the patches of an image with gaps between them, in a square of ``side``."""
        count = SIDE // PATCH
        each = (side - gap * (count - 1)) / count
        name = f"image{len(self.parts)}"
        self.parts.append(
            f'<defs><image id="{name}" width="{SIDE}" height="{SIDE}" '
            f'image-rendering="pixelated" href="{raster.source}"/></defs>'
        )
        for row in range(count):
            for column in range(count):
                left, top = x + column * (each + gap), y + row * (each + gap)
                self.parts.append(
                    f'<svg x="{left:.2f}" y="{top:.2f}" width="{each:.2f}" height="{each:.2f}" '
                    f'viewBox="{column * PATCH} {row * PATCH} {PATCH} {PATCH}">'
                    f'<use href="#{name}"/></svg>'
                )
                self.box(left, top, each, each, stroke=0.75)


def index(letter: str, below: object) -> str:
    """Return a letter with an index, as words of a text."""
    return f'{letter}<tspan font-size="0.7em" dy="4">{below}</tspan><tspan dy="-4">\u200a</tspan>'


Z_0, Z_T = index("z", 0), index("z", "t")


def blocks(drawing: Picture, x: float, y: float, height: float, names: bool = False) -> float:
    """Draw the blocks of the ViT, encoder and decoder; return the x behind them."""
    width, gap = (26, 8) if names else (15, 6)
    for number in range(8):
        left = x + number * (width + gap) + (gap if number >= 4 else 0)
        kept = number < 4
        colour = drawing.colours.kept if kept else drawing.colours.line
        drawing.box(left, y, width, height, colour, colour if kept else "none", 1.5, 3)
    return x + 8 * (width + gap)


def method(colours: Colours) -> Picture:
    """The whole method: two lines of three steps."""
    drawing = Picture(640, 456, "l-DAE: the five steps and the export", colours)
    side, cell, line = 128, 213, 228

    def step(number: int, title: str, first: str, second: str = "", kept: bool = False) -> None:
        x, y = number % 3 * cell + cell / 2, number // 3 * line
        drawing.text(x, y + 20, title, 17, colours.kept if kept else colours.ink, bold=True)
        drawing.text(x, y + 186, first)
        drawing.text(x, y + 206, second)

    def corner(number: int) -> tuple[float, float]:
        return number % 3 * cell + (cell - side) / 2, number // 3 * line + 36

    step(0, "1. patches", "image x, cut into", "patches of 4 x 4 pixels")
    drawing.patches(digit(CLEAN), *corner(0), side, 3)
    step(1, "2. PCA", "each patch becomes", f"{AXES} numbers: latent {Z_0}")
    for number in range(AXES):
        x, y = corner(1)
        drawing.image(axis(number), x + number % 3 * 45, y + number // 3 * 45, 38)
    step(2, "3. noise", f"{Z_T} = \u03b3 {Z_0} + \u03c3 \u03b5,", "shown as an image")
    drawing.image(digit(NOISED), *corner(2), side)
    step(3, "4. ViT", "encoder (kept) and", "decoder (dropped)")
    x, y = corner(3)
    blocks(drawing, x - 21, y + 14, 100)
    step(4, "5. image", "the clean image", "is predicted")
    drawing.image(digit(DENOISED), *corner(4), side)
    step(5, "exported", "the encoder, folded into", "a plain timm model", kept=True)
    x, y = corner(5)
    drawing.box(x - 6, y + 4, side + 12, 120, colours.kept, stroke=2, corner=8)
    for number in range(4):
        drawing.box(x + 24 + number * 21, y + 18, 15, 70, colours.kept, colours.kept, 1.5, 3)
    drawing.text(x + side / 2, y + 111, "VisionTransformer", 14, colours.ink)
    for number in (0, 1, 4):
        x, y = corner(number)
        ends = x + side + 18, x + cell - 18
        drawing.arrow([(ends[0], y + 64), (ends[1], y + 64)])
    x, y = corner(3)
    drawing.arrow([(x + side + 32, y + 64), (x + cell - 18, y + 64)])
    third, fourth = corner(2), corner(3)
    middle = third[1] + side + 55
    drawing.arrow(
        [
            (third[0] + side + 22, third[1] + 64),
            (third[0] + side + 36, third[1] + 64),
            (third[0] + side + 36, middle),
            (fourth[0] - 34, middle),
            (fourth[0] - 34, fourth[1] + 64),
            (fourth[0] - 24, fourth[1] + 64),
        ]
    )
    return drawing


def patches(colours: Colours) -> Picture:
    """Step 1."""
    drawing = Picture(560, 250, "An image, and the image cut into patches", colours)
    drawing.image(digit(CLEAN), 20, 14, 192)
    drawing.arrow([(232, 110), (300, 110)])
    drawing.patches(digit(CLEAN), 320, 4, 220, 5)
    drawing.text(116, 240, "image x, 32 x 32 pixels")
    drawing.text(430, 246, "N = 64 patches of 4 x 4 pixels")
    return drawing


def axes(colours: Colours) -> Picture:
    """Step 2."""
    drawing = Picture(640, 190, "A patch is a weighted sum of principal axes", colours)
    # The patch in the middle of a stroke: the fourth row and the fourth column.
    drawing.parts.append(
        '<svg x="10" y="30" width="96" height="96" '
        f'viewBox="{4 * PATCH} {4 * PATCH} {PATCH} {PATCH}"><image width="{SIDE}" '
        f'height="{SIDE}" image-rendering="pixelated" href="{digit(CLEAN).source}"/></svg>'
    )
    drawing.box(10, 30, 96, 96)
    drawing.text(58, 152, "patch")
    drawing.text(126, 84, "\u2248", 24, colours.ink)
    for number in range(4):
        x = 144 + number * 116
        drawing.text(x + 12, 84, index("z", number + 1), 20, colours.kept)
        drawing.image(axis(number), x + 30, 46, 64)
        more = "+" if number < 3 else "+ \u2026"
        drawing.text(x + 98, 84, more, 20, colours.ink, anchor="start")
    drawing.text(
        372, 152, f"{AXES} numbers z times {AXES} axes, which are the same for all patches"
    )
    drawing.text(372, 174, "(the patches of images vary most along the first axes)", 13)
    return drawing


def noise(colours: Colours) -> Picture:
    """Step 3."""
    drawing = Picture(560, 250, "A clean image, and the image of its noised latent", colours)
    drawing.image(digit(CLEAN), 20, 14, 192)
    drawing.arrow([(232, 110), (328, 110)], colours.noise)
    drawing.text(280, 94, "+ \u03c3 \u03b5", 19, colours.noise)
    drawing.image(digit(NOISED), 348, 14, 192)
    drawing.text(116, 236, f"latent {Z_0}, decoded")
    drawing.text(444, 236, f"noised latent {Z_T}, decoded")
    return drawing


def network(colours: Colours) -> Picture:
    """Step 4."""
    drawing = Picture(640, 230, "The ViT: an encoder, which is kept, and a decoder", colours)
    drawing.image(digit(NOISED), 10, 40, 128)
    drawing.arrow([(150, 104), (178, 104)])
    blocks(drawing, 188, 34, 140, names=True)
    drawing.arrow([(470, 104), (498, 104)])
    drawing.image(digit(DENOISED), 510, 40, 128)
    drawing.text(252, 24, "encoder", 16, colours.kept, bold=True)
    drawing.text(396, 24, "decoder", 16, colours.muted, bold=True)
    drawing.arrow([(320, 182), (320, 204)], colours.kept)
    drawing.text(320, 222, "features: the mean of the tokens, for linear probes and the export")
    drawing.text(74, 190, "noisy image")
    drawing.text(574, 190, "prediction")
    return drawing


def images(colours: Colours) -> Picture:
    """Step 5: clean, noised and denoised digits."""
    columns, side, gap = range(6), 84, 6
    drawing = Picture(640, 284, "Clean, noised and denoised digits", colours)
    for row, name in enumerate(("clean", "noised", "denoised")):
        y = 6 + row * (side + gap)
        drawing.text(84, y + side / 2 + 5, name, 16, colours.ink, anchor="end")
        for column in columns:
            drawing.image(digit(row, column), 98 + column * (side + gap), y, side)
    return drawing


DRAWINGS = (method, patches, axes, noise, network, images)


def draw() -> dict[str, str]:
    """Return every picture by the name of its file."""
    return {
        f"{drawing.__name__}-{name}.svg": drawing(colours).svg()
        for drawing in DRAWINGS
        for name, colours in (("light", LIGHT), ("dark", DARK))
    }


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, text in draw().items():
        (PICTURES / name).write_text(text, encoding="utf-8")
