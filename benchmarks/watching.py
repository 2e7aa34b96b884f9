"""Check that a collapse and a standstill are reported, and that healthy runs are not.

python benchmarks/watching.py --runs runs/watching [--out benchmarks/results/watching.json]

At scale demo, by the demo's 50,000 images: three healthy runs (l_dae, mae and l_dae_masked), a
planted collapse (a weight decay that leaves the encoder almost no weights) and a planted
standstill (a learning rate a billion times too low). Finished runs are kept: run the same command
again to resume.

The curve of a healthy run becomes a reference of `ldae curves --beside l_dae-demo` by
python tools/reference_curve.py runs/watching/healthy-l_dae l_dae-demo
"""

import argparse
from pathlib import Path

from ldae import tree
from ldae.commands.demo import DATA
from ldae.commands.pretrain import pretrain
from ldae.files import write_json
from ldae.pretraining import recipes
from ldae.runs.environment import environment
from ldae.runs.metrics import read_records
from ldae.runs.symptoms import RANKME, SPREAD, new_symptoms

RUNS = {
    "healthy-l_dae": ("l_dae", {}),
    "healthy-mae": ("mae", {}),
    "healthy-l_dae_masked": ("l_dae_masked", {}),
    "collapse": ("l_dae", {"optim.weight_decay": 400.0}),
    "standstill": ("l_dae", {"optim.blr": 2e-12}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=2.5)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {name: reported(args.runs / name, *RUNS[name], args.epochs) for name in args.only}
    if args.out:
        write_json(args.out, {"runs": found, "environment": environment()})


def reported(run: Path, row: str, changes: dict, epochs: float) -> dict:
    """Train a run, and return what it measured and reported."""
    shared = {"data.source": DATA, "optim.epochs": epochs}
    pretrain(tree.replace(recipes.config(row, "demo"), shared | changes), run, row)
    records = read_records(run)
    reports = [
        {"images": record["images"], "sentence": sentence}
        for place, record in enumerate(records)
        for sentence in new_symptoms(records[: place + 1])
    ]
    print(f"{run.name}: {reports or 'nothing reported'}", flush=True)
    names = ("images", "epoch", "loss", RANKME, SPREAD)
    measured = [{name: r[name] for name in names} for r in records if RANKME in r]
    return {"row": row, "changes": changes, "reports": reports, "measured": measured}


if __name__ == "__main__":
    main()
