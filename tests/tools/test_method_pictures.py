"""The pictures of the method are drawn from the committed demo, for two backgrounds."""

import base64
import importlib.util
import io
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

TOOL = Path(__file__).parents[2] / "tools" / "method_pictures.py"
sys.path.append(str(TOOL.parent))  # as when it runs
_spec = importlib.util.spec_from_file_location("method_pictures", TOOL)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)

DRAWN = tool.draw()


def decoded(picture: str) -> str:
    """Return a picture with decoded images, which versions of Pillow encode differently."""

    def pixels(found: re.Match) -> str:
        image = Image.open(io.BytesIO(base64.b64decode(found[1])))
        return f"{image.size} {image.convert('RGB').tobytes().hex()}"

    return re.sub(r'data:image/\w+;base64,([^"]+)', pixels, picture)


def test_the_committed_pictures_are_those_of_the_demo():
    paths = [path for path in tool.PICTURES.iterdir() if not path.name.startswith("course-")]
    committed = {path.name: decoded(path.read_text()) for path in paths}
    drawn = {name: decoded(picture) for name, picture in DRAWN.items()}
    assert committed == drawn, "run: python tools/method_pictures.py"


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_stands_alone(name):
    """It is XML with a title, refers to no other file, and lies inside of its frame."""
    root = ET.fromstring(DRAWN[name])
    assert root.find("{*}title").text
    width, height = (float(root.get(side)) for side in ("width", "height"))
    for part in root.iter():
        assert (part.get("href") or "#").startswith(("#", "data:"))
    for part in root:
        if part.get("x") and part.get("width"):
            assert 0 <= float(part.get("x")) and 0 <= float(part.get("y"))
            assert float(part.get("x")) + float(part.get("width")) <= width
            assert float(part.get("y")) + float(part.get("height")) <= height


@pytest.mark.parametrize("name", [name for name in DRAWN if "-light" in name])
def test_the_two_backgrounds_differ_in_colours_alone(name):
    dark = DRAWN[name.replace("-light", "-dark")]
    for light_colour, dark_colour in zip(tool.LIGHT, tool.DARK, strict=True):
        dark = dark.replace(dark_colour, light_colour)
        dark = dark.replace(f"head{dark_colour[1:]}", f"head{light_colour[1:]}")
    assert dark == DRAWN[name]


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("colours, background", [(tool.LIGHT, "#ffffff"), (tool.DARK, "#1e2129")])
def test_words_can_be_read(colours, background):
    """Text has a contrast of at least 4.5 (WCAG 2, AA)."""
    for colour in (colours.ink, colours.muted, colours.kept, colours.noise):
        light, dark = sorted((luminance(colour), luminance(background)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


def test_the_tiles_are_those_of_the_demo():
    with Image.open(tool.DEMO / "denoised.png") as sheet:
        assert sheet.height == 3 * (tool.TILE + tool.GAP)
    with Image.open(tool.DEMO / "filters.png") as sheet:
        assert sheet.width == tool.AXES * (tool.TILE + tool.GAP)
    assert tool.digit(tool.CLEAN).source != tool.digit(tool.NOISED).source
