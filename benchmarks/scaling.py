"""Measure images/s of `ldae pretrain` on one rank and on several.

python benchmarks/scaling.py [--ranks 1 2] [--scale small] [--device auto] [--out FILE]

The total batch is the same for all. On CPUs every rank has one thread. In every round all numbers
of ranks run once, so that a drift of the machine's speed affects all of them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import ldae
from ldae import devices, tree
from ldae.console import progress
from ldae.files import write_json
from ldae.runs.environment import environment
from ldae.runs.metrics import read_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--scale", default="small")
    parser.add_argument("--data", default="scattered-digits:2000")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--burn-in", type=int, default=3, help="steps to leave out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/scaling.json"))
    args = parser.parse_args()

    images = int(args.data.partition(":")[2])
    config = tree.replace(
        ldae.config("l_dae", args.scale),
        {
            "data.source": args.data,
            "tokenizer.fit_images": 500,
            "optim.batch_size": args.batch_size,
            "optim.epochs": args.steps * args.batch_size / images,
            "optim.warmup_epochs": 0.0,
            "system.device": args.device,
            "system.fsdp": args.fsdp,
            "system.workers": 0,
            "system.log_every": 1,
        },
    )
    speeds: dict[int, list[float]] = {ranks: [] for ranks in args.ranks}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scaling.yaml")
        file.write_text(tree.to_yaml(config))
        with progress(args.rounds * len(speeds), "runs") as bar:
            for number in range(args.rounds):
                for ranks, measured in speeds.items():
                    measured.append(speed(file, Path(folder, f"{number}-{ranks}"), ranks, args))
                    bar.update()
    medians = {ranks: statistics.median(measured) for ranks, measured in speeds.items()}
    first = medians[args.ranks[0]]
    record = {
        "what": f"{config.model.name}, depth {config.model.depth} + {config.model.depth}, batch "
        f"{args.batch_size} in all, images/s of {args.steps} steps after {args.burn_in}",
        "images_per_second": {
            ranks: [round(value, 1) for value in measured] for ranks, measured in speeds.items()
        },
        "median": {ranks: round(value, 1) for ranks, value in medians.items()},
        "times_as_fast": {ranks: round(value / first, 3) for ranks, value in medians.items()},
        "fsdp": args.fsdp,
        "environment": environment(devices.device_for(args.device)),
    }
    write_json(args.out, record)
    print(record["median"], record["times_as_fast"])


def speed(file: Path, run: Path, ranks: int, args: argparse.Namespace) -> float:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--"]
    command = [sys.executable, "-m", *launcher, "ldae", "pretrain", str(file), "--run", str(run)]
    one_thread = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | one_thread, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    records = read_records(run)[args.burn_in :]
    return statistics.median(record["images_per_second"] for record in records)


if __name__ == "__main__":
    main()
