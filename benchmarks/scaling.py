"""Images/s of the whole run on one rank and on more, by the commands that a user types.

python benchmarks/scaling.py [--ranks 1 2] [--scale small] [--device auto] [--out FILE]

The batch is the same for all, so more ranks mean less work for each. On CPUs every rank has one
thread. The runs take turns, round by round: a machine whose speed drifts drifts for all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import ldae
from ldae import distributed, tree
from ldae.console import progress
from ldae.files import write_json
from ldae.runs.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--scale", default="small")
    parser.add_argument("--data", default="scattered-digits:2000")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--burn-in", type=int, default=3, help="of these steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    asked = parser.parse_args()

    images = int(asked.data.partition(":")[2])
    config = tree.replace(
        ldae.config("l_dae", asked.scale),
        {
            "data.source": asked.data,
            "tokenizer.fit_images": 500,
            "optim.batch_size": asked.batch_size,
            "optim.epochs": asked.steps * asked.batch_size / images,
            "optim.warmup_epochs": 0.0,
            "system.device": asked.device,
            "system.fsdp": asked.fsdp,
            "system.workers": 0,
            "system.log_every": 1,
        },
    )
    found: dict[int, list[float]] = {ranks: [] for ranks in asked.ranks}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scaling.yaml")
        file.write_text(tree.to_yaml(config))
        with progress(asked.rounds * len(found), "runs") as bar:
            for number in range(asked.rounds):
                for ranks, speeds in found.items():
                    speeds.append(speed(file, Path(folder, f"{number}-{ranks}"), ranks, asked))
                    bar.update()
    medians = {ranks: statistics.median(speeds) for ranks, speeds in found.items()}
    first = medians[asked.ranks[0]]
    record = {
        "what": f"{config.model.name}, depth {config.model.depth} + {config.model.depth}, batch "
        f"{asked.batch_size} in all, images/s of {asked.steps} steps after {asked.burn_in}",
        "images_per_second": {
            ranks: [round(one, 1) for one in part] for ranks, part in found.items()
        },
        "median": {ranks: round(one, 1) for ranks, one in medians.items()},
        "times_as_fast": {ranks: round(one / first, 3) for ranks, one in medians.items()},
        "fsdp": asked.fsdp,
        "environment": environment(distributed.device_for(asked.device)),
    }
    write_json(asked.out, record)
    print(record["median"], record["times_as_fast"])


def speed(file: Path, run: Path, ranks: int, asked: argparse.Namespace) -> float:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--"]
    command = [sys.executable, "-m", *launcher, "ldae", "pretrain", str(file), "--run", str(run)]
    one_thread = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | one_thread, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return statistics.median([one["images_per_second"] for one in records][asked.burn_in :])


if __name__ == "__main__":
    main()
