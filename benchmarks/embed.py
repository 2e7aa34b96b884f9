"""Kill ``ldae embed`` at random moments, compare its end with an undisturbed one, measure memory.

python benchmarks/embed.py [--images 100000] [--kills 3] [--ranks 1] [--seed 0] [--out FILE]

The features are the outputs of four blocks of an untrained ViT-S on 32 x 32 images, 3,072 numbers
each, so those of 100,000 images take 1.2 GB. The command and all of its processes are killed by
SIGKILL at random moments after they have written a block, and the same command resumes. In the end
the three files must be equal byte for byte, apart from the command in the record. Memory is the
proportional set size (PSS) of all processes together, read up to twenty times a second. Its peak
may grow by 200 MB from 1,000 images on.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.soak import family, send
from ldae.console import progress
from ldae.files import file_hash, write_json
from ldae.runs import layout
from ldae.runs.environment import environment

BACKBONE = [
    *("vit_small_patch16_224", "--random-init", "--img-size", "32"),
    *("--blocks", "-4", "-3", "-2", "-1", "--pools", "cls", "avg"),
]
MOST_GROWTH = 200  # MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--few", type=int, default=1_000, help="images of the first measurement")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, help="of the moments; by default a new one")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/embed.json"))
    args = parser.parse_args()
    seed = random.randrange(2**32) if args.seed is None else args.seed
    with tempfile.TemporaryDirectory() as folder:
        record = measure(Path(folder), args, random.Random(seed))
    record |= {"ranks": args.ranks, "workers": args.workers, "seed": seed}
    write_json(args.out, record | {"environment": environment(args.device)})
    print(json.dumps(record))
    if not record["equal"] or record["growth_mb"] > MOST_GROWTH:
        sys.exit("the features differ, or memory grows")


def measure(folder: Path, args: argparse.Namespace, moments: random.Random) -> dict:
    few, _ = run(folder / "few" / "a.npy", args.few, args)
    whole = folder / "whole" / "a.npy"
    many, seconds = run(whole, args.images, args)
    files, kills = [folder / "0" / "a.npy"], []
    with progress(args.kills, "kills") as bar:
        while len(kills) < args.kills:
            moment = moments.uniform(0, seconds / args.kills / 2)
            if run(files[-1], args.images, args, moment):  # it has ended before
                files.append(folder / str(len(files)) / "a.npy")
                continue
            kills.append({"seconds": round(moment, 2), "blocks": blocks_of(files[-1])})
            bar.update()
    run(files[-1], args.images, args)
    return {
        "what": f"features of {args.images:,} images, {whole.stat().st_size / 1e9:.2f} GB",
        "equal": all(contents(path) == contents(whole) for path in files),
        "kills": kills,
        "undisturbed_seconds": round(seconds, 1),
        "peak_mb": {f"{args.few:,} images": few, f"{args.images:,} images": many},
        "growth_mb": round(many - few, 1),
    }


def run(
    out: Path, images: int, args: argparse.Namespace, moment: float = float("inf")
) -> tuple[float, float] | None:
    """Embed so many images, or go on; return the peak of memory in MB, and seconds.

    It is killed ``moment`` seconds after its first block. Then the result is None.
    """
    launcher = f"torch.distributed.run --standalone --nproc-per-node={args.ranks} -m --".split()
    command = [
        *(sys.executable, "-m", *(launcher if args.ranks > 1 else [])),
        *("ldae", "embed", *BACKBONE[:1], f"scattered-digits:{images}", *BACKBONE[1:]),
        *("--split", "train", "--out", str(out), "--device", args.device),
        *("--batch-size", str(args.batch_size), "--workers", str(args.workers)),
    ]
    before, first, peak, started = blocks_of(out), None, 0.0, time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C stops only this script
        )
        try:
            while process.poll() is None:
                if first is None and blocks_of(out) > before:
                    first = time.monotonic()
                if first is not None and time.monotonic() - first > moment:
                    return None
                peak = max(peak, sum(map(proportional_set_size, family(process.pid))))
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                send(signal.SIGKILL, process.pid)
                process.wait()
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{output.read()}")
    return round(peak, 1), time.monotonic() - started


def blocks_of(out: Path) -> int:
    """Return how many blocks an unfinished command has written."""
    log = out.with_name(f"{out.name}.parts") / layout.EMBEDDED
    with suppress(FileNotFoundError):
        return log.read_text().count("\n") - 1
    return 0


def proportional_set_size(process: int) -> float:
    """Return the PSS of a process in MB, 0 if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
        return int(re.search(r"^Pss: +(\d+) kB", text, re.M)[1]) / 1e3
    return 0.0


def contents(out: Path) -> list:
    """Return the content of the files of ``out`` that must be equal."""
    record = json.loads(out.with_suffix(".json").read_text())
    del record["environment"]["command"]
    return [file_hash(out), file_hash(out.with_suffix(".csv")), record]


if __name__ == "__main__":
    main()
