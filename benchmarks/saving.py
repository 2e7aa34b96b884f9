"""How long a checkpoint takes, how long it stalls the training, and how long a run takes to start.

python benchmarks/saving.py [--model NAME] [--device cpu] [--out FILE]

The real loop trains on made-up images and saves now and then. A step's time is that between two
records; a step is quiet when nothing was written meanwhile. The stall is what the step that begins a
save takes longer than a quiet one: the copy of the state, which is all that the training waits for.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from step import batches, prepare, synchronize

import ldae
from ldae import distributed, tree
from ldae.data.open import open_source
from ldae.files import write_json
from ldae.runs.checkpoints import Checkpoints, read
from ldae.runs.environment import environment
from ldae.runs.metrics import Metrics
from ldae.settings import Config
from ldae.train.loop import Loop, Plan
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
    parser.add_argument("--between", type=int, default=6, help="steps between two saves, about")
    parser.add_argument("--no-start", action="store_true", help="leave out the starts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/saving.json"))
    asked = parser.parse_args()

    config = replace(
        ldae.config("l_dae"),
        {
            "data.source": "scattered-digits:2000",
            "data.img_size": asked.img_size,
            "model.name": asked.model,
            "model.depth": asked.depth,
            "tokenizer.fit_images": 500,
            "optim.batch_size": asked.batch_size,
            "system.workers": asked.workers,
            "system.device": asked.device,
            "system.log_every": 1,
        },
    )
    device = distributed.device_for(asked.device)
    steps, writes, record = saves(config, device, asked.saves, asked.between)
    quiet, first, during = told_apart(steps, writes)
    usual = statistics.median(quiet)
    record |= {
        "what": f"{asked.model}, depth {asked.depth} + {asked.depth}, {asked.img_size} px, batch "
        f"{asked.batch_size}, float32 weights and two moments",
        "step_seconds": round(usual, 4),
        "stall_seconds": [round(seconds - usual, 4) for seconds in first],
        "stall_in_steps_median": round(statistics.median(first) / usual - 1, 3),
        "step_while_writing_over_quiet": round(statistics.median(during) / usual, 3)
        if during
        else None,
        "write_seconds": [round(end - begin, 3) for begin, end in writes],
        "quiet_steps": len(quiet),
    }
    if not asked.no_start:
        record |= {"start": starts(config)}
    write_json(asked.out, record | {"environment": environment(device)})
    print(record)


def saves(config: Config, device: torch.device, count: int, between: int):
    """Ends of steps, begins and ends of writes, and the size of the state and its reading."""
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

        def go_on(until: int, minutes: float) -> None:
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

        go_on(between, 1e9)  # burns in, and tells the time of a step
        step = (ends[-1] - ends[1]) / (len(ends) - 2)
        ends.clear(), writes.clear()
        go_on(between * (count + 2), between * step / 60)
        (path,) = Checkpoints(Path(folder)).paths()
        begin = time.perf_counter()
        read(path)
        record = {
            "megabytes": round(path.stat().st_size / 1e6, 1),
            "read_and_checked_seconds": round(time.perf_counter() - begin, 3),
        }
    return ends, writes[:-1], record  # the last one is waited for


def told_apart(ends: list[float], writes: list[tuple[float, float]]):
    """Seconds of quiet steps, of those that began a save, and of the others during a write."""
    quiet, first, during = [], [], []
    for begin, end in zip(ends[1:], ends[2:]):  # the first step of a run is slow
        seconds = end - begin
        if any(begin <= start < end for start, _ in writes):
            first.append(seconds)
        elif any(start < end and begin < stop for start, stop in writes):
            during.append(seconds)
        else:
            quiet.append(seconds)
    return quiet, first, during


def starts(config: Config) -> dict[str, float]:
    """Seconds from the command to its first step's line: of a new run, and of one that goes on."""
    found = {}
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
            found[f"{name}_seconds"] = round(time.perf_counter() - begin, 2)
            process.terminate()  # saves, and ends
            process.communicate()
    return found


if __name__ == "__main__":
    main()
