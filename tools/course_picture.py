"""Draw the accuracy of a contest's runs over time, docs/pictures/course-light.svg and -dark.svg.

python tools/course_picture.py [benchmarks/results/contest/course.json]

The file is that of benchmarks/course.py. There is a panel for each grader, with a line for each
contestant and one for raw pixels.
"""

import argparse
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

from drawing import DARK, LIGHT, PICTURES, Colours, Drawing

COURSE = Path(__file__).parent.parent / "benchmarks" / "results" / "contest" / "course.json"
GRADERS = {"linear": "linear probe", "knn": "k-NN, k = 20", "knn-whitened": "whitened k-NN, k = 20"}
PIXELS = "raw pixels"

WIDTH, LEFT, RIGHT = 640, 56, 500  # of the picture, and the ends of the axis of time
PANEL, TOP, HEIGHT = 250, 34, 160  # of a panel, with its title and its axis
LABELS = 17  # least distance of two labels


def pictures(course: dict) -> dict[str, str]:
    """Return the pictures of a course.json by the names of their files."""
    return {
        f"course-{name}.svg": draw(course, colours).svg()
        for name, colours in (("light", LIGHT), ("dark", DARK))
    }


def draw(course: dict, colours: Colours) -> Drawing:
    """Return the picture of a course.json of at most three contestants."""
    graders = [*course["pixels"]]
    lines = {part["name"]: part["checkpoints"] for part in course["contestants"]}
    title = "Accuracy over the time of training: " + " and ".join(lines)
    drawing = Drawing(WIDTH, PANEL * len(graders), html.escape(title), colours)
    minutes = max(point["seconds"] for points in lines.values() for point in points) / 60
    for number, grader in enumerate(graders):
        curves = {
            name: [(point["seconds"] / 60, point["accuracies"][grader]) for point in points]
            for name, points in lines.items()
        }
        title = f"{GRADERS[grader]}: accuracy on the evaluation images"
        panel(drawing, PANEL * number, title, curves, course["pixels"][grader], minutes)
    return drawing


def panel(
    drawing: Drawing,
    top: float,
    title: str,
    curves: dict[str, list[tuple[float, float]]],
    pixels: float,
    minutes: float,
) -> None:
    """Draw the axes, the line of raw pixels, and the lines of contestants with their names."""
    colours = drawing.colours
    values = [pixels, *(value for curve in curves.values() for _, value in curve)]
    levels, times = ticks(min(values), max(values)), ticks(0, minutes, 8)
    times = [time for time in times if time <= minutes]
    bottom = top + TOP + HEIGHT

    def place(time: float, value: float) -> tuple[float, float]:
        share = (value - levels[0]) / (levels[-1] - levels[0])
        return LEFT + (RIGHT - LEFT) * time / minutes, bottom - HEIGHT * share

    drawing.text(LEFT, top + 20, title, 15, colours.ink, bold=True, anchor="start")
    for level in levels:
        x, y = place(0, level)
        drawing.line([(x, y), (RIGHT, y)], colours.line, 0.5)
        drawing.text(x - 8, y + 4, f"{level:g} %", 12, anchor="end")
    for time in times:
        x, y = place(time, levels[0])
        drawing.text(x, y + 17, f"{time:g}", 12)
    drawing.text((LEFT + RIGHT) / 2, bottom + 36, "minutes of training", 13)
    paint = dict(zip(curves, (colours.noise, colours.kept, colours.ink)))
    ends = {PIXELS: place(minutes, pixels)[1]}
    drawing.line([place(0, pixels), place(minutes, pixels)], colours.muted, 1.5, "5 4")
    for name, curve in curves.items():
        points = [place(*point) for point in curve]
        drawing.line(points, paint[name], 2)
        for x, y in points:
            drawing.parts.append(f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3" fill="{paint[name]}"/>')
        ends[name] = points[-1][1]
    for name, y in apart(ends, LABELS).items():
        shown = html.escape(name)
        drawing.text(RIGHT + 10, y + 4, shown, 13, paint.get(name, colours.muted), anchor="start")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most about ``most`` round numbers that enclose both ends."""
    least = max(high - low, 1e-6) / (most - 1)
    unit = 10.0 ** math.floor(math.log10(least))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= least)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 9) for number in range(first, max(last, first + 1) + 1)]


def apart(places: dict[str, float], gap: float) -> dict[str, float]:
    """Return places in the same order, each at least ``gap`` from the next, moved evenly."""
    names = sorted(places, key=lambda name: places[name])
    moved = [places[name] for name in names]
    for _ in range(100):
        for number in range(1, len(moved)):
            if (missing := gap - (moved[number] - moved[number - 1])) > 1e-6:
                moved[number - 1] -= missing / 2
                moved[number] += missing / 2
    return dict(zip(names, moved, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("course", nargs="?", type=Path, default=COURSE)
    parser.add_argument("--out", type=Path, default=PICTURES)
    args = parser.parse_args(argv)
    for name, text in pictures(json.loads(args.course.read_text())).items():
        (args.out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
