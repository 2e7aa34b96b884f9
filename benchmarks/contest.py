r"""Compare methods of pre-training at equal wall clock, in one loop, by the same graders.

python benchmarks/contest.py leads --data TRAIN --runs runs/leads
python benchmarks/contest.py final --data TRAIN --eval-data TEST --runs runs/contest/NAME \
    [--minutes 10] [--seeds 3] [--only NAME ...] [settings of ldae pretrain]
python benchmarks/contest.py final ... --images N
python benchmarks/contest.py finetune ... --only NAME ...

``contest.toml`` names the contestants of the final, and the leads: settings that may win.

leads: each lead is trained for the same number of images on nine tenths of TRAIN and graded on the
other tenth, by one seed. The test split decides nothing.

final: each contestant is trained for the same wall clock, for as many images as it sees in
--minutes. Their speeds are measured first, on a machine that should do nothing else: they train in
turns, a little at a time. rates.json in --runs keeps the speeds, so that later seeds see as many
images on any machine. With --images each one sees that number of images instead. Then it is graded
on TEST once, by the mean of its patch tokens, beside raw pixels and its own architecture with
random weights.

finetune: the runs of the final, which are trained by then, are fine-tuned for five epochs by the
recipe of MAE, beside the architecture of each with random weights. The table of the final gets
their accuracy. Further settings are those of ldae finetune.

Finished runs and gradings are kept: run the same command again to resume. table.json and table.md
in --runs hold all numbers.
"""

import argparse
import io
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import run_ldae, seconds_of
from benchmarks.paired import bootstrap, correct
from benchmarks.seeds import mean_and_deviation
from ldae.data.open import open_source
from ldae.evals.features import image_names, known_labels
from ldae.evals.subsets import held_out
from ldae.files import write, write_json
from ldae.markdown import markdown_table
from ldae.runs import layout
from ldae.runs.environment import environment
from ldae.runs.metrics import read_records

CONTEST = Path(__file__).with_suffix(".toml")
# The speed of a machine drifts by more than contestants should differ, which turns even out.
TURNS = 6
SECONDS_OF_A_TURN = 30
RIVAL = "mae"
PIXELS = "pixels:32"
WARMUP = 0.1  # of the epochs
GRADERS = {
    "linear": ("linear", "--epochs", "20", "--predictions"),
    "knn": ("knn", "--k", "20", "--predictions"),
    "knn-whitened": ("knn", "--k", "20", "--whiten", "--predictions"),
    "ten-a-class": ("logreg", "--shots", "10", "--only-shots"),
}
HEADLINES = {
    "linear": "top1",
    "knn": "top1_k20",
    "knn-whitened": "top1_k20",
    "ten-a-class": "top1_10shot",
    "finetuned": "top1",
}
PREDICTIONS = {"linear": "top1", "knn": "k20", "knn-whitened": "k20"}
FINETUNED = "finetuned"  # its column and its folders
# MAE warms up for five epochs, which are all of these.
RECIPE = ("--recipe", "mae", "--optim.epochs", "5", "--optim.warmup-epochs", "0.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=("leads", "final", "finetune"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--contest", type=Path, default=CONTEST)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--graders", nargs="+", choices=GRADERS, default=list(GRADERS))
    parser.add_argument("--images", type=int, help="by default what --minutes allow")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    args, more = parser.parse_known_args()
    contest = tomllib.loads(args.contest.read_text())
    settings = [*flags(contest["settings"]), *more]
    if args.phase == "leads":
        args.images = args.images or contest["images_of_a_lead"]
        args.seeds, args.eval_data = 1, None
        args.data, args.eval_data = hold_out(args.data, args.runs)
    everyone = contest["leads" if args.phase == "leads" else "contestants"]
    words = words_of(everyone, settings)
    chosen = named(everyone, args.only)
    images = dict.fromkeys(chosen, args.images)
    if args.phase == "final" and not args.images:
        images = images_in_the_time(args, words, chosen)
    for seed in range(args.seeds):
        for name in chosen:
            run = run_of(args, name, seed)
            if args.phase == "finetune":
                finetune(args, more, run, seed)
            else:
                train(args.data, words[name], run, seed, images[name])
                grade(str(run), args, run / layout.EVALS)
                if args.phase == "final" and not seed:
                    grade(str(run), args, run / "untrained", "--random-init")
            write_table(args, everyone)
    if args.phase != "finetune":
        grade(PIXELS, args, args.runs / "pixels")
        write_table(args, everyone)


def named(entries: Sequence[dict], names: Sequence[str] | None) -> list[str]:
    """Return the names of contestants or leads, by default of all, and check that they exist."""
    known = [entry["name"] for entry in entries]
    if unknown := [name for name in names or () if name not in known]:
        raise SystemExit(f"there is no {unknown[0]!r}, but {', '.join(known)}")
    return [*(names or known)]


def words_of(entries: Sequence[dict], common: Sequence[str]) -> dict[str, list[str]]:
    """Return the row and the settings of each contestant or lead, as arguments of ldae pretrain."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for entry in entries:
        row, settings = found[entry["of"]] if "of" in entry else (entry["row"], {})
        found[entry["name"]] = row, settings | entry.get("settings", {})
    return {name: [row, *common, *flags(settings)] for name, (row, settings) in found.items()}


def flags(settings: dict[str, Any]) -> list[str]:
    """Return settings of ``ldae pretrain`` as its arguments."""
    words: list[str] = []
    for name, value in settings.items():
        *groups, leaf = name.replace("_", "-").split(".")
        flag = "--" + ".".join([*groups, f"no-{leaf}" if value is False else leaf])
        values = [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
        words += [flag, *map(str, values)]
    return words


def run_of(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Return the folder of the run of a contestant or a lead."""
    return args.runs / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}-seed{seed}"


def hold_out(data: str, folder: Path) -> tuple[str, str]:
    """Write nine tenths of the train images, and the other tenth, as two archives."""
    paths = folder / "nine-tenths.zip", folder / "tenth.zip"
    if not all(path.exists() for path in paths):
        source = open_source(data, "train")
        held = held_out(image_names(source), known_labels(source), 10)
        folder.mkdir(parents=True, exist_ok=True)
        for path, numbers in zip(paths, ((~held).nonzero(), held.nonzero())):
            partial = path.with_suffix(".partial")
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                for number in numbers[:, 0].tolist():
                    content = io.BytesIO()
                    source.image(number).save(content, "PNG")
                    label = source.classes[int(source.labels[number])]
                    archive.writestr(f"{label}/{number:07d}.png", content.getvalue())
            partial.rename(path)
    return str(paths[0]), str(paths[1])


def train(data: str, words: list[str], run: Path, seed: int, images: int) -> None:
    """Train a contestant for so many images, unless it is trained."""
    if not (run / "seconds.json").exists():
        epochs = images / len(open_source(data, "train"))
        common = ("--data", data, "--seed", seed, "--run", run)
        run_ldae("pretrain", *words, *length(epochs), *common)
        write_json(run / "seconds.json", {"images": images, "seconds": seconds_of(run)})


def images_in_the_time(
    args: argparse.Namespace, words: dict[str, list[str]], names: Sequence[str]
) -> dict[str, int]:
    """Return the images that each contestant sees in ``args.minutes``."""
    rates = kept_rates(args.runs)
    if missing := [name for name in dict.fromkeys([RIVAL, *names]) if name not in rates]:
        measured = calibrate(args, {name: words[name] for name in dict.fromkeys([RIVAL, *missing])})
        # Who comes later is measured beside the rival, maybe when the machine is slower.
        drift = rates.get(RIVAL, measured[RIVAL]) / measured[RIVAL]
        rates |= {name: round(measured[name] * drift, 2) for name in missing}
        write_json(args.runs / "rates.json", rates)
    return {name: round(60 * args.minutes * rates[name]) for name in names}


def kept_rates(runs: Path) -> dict[str, float]:
    """Return the images a second of each contestant that has been measured, by name."""
    path = runs / "rates.json"
    return json.loads(path.read_text()) if path.exists() else {}


def length(epochs: float) -> list[str]:
    return ["--optim.epochs", f"{epochs:.4f}", "--optim.warmup-epochs", f"{WARMUP * epochs:.4f}"]


def calibrate(args: argparse.Namespace, words: dict[str, list[str]]) -> dict[str, float]:
    """Return the images a second of each contestant. They train in turns, so that each resumes."""
    folder = args.runs / "calibration"
    shutil.rmtree(folder, ignore_errors=True)
    rates: dict[str, list[float]] = {name: [] for name in words}
    for turn in range(TURNS):
        for name, settings in words.items():
            common = ("--data", args.data, "--run", str(folder / name))
            command = ["pretrain", *settings, *length(1000), *common]
            print(f"$ ldae {' '.join(command)}  # turn {turn + 1} of {TURNS}", flush=True)
            rates[name] += take_turn(command, folder / name)
    shutil.rmtree(folder)
    return {name: statistics.harmonic_mean(found) for name, found in rates.items()}


def take_turn(command: list[str], run: Path) -> list[float]:
    """Let a contestant train for a while, and return the images a second of each new record.

    The first record does not count, because the step is compiled meanwhile.
    """
    before, begun = len(read_records(run)), None
    process = subprocess.Popen([sys.executable, "-m", "ldae", *command], stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            new = read_records(run)[before:]
            if begun is None and new:
                begun = time.monotonic()
            if begun and time.monotonic() - begun > SECONDS_OF_A_TURN and len(new) > 2:
                break
        else:
            raise SystemExit(f"ldae {' '.join(command)} ended during its calibration")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
    return [record["images_per_second"] for record in new[1:]]


def finetune(args: argparse.Namespace, words: list[str], run: Path, seed: int) -> None:
    """Fine-tune a run, and by the first seed its architecture with random weights."""
    if not (run / "seconds.json").exists():
        raise SystemExit(f"{run} is not trained: the phase final comes first")
    starts = {run / layout.EVALS: []}
    if not seed:
        starts[run / "untrained"] = ["--model.random-init"]
    data = ("--data", args.data, "--eval-data", args.eval_data, "--seed", seed)
    for folder, start in starts.items():
        out = folder / FINETUNED
        if not (out / layout.RESULTS).exists():
            run_ldae("finetune", run, *RECIPE, *words, *data, *start, "--run", out)


def grade(spec: str, args: argparse.Namespace, folder: Path, *more: str) -> None:
    """Grade a backbone, unless it is graded; its features are computed once, for all graders.

    All networks are compared by the mean of their patch tokens. By default a timm ViT such as MAE
    gives its class token, with which MAE is several points behind its own mean.
    """
    missing = [name for name in args.graders if not (folder / name / layout.RESULTS).exists()]
    train, test = folder / "train.npy", folder / "eval.npy"
    if missing:
        pooling = () if spec == PIXELS else ("--pools", "avg")
        for source, file in ((args.data, train), (args.eval_data, test)):
            run_ldae("embed", spec, source, *pooling, *more, "--out", file)
    for name in missing:
        verb, *words = GRADERS[name]
        run_ldae(verb, train, "--eval-data", test, *words, "--out", folder / name)


def write_table(args: argparse.Namespace, entries: Sequence[dict]) -> None:
    """Write the accuracies so far, and the differences to the rival where there are two seeds."""
    rows, rates = [], {} if args.phase == "leads" else kept_rates(args.runs)
    for entry in entries:
        runs = [run_of(args, entry["name"], seed) for seed in range(args.seeds)]
        runs = [run for run in runs if all_graded(args, run / layout.EVALS)]
        if runs:
            rows.append(row_of(args, entry["name"], [run / layout.EVALS for run in runs]))
            times = [json.loads((run / "seconds.json").read_text()) for run in runs]
            rows[-1] |= {key: [part[key] for part in times] for key in ("images", "seconds")}
            if entry["name"] in rates:
                rows[-1]["images_per_second"] = rates[entry["name"]]
        untrained = run_of(args, entry["name"], 0) / "untrained"
        if all_graded(args, untrained):
            rows.append(row_of(args, f"{entry['name']}, untrained", [untrained]))
    pixels = row_of(args, "raw pixels", [args.runs / "pixels"])
    if pixels["accuracies"]:  # ten a class take long, with thousands of features
        rows.append(pixels)
    against = {
        row["name"]: differences(args, row["name"])
        for row in rows
        if args.phase != "leads" and "images" in row and row["name"] != RIVAL
        if all_graded(args, run_of(args, RIVAL, 0) / layout.EVALS)
    }
    phase = "leads" if args.phase == "leads" else "final"
    record = {"phase": phase, "data": [args.data, args.eval_data], "rows": rows}
    record |= {"against_" + RIVAL: against, "environment": environment()}
    write_json(args.runs / "table.json", record)
    write(args.runs / "table.md", markdown(args, rows, against).encode())


def all_graded(args: argparse.Namespace, folder: Path) -> bool:
    return all((folder / name / layout.RESULTS).exists() for name in args.graders)


def row_of(args: argparse.Namespace, name: str, folders: Sequence[Path]) -> dict:
    """Return a row of the table, with the graders that have graded in all of its folders."""
    accuracies = {
        name: [accuracy(folder, name) for folder in folders]
        for name in (*args.graders, FINETUNED)
        if all((folder / name / layout.RESULTS).exists() for folder in folders)
    }
    return {"name": name, "accuracies": accuracies}


def accuracy(folder: Path, grader: str) -> float:
    """Return the accuracy of a grading in a folder of gradings, in percent."""
    results = json.loads((folder / grader / layout.RESULTS).read_text())["results"]
    return round(results[HEADLINES[grader]], 2)


def differences(args: argparse.Namespace, name: str) -> dict[str, dict]:
    """Return the differences to the rival: means, deviations of the seeds, and an interval."""
    found = {}
    for grader in set(args.graders) & PREDICTIONS.keys():
        pairs = []
        for contestant in (name, RIVAL):
            runs = [run_of(args, contestant, seed) for seed in range(args.seeds)]
            graded = [run / layout.EVALS / grader for run in runs]
            graded = [path for path in graded if (path / layout.RESULTS).exists()]
            seeds = [correct(path, PREDICTIONS[grader]) for path in graded]
            pairs.append((sum(seeds) / len(seeds), [100 * seed.mean() for seed in seeds]))
        (ours, our_seeds), (theirs, their_seeds) = pairs
        found[grader] = {
            "difference": round(100 * float((ours - theirs).mean()), 2),
            "interval": [round(end, 2) for end in bootstrap(ours, theirs)],
        }
        if min(len(our_seeds), len(their_seeds)) > 1:
            pooled = statistics.mean([statistics.variance(s) for s in (our_seeds, their_seeds)])
            found[grader]["pooled_deviation"] = round(pooled**0.5, 2)
    return found


def markdown(args: argparse.Namespace, rows: Sequence[dict], against: dict[str, dict]) -> str:
    graders = [*args.graders]
    if any(FINETUNED in row["accuracies"] for row in rows):
        graders.append(FINETUNED)
    has_rates = any("images_per_second" in row for row in rows)
    costs = ["images", *(["images/s in turns"] if has_rates else [])]
    table = []
    for row in rows:
        found = row["accuracies"]
        cells = [mean_and_deviation(found[name]) if name in found else "" for name in graders]
        cells.append(f"{statistics.mean(row['images']):,.0f}" if "images" in row else "")
        if has_rates:
            cells.append(f"{row['images_per_second']:,.0f}" if "images_per_second" in row else "")
        table.append([row["name"], *cells])
    text = markdown_table(["", *graders, *costs], table)
    for name, graders in against.items():
        for grader, found in graders.items():
            low, high = found["interval"]
            deviation = found.get("pooled_deviation", "unknown")
            text += (
                f"\n{name} minus {RIVAL}, {grader}: {found['difference']:+.2f} points; 95 % "
                f"interval over images {low:+.2f} to {high:+.2f}; pooled deviation of seeds "
                f"{deviation}.\n"
            )
    return text


if __name__ == "__main__":
    main()
