"""The picture of a contest's course, by made-up numbers until there is a file of measured ones."""

import importlib.util
import itertools
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "course_picture.py"
sys.path.append(str(TOOL.parent))  # as when it runs
_spec = importlib.util.spec_from_file_location("course_picture", TOOL)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)

SECONDS = (300, 1200, 3600)
COURSE = {
    "contestants": [
        {
            "name": name,
            "checkpoints": [
                {"seconds": seconds, "accuracies": {"linear": best - 900 / seconds, "knn": best}}
                for seconds in SECONDS
            ],
        }
        for name, best in (("mae", 50), ("masked & narrow", 50.2))
    ],
    "pixels": {"linear": 41, "knn": 47},
}


def parts(colours, kind):
    return ET.fromstring(tool.draw(COURSE, colours).svg()).findall(f"{{*}}{kind}")


def test_a_picture_is_as_its_file_and_differs_by_colours_alone(tmp_path):
    (tmp_path / "course.json").write_text(json.dumps(COURSE))
    tool.main([str(tmp_path / "course.json"), "--out", str(tmp_path)])
    light, dark = ((tmp_path / f"course-{name}.svg").read_text() for name in ("light", "dark"))
    assert light == tool.draw(COURSE, tool.LIGHT).svg()
    for one, other in zip(tool.LIGHT, tool.DARK, strict=True):
        light = light.replace(one, other)
    assert light == dark


def test_the_committed_pictures_are_those_of_the_committed_file():
    committed = {path.name: path.read_text() for path in tool.PICTURES.glob("course-*.svg")}
    assert tool.COURSE.exists() == bool(committed)
    drawn = tool.pictures(json.loads(tool.COURSE.read_text())) if committed else {}
    assert committed == drawn, "run: python tools/course_picture.py"


def test_each_line_has_its_points_in_time_and_its_name():
    circles = parts(tool.LIGHT, "circle")
    assert len(circles) == 2 * 2 * len(SECONDS)  # graders, contestants
    by_colour = {}
    for circle in circles:
        by_colour.setdefault(circle.get("fill"), []).append(float(circle.get("cx")))
    for across in by_colour.values():
        starts, ends = across[0] - tool.LEFT, across[len(SECONDS) - 1] - tool.LEFT
        assert starts / ends == pytest.approx(SECONDS[0] / SECONDS[-1], rel=1e-3)
    texts = parts(tool.LIGHT, "text")
    words = [text.text for text in texts]
    for name in ("mae", "masked & narrow", "raw pixels", "minutes of training"):
        assert words.count(name) == 2
    colours = {text.text: text.get("fill") for text in texts}
    assert {colours["mae"], colours["masked & narrow"]} == set(by_colour)
    assert len([path for path in parts(tool.LIGHT, "path") if path.get("stroke-dasharray")]) == 2


def test_a_higher_accuracy_is_drawn_higher_on_the_scale_of_the_axis():
    svg = tool.draw(COURSE, tool.LIGHT).svg()
    levels = re.findall(r'y="([\d.]+)"[^>]*>(\d+) %<', svg)
    first = [(float(y) - 4, float(level)) for y, level in levels if float(y) < tool.PANEL]
    (bottom, low), (top, high) = first[0], first[-1]
    ys = [float(circle.get("cy")) for circle in parts(tool.LIGHT, "circle")[: len(SECONDS)]]
    for y, seconds in zip(ys, SECONDS, strict=True):
        value = low + (high - low) * (bottom - y) / (bottom - top)
        assert value == pytest.approx(50 - 900 / seconds, abs=0.05)


@pytest.mark.parametrize("low, high", [(0, 60.3), (41.4, 56), (46.4, 46.4), (9.99, 10.01)])
def test_ticks_are_round_few_and_enclose_the_values(low, high):
    found = tool.ticks(low, high)
    assert found[0] <= low and high <= found[-1] and 2 <= len(found) <= 8
    steps = {round(after - before, 9) for before, after in itertools.pairwise(found)}
    (step,) = steps
    assert f"{step:e}"[:8] in ("1.000000", "2.000000", "5.000000")


def test_names_are_apart_and_in_the_order_of_their_lines():
    places = {"a": 10.0, "b": 12.0, "c": 11.0, "d": 100.0}
    moved = tool.apart(places, 17)
    assert [*moved] == sorted(places, key=places.get)
    gaps = [after - before for before, after in itertools.pairwise(moved.values())]
    assert min(gaps) >= 17 - 1e-3 and moved["d"] == 100
