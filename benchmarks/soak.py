"""Kill a small run many times at random moments, and compare its end with an undisturbed run.

python benchmarks/soak.py [--kills 50] [--ranks 1] [--seed 0] [--out FILE]

The run is killed by SIGKILL and by SIGTERM, in turn after its first line of progress, while it
writes a checkpoint, and before it has trained; then the same command resumes it. After each kill
every checkpoint must be readable. In the end weights, average, optimizer moments and metrics must
equal the undisturbed run bit for bit. The cost of a kill is the additional time of the disturbed
run over the number of kills: start-up, and the steps since the last checkpoint.
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
from ldae.runs.layout import CHECKPOINTS, LOCK
from ldae.runs.metrics import read_records

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
    parser.add_argument("--save-steps", type=float, default=4, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, help="of the moments; by default a new one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/soak.json"))
    args = parser.parse_args()
    seed = random.randrange(2**32) if args.seed is None else args.seed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    with tempfile.TemporaryDirectory() as folder:
        try:
            record = soak(Path(folder), args, random.Random(seed))
        finally:
            for process in Run.processes:
                if process.poll() is None:
                    send(signal.SIGKILL, process.pid)
    record |= {"ranks": args.ranks, "seed": seed, "environment": environment("cpu")}
    write_json(args.out, record)
    print(json.dumps({key: record[key] for key in record if key not in ("kills", "environment")}))
    if not record["equal"] or record["damaged_checkpoints"] or record["left_over_files"]:
        sys.exit("the soak failed")


def soak(folder: Path, args: argparse.Namespace, moments: random.Random) -> dict:
    batch = SETTINGS["optim.batch_size"]
    epochs = args.kills * args.steps_a_kill * batch / 500
    config = tree.replace(ldae.config("l_dae", "demo"), SETTINGS | {"optim.epochs": epochs})
    file = folder / "soak.yaml"
    file.write_text(tree.to_yaml(tree.replace(config, {"system.save_minutes": 1e9})))
    undisturbed = Run(folder / "undisturbed", file, args.ranks)
    seconds = undisturbed.to_end()
    steps = read_records(undisturbed.folder)[-1]["images"] // batch
    often = {"system.save_minutes": args.save_steps * seconds / steps / 60}
    file.write_text(tree.to_yaml(tree.replace(config, often)))

    kills, runs, damaged, left, equal, disturbed = [], 0, 0, [], True, 0.0
    with progress(args.kills, "kills") as bar:
        while len(kills) < args.kills:  # another run follows a run that ends
            run, started = Run(folder / str(runs), file, args.ranks), time.monotonic()
            runs += 1
            while len(kills) < args.kills:
                when = WHEN[len(kills) % len(WHEN)]
                how = signal.Signals[HOW[len(kills) // 2 % 2]]
                killed = run.kill(how, when, moments)
                damaged += sum(not readable(path) for path in Checkpoints(run.folder).paths())
                if killed is None:
                    break
                kills.append(killed)
                bar.update()
            run.to_end()
            disturbed += time.monotonic() - started
            states = (Checkpoints(part.folder).load() for part in (undisturbed, run))
            equal &= same(*states) and undisturbed.losses() == run.losses()
            left += [
                str(path.relative_to(folder))
                for path in run.folder.rglob("*")
                if path.name.endswith(PARTIAL) or path.name == LOCK
            ]
    lost = {name: [kill["lost_images"] for kill in kills if kill["signal"] == name] for name in HOW}
    return {
        "what": f"kills and resumptions of a small pre-training of {steps} steps on a CPU",
        "counted": len(kills),
        "during_a_save": sum(kill["during_a_save"] for kill in kills),
        "runs": runs,
        "equal": equal,
        "damaged_checkpoints": damaged,
        "left_over_files": left,
        "undisturbed_seconds": round(seconds, 2),
        "seconds_a_kill": round((disturbed - runs * seconds) / len(kills), 2),
        "steps_lost_a_kill": {
            name: round(statistics.mean(images) / batch, 2)
            for name, images in lost.items()
            if images
        },
        "kills": kills,
    }


class Run:
    """A run, and the process that now executes its command."""

    processes: list[subprocess.Popen] = []  # of all runs

    def __init__(self, folder: Path, file: Path, ranks: int) -> None:
        self.folder, self.trained = folder, False
        launcher = f"torch.distributed.run --standalone --nproc-per-node={ranks} -m --".split()
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
            start_new_session=True,  # Ctrl-C stops only this script
        )
        self.processes.append(self.process)
        self.reader = threading.Thread(target=lambda: self.lines.extend(self._read()), daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.trained = self.trained or "images/s" in line
            yield line

    def to_end(self) -> float:
        """Run to the end, and return the seconds."""
        started = time.monotonic()
        self.start()
        self.end(0)
        return time.monotonic() - started

    def end(self, *statuses: int) -> None:
        """Wait for the end; exit with the output of the run when its status is none of these."""
        status = self.process.wait()
        self.reader.join(timeout=5)
        if status not in statuses:
            sys.exit(f"{' '.join(self.command)} ended with {status}:\n{''.join(self.lines)}")

    def kill(self, how: signal.Signals, when: str, moments: random.Random) -> dict | None:
        """Start, kill at a random moment, and describe the kill; None if the run ended before."""
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
        # A signal before the handler is installed ends the process; torchrun then exits with 1.
        self.end(0, 1, -how, 128 + how)
        seen = [record["images"] for record in read_records(self.folder)]
        checkpoint = Checkpoints(self.folder).load()
        kept = checkpoint["images_seen"] if checkpoint else 0
        return {
            "signal": how.name,
            "when": when,
            "during_a_save": saves,
            "at_image": kept,
            "lost_images": max(0, max(seen, default=0) - kept) if self.trained else 0,
        }

    def _until(self, happened) -> None:
        while not happened() and self.process.poll() is None:
            time.sleep(0.0005)

    def _saves(self) -> bool:
        """Return whether a checkpoint is being written, ignoring what an earlier kill left."""
        for path in (self.folder / CHECKPOINTS).glob(f"*{PARTIAL}"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime > self.started:
                    return True
        return False

    def losses(self) -> list[tuple]:
        records = read_records(self.folder)
        return [(record["images"], record["loss"], record["lr"]) for record in records]


def send(how: signal.Signals, process: int) -> None:
    """Send a signal to a process and its descendants: torchrun's ranks have their own sessions."""
    for member in list(family(process)):
        with suppress(ProcessLookupError):
            os.kill(member, how)


def family(process: int) -> Iterator[int]:
    yield process
    for threads in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            for child in threads.read_text().split():
                yield from family(int(child))


def readable(path: Path) -> bool:
    try:
        read(path)
    except Exception as error:
        print(f"{path} is damaged: {error}", flush=True)
        return False
    return True


def same(one: object, other: object) -> bool:
    """Return whether two states are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


if __name__ == "__main__":
    main()
