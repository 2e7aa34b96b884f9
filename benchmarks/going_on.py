"""Compare encoders as they start, gone on with on other images, and the same from scratch.

python benchmarks/going_on.py --first LABELLED --data TRAIN --eval-data TEST --runs runs/going-on

The starts are an MAE and a supervised ViT of the same shape, both trained on the images of
--first. l-DAE goes on from each of them on the images of --data; MAE goes on too, from its own
start. All are graded on --eval-data by the graders of contest.py, beside the same trainings from
scratch.

Finished runs and gradings are kept: run the same command again to resume. table.json in --runs
holds all numbers.
"""

import argparse
import json
from pathlib import Path

from benchmarks.command import run_ldae
from benchmarks.contest import GRADERS, HEADLINES, flags, grade
from ldae.files import write_json
from ldae.runs import layout
from ldae.runs.environment import environment

SETTINGS = {"scale": "demo", "system.compile": "on", "system.keep": 1}
# With all axes the tokenizer drops nothing of what the start reads from a patch.
DENOISING = {"tokenizer.dim": 48}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", required=True, help="labelled images that the starts are of")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--first-epochs", type=float, default=5)
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--graders", nargs="+", choices=GRADERS, default=list(GRADERS))
    args = parser.parse_args()

    mae, supervised = args.runs / "mae", args.runs / "supervised"
    pretrain("mae", args.first, args.first_epochs, mae)
    train_supervised(args, mae, supervised)
    starts = {"MAE": mae, "supervised": supervised / layout.CLASSIFIER}
    rows = [grades(args, f"{name}, as it is", start) for name, start in starts.items()]
    for name, start in {**starts, "": None}.items():
        for method in ("l_dae", "mae") if name != "supervised" else ("l_dae",):
            run = args.runs / f"{method}-from-{name or 'scratch'}".lower()
            more = {"init_from": start} if start else {}
            pretrain(method, args.data, args.epochs, run, more)
            rows.append(grades(args, f"{name or 'from scratch'}, {method} on --data", run))
            record = {"data": [args.first, args.data, args.eval_data], "rows": rows}
            write_json(args.runs / "table.json", record | {"environment": environment()})


def pretrain(row: str, data: str, epochs: float, run: Path, more: dict | None = None) -> None:
    settings = SETTINGS | (DENOISING if row == "l_dae" else {}) | (more or {})
    settings |= {"optim.epochs": epochs, "optim.warmup_epochs": epochs / 10}
    run_ldae("pretrain", row, *flags(settings), "--data", data, "--run", run)


def train_supervised(args: argparse.Namespace, mae: Path, run: Path) -> None:
    """Train a ViT of the MAE's shape with labels, from random weights."""
    if (run / layout.CLASSIFIER).exists():
        return
    exported = args.runs / "mae-exported"
    if not exported.exists():
        run_ldae("export", mae, exported)
    recipe = {
        "model.random_init": True,
        "model.drop_path": 0.0,
        "augment.policy": "",
        "augment.erasing": 0.0,
        "augment.mixup": 0.0,
        "augment.cutmix": 0.0,
        "augment.min_area": 0.35,
        "optim.batch_size": 128,
        "optim.blr": 1e-3,
        "optim.epochs": args.first_epochs,
        "optim.warmup_epochs": args.first_epochs / 10,
    }
    words = ("--recipe", "mae", *flags(recipe), "--data", args.first)
    run_ldae("finetune", exported, *words, "--run", run)


def grades(args: argparse.Namespace, name: str, backbone: Path) -> dict:
    """Return the accuracies of a backbone, in percent."""
    folder = args.runs / layout.EVALS / name.replace(", ", "-").replace(" ", "-")
    grade(str(backbone), args, folder)
    found = {
        grader: json.loads((folder / grader / layout.RESULTS).read_text())["results"]
        for grader in args.graders
    }
    accuracies = {grader: round(found[grader][HEADLINES[grader]], 2) for grader in args.graders}
    print(name, accuracies, flush=True)
    return {"name": name, "accuracies": accuracies}


if __name__ == "__main__":
    main()
