r"""Compare the scale auto with the fixed scales: a linear probe after so many minutes a run.

python benchmarks/recipe.py --runs runs/recipe --set NAME TRAIN EVAL [--set ...] [--plans-only] \
    [--minutes 20] [--seeds 3] [--scales auto demo small] [--row l_dae_masked] [--out FILE]

At first a plan is made for each set: the scale auto chooses its settings, and the speeds of all
scales are measured, in turns, because the speed of a machine drifts. From its speed each scale gets
its length, as the scale auto computes it. So the scales differ in nothing but the choice. Make the
plans, --plans-only, on a machine that does nothing else. They are kept in --runs, and decide how
many images a run sees, at any later speed.

Each run is graded once on EVAL by a linear probe on all labels of TRAIN. Finished runs and gradings
are kept: run the same command again to resume. --out has the plans, a row for each run, and for
each set the mean of auto less that of the best fixed scale.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import ldae
from ldae import tree
from ldae.auto import facts, rule
from ldae.auto.rule import Images
from ldae.auto.scale import SETTINGS, decide
from ldae.data.open import open_source
from ldae.devices import device_for
from ldae.evals.evaluation import Setup
from ldae.files import write_json
from ldae.pretraining.recipes import find
from ldae.runs import layout
from ldae.runs.environment import environment

AUTO = "auto"
TURNS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument(
        "--set", nargs=3, action="append", required=True, metavar=("NAME", "TRAIN", "EVAL")
    )
    parser.add_argument("--plans-only", action="store_true")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scales", nargs="+", default=[AUTO, "demo", "small"])
    parser.add_argument("--row", default="l_dae_masked")
    parser.add_argument("--probe-epochs", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recipe.json"))
    args = parser.parse_args()

    plans = {name: kept_plan(args, name, train) for name, train, _ in args.set}
    rows: list[dict] = []
    for seed in range(0 if args.plans_only else args.seeds):
        for name, train, evaluation in args.set:
            for scale in args.scales:
                run = args.runs / f"{name}-{scale}-seed{seed}"
                config = configured(args, scale, train, plans[name][scale]["settings"], seed)
                found = measure(args, config, run, evaluation)
                rows.append({"set": name, "scale": scale, "seed": seed} | found)
                print(rows[-1], flush=True)
                write_json(args.out, record(args, plans, rows))


def configured(
    args: argparse.Namespace, scale: str, train: str, settings: dict[str, Any], seed: int = 0
) -> Any:
    """Return the recipe at a scale with the settings of its plan."""
    changes = {"data.source": train, "system.device": args.device, "seed": seed, **settings}
    return ldae.config(args.row, "paper" if scale == AUTO else scale, changes=changes)


def kept_plan(args: argparse.Namespace, name: str, train: str) -> dict[str, dict[str, Any]]:
    """Return for each scale its settings on a set and its images a second; made once, then kept."""
    path = args.runs / f"{name}-plan.json"
    if not path.exists():
        write_json(path, plan(args, train))
    return json.loads(path.read_text())


def plan(args: argparse.Namespace, train: str) -> dict[str, dict[str, Any]]:
    """Return for each scale its settings on the train images and its images a second."""
    hours, device = args.minutes / 60, device_for(args.device)
    settings: dict[str, dict[str, Any]] = {scale: {} for scale in args.scales}
    if AUTO in args.scales:
        kind, _ = find(args.row)
        before = configured(args, AUTO, train, {})
        decided = tree.flatten(decide(before, args.runs / "undecided", kind, args.row, hours))
        settings[AUTO] = {name: decided[name] for name in SETTINGS if name in decided}
    configs = {scale: configured(args, scale, train, settings[scale]) for scale in args.scales}
    steps: dict[str, list[float]] = {scale: [] for scale in args.scales}
    for turn in range(TURNS):
        for scale, config in configs.items():
            steps[scale].append(facts.measure_step(config, device).images_per_second)
            print(f"turn {turn + 1}, {scale}: {steps[scale][-1]:,.0f} images/s", flush=True)
    source = open_source(train, "train")
    found = {}
    for scale, config in configs.items():
        side, decode = facts.median_side(source, config), facts.decode_seconds(source, config)
        images = Images(len(source), side, decode)
        step = statistics.median(steps[scale])
        pace = rule.pace(step, images, facts.machine_of_rank(device))
        epochs = rule.choose_epochs(pace, hours, images).value
        length = {"optim.epochs": epochs, "optim.warmup_epochs": rule.choose_warmup(epochs).value}
        found[scale] = {"settings": settings[scale] | length, "images_per_second": round(pace, 1)}
    return found


def measure(args: argparse.Namespace, config: Any, run: Path, evaluation: str) -> dict[str, Any]:
    """Return the accuracy of a run, after its training and grading, and the images that it saw."""
    opened = ldae.pretrain(config, run, args.row)
    graded = run / layout.EVALS / "linear"
    if not (graded / layout.RESULTS).exists():
        ldae.linear(
            run,
            config.data.source,
            evaluation,
            protocol=ldae.CachedProtocol(epochs=args.probe_epochs),
            setup=Setup(out=graded, device=args.device),
        )
    results = json.loads((graded / layout.RESULTS).read_text())["results"]
    return {"linear": round(results["top1"], 2), "images": opened.images_seen}


def record(args: argparse.Namespace, plans: dict[str, Any], rows: list[dict]) -> dict:
    return {
        "what": f"{args.row}, {args.minutes:g} minutes a run; top-1 of a linear probe in percent",
        "minutes": args.minutes,
        "plans": plans,
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
