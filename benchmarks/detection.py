"""Compare detectors on a pre-trained backbone with those on its untrained control.

python benchmarks/detection.py [BACKBONE] [--seeds 3] [settings of ldae detect]

The detectors differ only in --random-init: recipe, images, seed and order are the same. Without
BACKBONE, an l-DAE is pre-trained first, at scale demo on the images of the scenes. The commands are
printed. Run this command again to resume. The file --out gets the average precisions of all
detectors so far, their minutes, and the differences in AP50.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from benchmarks.command import run_ldae, seconds_of
from ldae.files import write_json
from ldae.runs import layout
from ldae.runs.environment import environment
from ldae.runs.metrics import read_records

_STARTS = {"trained": [], "control": ["--random-init"]}
_DATA = "digit-scenes"
_PRETRAINING = [
    "l_dae", "--scale", "demo", "--data", f"{_DATA}:20000", "--data.img-size", "64",
    "--optim.epochs", "4",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone", nargs="?")
    parser.add_argument("--data", default=_DATA)
    parser.add_argument("--recipe", default="scenes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/detection"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/detection.json"))
    args, settings = parser.parse_known_args()
    backbone = args.backbone or str(args.runs / "backbone")
    if not args.backbone:
        run_ldae("pretrain", *_PRETRAINING, "--run", backbone)
    rows: list[dict] = []
    for seed in range(args.seeds):
        for start, words in _STARTS.items():
            run = args.runs / f"{start}-{seed}"
            if not (run / layout.RESULTS).exists():
                how = ["--recipe", args.recipe, "--data", args.data, "--seed", seed, *settings]
                run_ldae("detect", backbone, *how, *words, "--run", run)
            rows.append({"start": start, "seed": seed} | measured(run))
            write_json(args.out, record(rows))
    for row in rows:
        print(row)
    print(record(rows)["above_the_control"])


def measured(run: Path) -> dict:
    """Return the results of a run, and the minutes that its training took."""
    return {
        "results": json.loads((run / layout.RESULTS).read_text())["results"],
        "images": read_records(run)[-1]["images"],
        "minutes_of_training": round(seconds_of(run) / 60, 2),
    }


def record(rows: list[dict]) -> dict:
    """Return the rows, and by seed by how many points AP50 is above that of the control."""
    differences = {}
    for name in ("box_ap50", "mask_ap50"):
        scores = {(row["start"], row["seed"]): row["results"].get(name) for row in rows}
        found = [
            score - scores["control", seed]
            for (start, seed), score in scores.items()
            if start == "trained" and score is not None and ("control", seed) in scores
        ]
        if found:
            differences[name] = {"mean": mean(found), "least": min(found), "by_seed": found}
    return {"rows": rows, "above_the_control": differences, "environment": environment()}


if __name__ == "__main__":
    main()
