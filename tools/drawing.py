"""Draw an SVG by hand, in the colours of a light or a dark page."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"


class Colours(NamedTuple):
    """The colours of a picture on one background."""

    ink: str
    muted: str
    line: str
    kept: str
    """Of what is exported."""
    noise: str


LIGHT = Colours("#1f2933", "#52606d", "#9aa5b1", "#00796b", "#c2410c")
DARK = Colours("#e4e7eb", "#9fb3c8", "#627d98", "#4db6ac", "#fb923c")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


class Drawing:
    """An SVG in the making; lengths are in its own units."""

    def __init__(self, width: float, height: float, title: str, colours: Colours) -> None:
        self.width, self.height, self.title, self.colours = width, height, title, colours
        self.parts: list[str] = []
        self.heads: dict[str, None] = {}  # colours of arrowheads, in their order

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: str = "",
        fill: str = "none",
        stroke: float = 1,
        corner: float = 0,
    ) -> None:
        self.parts.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
            f'rx="{corner:g}" fill="{fill}" stroke="{colour or self.colours.line}" '
            f'stroke-width="{stroke:g}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 15,
        colour: str = "",
        bold: bool = False,
        anchor: str = "middle",
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" '
            f'fill="{colour or self.colours.muted}"{weight}>{words}</text>'
        )

    def line(
        self, points: Iterable[tuple[float, float]], colour: str, stroke: float, dashes: str = ""
    ) -> None:
        path = " L ".join(f"{x:.2f} {y:.2f}" for x, y in points)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.parts.append(
            f'<path d="M {path}" fill="none" stroke="{colour}" stroke-width="{stroke:g}" '
            f'stroke-linejoin="round"{dashed}/>'
        )

    def arrow(self, points: Iterable[tuple[float, float]], colour: str = "") -> None:
        colour = colour or self.colours.muted
        self.heads[colour] = None
        path = " L ".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(
            f'<path d="M {path}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-linejoin="round" marker-end="url(#head{colour[1:]})"/>'
        )

    def svg(self) -> str:
        heads = "".join(
            f'<marker id="head{colour[1:]}" viewBox="0 0 10 10" refX="8" refY="5" '
            'markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M 0 0 L 10 5 L 0 10 z" fill="{colour}"/></marker>'
            for colour in self.heads
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} '
            f'{self.height:g}" width="{self.width:g}" height="{self.height:g}" role="img" '
            f'font-family="{FONT}">\n<title>{self.title}</title>\n<defs>{heads}</defs>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )
