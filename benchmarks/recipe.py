r"""Compare the scale auto with the fixed scales: a linear probe after so many minutes a run.

python benchmarks/recipe.py --runs runs/recipe --set NAME TRAIN EVAL [--set ...] \
    [--minutes 20] [--seeds 3] [--scales auto demo small] [--row l_dae] [--out FILE]

A run of a fixed scale sees the images that fit into the minutes at its own pace, measured and
computed as the scale auto does it, with the same share of warm-up. So the two differ in nothing but
the choice. Each run is graded once on EVAL by a linear probe on all labels of TRAIN. The seconds
that a pre-training really took, with all that belongs to it, are in the table. Use a machine that
does nothing else.

Finished runs and gradings are kept: run the same command again to resume. --out has a row for each
run, and for each set the mean of auto less that of the best fixed scale.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import ldae
from ldae import tree
from ldae.auto import facts, rule
from ldae.auto.rule import Images
from ldae.data.open import open_source
from ldae.distributed import device_for
from ldae.evals.evaluation import Setup
from ldae.files import write_json
from ldae.runs import layout
from ldae.runs.environment import environment

AUTO = "auto"
CHOSEN = (
    "data.img_size",
    "model.patch_size",
    "model.depth",
    "model.embed_dim",
    "optim.batch_size",
    "optim.epochs",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument(
        "--set", nargs=3, action="append", required=True, metavar=("NAME", "TRAIN", "EVAL")
    )
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scales", nargs="+", default=[AUTO, "demo", "small"])
    parser.add_argument("--row", default="l_dae")
    parser.add_argument("--probe-epochs", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recipe.json"))
    args = parser.parse_args()

    rows: list[dict] = []
    for seed in range(args.seeds):
        for name, train, evaluation in args.set:
            for scale in args.scales:
                run = args.runs / f"{name}-{scale}-seed{seed}"
                found = measure(args, scale, run, train, evaluation, seed)
                rows.append({"set": name, "scale": scale, "seed": seed} | found)
                print(rows[-1], flush=True)
                write_json(args.out, record(args, rows))


def measure(
    args: argparse.Namespace, scale: str, run: Path, train: str, evaluation: str, seed: int
) -> dict:
    """Return the accuracy of a run at a scale, its seconds and what it is like."""
    timed, graded = run / "seconds.json", run / layout.EVALS / "linear"
    if not timed.exists():
        begun = time.monotonic()
        pretrain(args, scale, run, train, seed)
        write_json(timed, {"seconds": round(time.monotonic() - begun, 1)})
    if not (graded / layout.RESULTS).exists():
        ldae.linear(
            run,
            train,
            evaluation,
            protocol=ldae.CachedProtocol(epochs=args.probe_epochs),
            setup=Setup(out=graded, device=args.device),
        )
    opened = ldae.load_run(run, args.device)
    settings = tree.flatten(opened.config)
    return {
        "linear": round(json.loads((graded / layout.RESULTS).read_text())["results"]["top1"], 2),
        **json.loads(timed.read_text()),
        "images": opened.images_seen,
        "settings": {name: settings[name] for name in CHOSEN},
    }


def pretrain(args: argparse.Namespace, scale: str, run: Path, train: str, seed: int) -> None:
    """Pre-train in the folder ``run`` for the minutes, by the scale auto or a fixed one."""
    hours = args.minutes / 60
    changes = {"data.source": train, "system.device": args.device, "seed": seed}
    if scale == AUTO:
        config = ldae.config(args.row, changes=changes)
        ldae.pretrain(config, run, scale=AUTO, hours=hours)
        return
    config = ldae.config(args.row, scale, changes=changes)
    path = run.with_name(f"{run.name}.json")  # beside the folder, for a run that resumes
    if not path.exists():
        write_json(path, length(config, hours))
    ldae.pretrain(tree.replace(config, json.loads(path.read_text())), run)


def length(config: Any, hours: float) -> dict[str, float]:
    """Return the epochs of a fixed scale that fit into the hours, and those of warm-up."""
    source, device = open_source(config.data.source, "train"), device_for(config.system.device)
    side = facts.median_side(source, config)
    images = Images(len(source), side, facts.decode_seconds(source, config))
    step = facts.measure_step(config, device).images_per_second
    pace = rule.pace(step, images, facts.describe_machine(device))
    epochs = rule.choose_epochs(pace, hours, images).value
    return {"optim.epochs": epochs, "optim.warmup_epochs": rule.choose_warmup(epochs).value}


def record(args: argparse.Namespace, rows: list[dict]) -> dict:
    return {
        "what": f"{args.row}, {args.minutes:g} minutes a run; top-1 of a linear probe in percent",
        "minutes": args.minutes,
        "rows": rows,
        "auto_less_best_fixed": differences(rows),
        "environment": environment(device_for(args.device)),
    }


def differences(rows: list[dict]) -> dict[str, dict[str, Any]]:
    """Return for each set the means of the scales, and the mean of auto less the best other one."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["set"] for row in rows):
        scales = dict.fromkeys(row["scale"] for row in rows if row["set"] == name)
        means = {
            scale: round(
                statistics.mean(
                    row["linear"] for row in rows if (row["set"], row["scale"]) == (name, scale)
                ),
                2,
            )
            for scale in scales
        }
        fixed = [mean for scale, mean in means.items() if scale != AUTO]
        found[name] = {"means": means}
        if AUTO in means and fixed:
            found[name]["difference"] = round(means[AUTO] - max(fixed), 2)
    return found


if __name__ == "__main__":
    main()
