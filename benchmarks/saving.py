"""Measure the time of a checkpoint, how long it stalls training, and the start of a run.

python benchmarks/saving.py [--model NAME] [--device cpu] [--out FILE]

The real loop trains on synthetic images and saves regularly. The time of a step is the time between
two records. A step is quiet when no checkpoint was being written. The stall is the additional time
of a step that begins a save: training waits only for the copy of the state.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import ldae
from benchmarks.step import batches, prepare
from ldae import devices, tree
from ldae.data.open import open_source
from ldae.files import write_json
from ldae.machine.timing import synchronize
from ldae.runs.checkpoints import Checkpoints, read
from ldae.runs.environment import environment
from ldae.runs.metrics import Metrics
from ldae.settings import Config
from ldae.train.loop import Loop
from ldae.train.plan import Plan
from ldae.tree import replace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--depth", type=int, default=6, help="blocks of the encoder")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--between", type=int, default=6, help="steps between saves, about")
    parser.add_argument("--no-start", action="store_true", help="do not measure the starts of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/saving.json"))
    args = parser.parse_args()

    config = replace(
        ldae.config("l_dae"),
        {
            "data.source": "scattered-digits:2000",
            "data.img_size": args.img_size,
            "model.name": args.model,
            "model.depth": args.depth,
            "tokenizer.fit_images": 500,
            "optim.batch_size": args.batch_size,
            "system.workers": args.workers,
            "system.device": args.device,
            "system.log_every": 1,
        },
    )
    device = devices.device_for(args.device)
    steps, writes, record = saves(config, device, args.saves, args.between)
    quiet, first, during = classify_steps(steps, writes)
    usual = statistics.median(quiet)
    record |= {
        "what": f"{args.model}, depth {args.depth} + {args.depth}, {args.img_size} px, batch "
        f"{args.batch_size}, float32 weights and two moments",
        "step_seconds": round(usual, 4),
        "stall_seconds": [round(seconds - usual, 4) for seconds in first],
        "stall_in_steps_median": round(statistics.median(first) / usual - 1, 3),
        "step_while_writing_over_quiet": round(statistics.median(during) / usual, 3)
        if during
        else None,
        "write_seconds": [round(end - begin, 3) for begin, end in writes],
        "quiet_steps": len(quiet),
    }
    if not args.no_start:
        record |= {"start": starts(config)}
    write_json(args.out, record | {"environment": environment(device)})
    print(record)


def saves(config: Config, device: torch.device, count: int, between: int):
    """Return the ends of steps, the (start, end) of writes, and the facts of a checkpoint."""
    source = open_source(config.data.source, "train")
    method, compiled = prepare(config, device, source)
    size = config.optim.batch_size
    ends: list[float] = []
    writes: list[tuple[float, float]] = []

    class Timed(Metrics):
        def write(self, record: dict) -> None:
            synchronize(device)
            ends.append(time.perf_counter())

    class Watched(Checkpoints):
        def save(self, state: dict) -> Path:
            begin = time.perf_counter()
            path = super().save(state)
            writes.append((begin, time.perf_counter()))
            return path

    with tempfile.TemporaryDirectory() as folder:

        def train(until: int, minutes: float) -> None:
            system = replace(config, {"system.save_minutes": minutes}).system
            Loop(
                method,
                batches(config, source, device),
                Plan(epoch=len(source), total=until * size, batch_size=size, micro_batches=1),
                config.optim,
                system,
                device=device,
                checkpoints=Watched(Path(folder), keep=1),
                open_metrics=lambda seen: Timed(Path(folder), seen),
                describe={},
                compiled=compiled,
            ).train()

        train(between, 1e9)  # burn-in, and the time of a step
        step = (ends[-1] - ends[1]) / (len(ends) - 2)
        ends.clear(), writes.clear()
        train(between * (count + 2), between * step / 60)
        (path,) = Checkpoints(Path(folder)).paths()
        begin = time.perf_counter()
        read(path)
        record = {
            "megabytes": round(path.stat().st_size / 1e6, 1),
            "read_and_checked_seconds": round(time.perf_counter() - begin, 3),
        }
    return ends, writes[:-1], record  # the loop waits for the last write


def classify_steps(ends: list[float], writes: list[tuple[float, float]]):
    """Return the seconds of quiet steps, steps that began a save, and others during a write."""
    quiet, first, during = [], [], []
    for begin, end in itertools.pairwise(ends[1:]):  # the first step of a run is slow
        seconds = end - begin
        if any(begin <= start < end for start, _ in writes):
            first.append(seconds)
        elif any(start < end and begin < stop for start, stop in writes):
            during.append(seconds)
        else:
            quiet.append(seconds)
    return quiet, first, during


def starts(config: Config) -> dict[str, float]:
    """Return the seconds from the command to the line of its first step, new and resumed."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "start.yaml")
        file.write_text(tree.to_yaml(replace(config, {"system.save_minutes": 0.0})))
        command = [sys.executable, "-m", "ldae", "pretrain", str(file), "--run", f"{folder}/run"]
        for name in ("new", "resumed"):
            begin = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                if "images/s" in line:
                    break
            seconds[f"{name}_seconds"] = round(time.perf_counter() - begin, 2)
            process.terminate()  # the run saves and ends
            process.communicate()
    return seconds


if __name__ == "__main__":
    main()
