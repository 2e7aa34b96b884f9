"""Kill a small run again and again, at random moments, and compare what it ends with.

python benchmarks/soak.py [--kills 50] [--ranks 1] [--seed 0] [--out FILE]

An undisturbed run is the reference. The other one is killed, by SIGKILL and by SIGTERM in turn: by
turns at a moment after its first line of progress, while a checkpoint is being written, and before it
has trained at all; then the same command goes on. After each kill every checkpoint that is there must
be whole. In the end weights, average, moments and metrics must be those of the reference, bit for bit.
The time that a kill costs is what the disturbed run took longer, over the number of kills: it is
starting up again, and the steps since the last checkpoint.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

import ldae
from ldae import tree
from ldae.console import progress
from ldae.files import PARTIAL, write_json
from ldae.runs.checkpoints import Checkpoints, read
from ldae.runs.environment import environment
from ldae.runs.layout import LOCK

SETTINGS = {
    "data.source": "scattered-digits:500",
    "tokenizer.fit_images": 500,
    "model.patch_size": 8,
    "model.embed_dim": 64,
    "optim.batch_size": 32,
    "optim.warmup_epochs": 0.5,
    "optim.ema": 0.99,
    "system.device": "cpu",
    "system.precision": "fp32",
    "system.workers": 1,
    "system.log_every": 1,
    "system.keep": 2,
}
WHEN = ("training", "saving", "starting", "saving", "training")
HOW = ("SIGKILL", "SIGTERM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps-a-kill", type=int, default=40, help="length of the run")
    parser.add_argument(
        "--save-steps", type=float, default=4, help="about, between two checkpoints"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the moments; none: new ones")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/soak.json"))
    asked = parser.parse_args()
    seed = random.randrange(2**32) if asked.seed is None else asked.seed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    with tempfile.TemporaryDirectory() as folder:
        try:
            record = soak(Path(folder), asked, random.Random(seed))
        finally:
            for process in Run.processes:
                if process.poll() is None:
                    send(signal.SIGKILL, process.pid)
    record |= {"ranks": asked.ranks, "seed": seed, "environment": environment("cpu")}
    write_json(asked.out, record)
    print(
        json.dumps(
            {key: part for key, part in record.items() if key not in ("kills", "environment")}
        )
    )
    if not record["equal"] or record["damaged_checkpoints"] or record["left_over_files"]:
        sys.exit("the soak failed")


def soak(folder: Path, asked: argparse.Namespace, moments: random.Random) -> dict:
    batch = SETTINGS["optim.batch_size"]
    epochs = asked.kills * asked.steps_a_kill * batch / 500
    config = tree.replace(ldae.config("l_dae", "demo"), SETTINGS | {"optim.epochs": epochs})
    file = folder / "soak.yaml"
    file.write_text(tree.to_yaml(tree.replace(config, {"system.save_minutes": 1e9})))
    calm = Run(folder / "calm", file, asked.ranks)
    undisturbed = calm.to_end()
    steps = json.loads(calm.metrics()[-1])["images"] // batch
    often = {"system.save_minutes": asked.save_steps * undisturbed / steps / 60}
    file.write_text(tree.to_yaml(tree.replace(config, often)))

    kills, runs, damaged, left, equal, disturbed = [], 0, 0, [], True, 0.0
    with progress(asked.kills, "kills") as bar:
        while len(kills) < asked.kills:  # a run that comes to its end is followed by another
            run, runs, started = (
                Run(folder / str(runs), file, asked.ranks),
                runs + 1,
                time.monotonic(),
            )
            while len(kills) < asked.kills:
                when = WHEN[len(kills) % len(WHEN)]
                how = (signal.SIGKILL, signal.SIGTERM)[len(kills) // 2 % 2]
                killed = run.killed(how, when, moments)
                damaged += sum(not whole(path) for path in Checkpoints(run.folder).paths())
                if killed is None:
                    break
                kills.append(killed)
                bar.update()
            run.to_end()
            disturbed += time.monotonic() - started
            one, two = (Checkpoints(part.folder).load() for part in (calm, run))
            equal &= same(one, two) and calm.told() == run.told()
            left += [
                str(path.relative_to(folder))
                for path in run.folder.rglob("*")
                if path.name.endswith(PARTIAL) or path.name == LOCK
            ]
    lost = {name: [kill["lost_images"] for kill in kills if kill["signal"] == name] for name in HOW}
    return {
        "what": f"kills of a small pre-training of {steps} steps on a CPU, and the same command again",
        "counted": len(kills),
        "during_a_save": sum(kill["during_a_save"] for kill in kills),
        "runs": runs,
        "equal": equal,
        "damaged_checkpoints": damaged,
        "left_over_files": left,
        "undisturbed_seconds": round(undisturbed, 2),
        "seconds_a_kill": round((disturbed - runs * undisturbed) / len(kills), 2),
        "steps_lost_a_kill": {
            name: round(statistics.mean(found) / batch, 2) for name, found in lost.items() if found
        },
        "kills": kills,
    }


class Run:
    """A command, and the process that obeys it now."""

    processes: list[subprocess.Popen] = []  # of all runs

    def __init__(self, folder: Path, file: Path, ranks: int) -> None:
        self.folder, self.trained = folder, False
        launcher = [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "-m",
            "--",
        ]
        self.command = [sys.executable, "-m", *(launcher if ranks > 1 else [])]
        self.command += ["ldae", "pretrain", str(file), "--run", str(folder)]

    def start(self) -> None:
        self.lines: list[str] = []
        self.started = time.time()
        self.process = subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is of the soak
        )
        self.processes.append(self.process)
        self.reader = threading.Thread(target=lambda: self.lines.extend(self._read()), daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.trained = self.trained or "images/s" in line
            yield line

    def to_end(self) -> float:
        """Seconds that it took."""
        started = time.monotonic()
        self.start()
        self.end(0)
        return time.monotonic() - started

    def end(self, *statuses: int) -> None:
        """Raises: SystemExit with what the run said, when it ends in another way."""
        status = self.process.wait()
        self.reader.join(timeout=5)
        if status not in statuses:
            sys.exit(f"{' '.join(self.command)} ended with {status}:\n{''.join(self.lines)}")

    def killed(self, how: signal.Signals, when: str, moments: random.Random) -> dict | None:
        """Start, kill at a random moment, and tell what was lost; None if the run ended before."""
        self.trained = False
        self.start()
        if when == "starting":
            time.sleep(moments.uniform(0.2, 4))
        else:
            self._until(lambda: self.trained)
            time.sleep(moments.uniform(0, 0.5))
        if when == "saving":
            self._until(self._saves)
            time.sleep(moments.uniform(0, 0.003))
        saves = self._saves()
        if self.process.poll() is not None:
            self.end(0)
            return None
        send(how, self.process.pid)
        # Before its own handler is there, a signal ends a process as it ends any; torchrun says 1.
        self.end(0, 1, -how, 128 + how)
        told = [json.loads(line)["images"] for line in self.metrics()]
        kept = Checkpoints(self.folder).load()
        kept = kept["images_seen"] if kept else 0
        return {
            "signal": how.name,
            "when": when,
            "during_a_save": saves,
            "at_image": kept,
            "lost_images": max(0, max(told, default=0) - kept) if self.trained else 0,
        }

    def _until(self, happened) -> None:
        while not happened() and self.process.poll() is None:
            time.sleep(0.0005)

    def _saves(self) -> bool:
        """Whether a file is being written, and not the half of one that the kill before has left."""
        for path in (self.folder / "checkpoints").glob(f"*{PARTIAL}"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime > self.started:
                    return True
        return False

    def metrics(self) -> list[str]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.endswith("}")]

    def told(self) -> list[tuple]:
        records = map(json.loads, self.metrics())
        return [(record["images"], record["loss"], record["lr"]) for record in records]


def send(how: signal.Signals, process: int) -> None:
    """To a process and all below it: torchrun's ranks are in sessions of their own, and outlive it."""
    for one in list(family(process)):
        with suppress(ProcessLookupError):
            os.kill(one, how)


def family(process: int) -> Iterator[int]:
    yield process
    for threads in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            for child in threads.read_text().split():
                yield from family(int(child))


def whole(path: Path) -> bool:
    try:
        read(path)
    except Exception as error:
        print(f"{path} is damaged: {error}", flush=True)
        return False
    return True


def same(one: object, other: object) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


if __name__ == "__main__":
    main()
