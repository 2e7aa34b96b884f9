r"""Follow the accuracy of contestants over a long training.

python benchmarks/course.py NAME ... --data TRAIN --eval-data TEST --runs runs/course \
    [--minutes 60] [settings of ldae pretrain]

Each contestant of ``contest.toml`` that is named is trained for as many images as it sees in
--minutes, measured as in the final of contest.py, whose rates.json may lie in --runs already. It
keeps about ten checkpoints. Then each checkpoint is graded on TEST by a linear probe and k-NN,
beside raw pixels. course.json in --runs has the seconds, the images and the accuracies of each;
``python tools/course_picture.py`` draws them.

Finished runs and gradings are kept: run the same command again to resume.
"""

import argparse
import shutil
import tomllib
from pathlib import Path

from benchmarks.contest import (
    CONTEST,
    GRADERS,
    PIXELS,
    accuracy,
    flags,
    grade,
    images_in_the_time,
    named,
    run_of,
    train,
    words_of,
)
from ldae.files import write_json
from ldae.runs import layout
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.environment import environment

CHECKPOINTS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--contest", type=Path, default=CONTEST)
    parser.add_argument("--graders", nargs="+", choices=GRADERS, default=["linear", "knn"])
    parser.add_argument("--minutes", type=float, default=60)
    args, more = parser.parse_known_args()
    contest = tomllib.loads(args.contest.read_text())
    names = named(contest["contestants"], args.names)
    kept = {"system.keep": 0, "system.save_minutes": args.minutes / CHECKPOINTS}
    settings = [*flags(contest["settings"] | kept), *more]
    words = words_of(contest["contestants"], settings)
    images = images_in_the_time(args, words, names)
    for name in names:
        train(args.data, words[name], run_of(args, name, 0), 0, images[name])
    grade(PIXELS, args, args.runs / "pixels")
    courses = []
    for name in names:
        courses.append({"name": name, "checkpoints": []})
        run, seconds_an_image = run_of(args, name, 0), 60 * args.minutes / images[name]
        for checkpoint in Checkpoints(run).paths():
            courses[-1]["checkpoints"].append(graded(args, run, checkpoint, seconds_an_image))
            write_course(args, courses)


def graded(args: argparse.Namespace, run: Path, checkpoint: Path, seconds_an_image: float) -> dict:
    """Grade a checkpoint; return its images, its seconds of training, and its accuracies."""
    folder = args.runs / "graded" / run.name / checkpoint.stem
    gradings = folder / layout.EVALS
    grade(str(run_with(run, checkpoint, folder)), args, gradings)
    images = layout.images_seen(checkpoint)
    accuracies = {grader: accuracy(gradings, grader) for grader in args.graders}
    seconds = round(seconds_an_image * images, 1)
    return {"images": images, "seconds": seconds, "accuracies": accuracies}


def run_with(run: Path, checkpoint: Path, folder: Path) -> Path:
    """Return ``folder`` as a run folder with one checkpoint of ``run`` and no newer one.

    A backbone is that of the newest checkpoint.
    """
    linked = folder / layout.CHECKPOINTS / checkpoint.name
    linked.parent.mkdir(parents=True, exist_ok=True)
    for name in (layout.CONFIG, layout.ENVIRONMENT, layout.TOKENIZER):
        if (run / name).exists():  # MAE has no tokenizer
            shutil.copyfile(run / name, folder / name)
    if not linked.exists():
        linked.hardlink_to(checkpoint)
    return folder


def write_course(args: argparse.Namespace, courses: list[dict]) -> None:
    record = {
        "data": [args.data, args.eval_data],
        "minutes": args.minutes,
        "contestants": courses,
        "pixels": {grader: accuracy(args.runs / "pixels", grader) for grader in args.graders},
        "environment": environment(),
    }
    write_json(args.runs / "course.json", record)


if __name__ == "__main__":
    main()
