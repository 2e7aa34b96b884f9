"""Measure the time to the first compiled step, without any cache of compiled code.

python benchmarks/startup.py [--model NAME] [--depth N] [--device auto] [--out FILE]

Each measurement has its own process, with an empty folder for compiled code: the network compiled
in parts, as ``ldae pretrain`` does, and as one graph.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import ldae
from ldae.console import progress
from ldae.devices import device_for
from ldae.files import write_json
from ldae.machine.timing import prepared_method, seconds
from ldae.runs.environment import environment
from ldae.train.parallel import compile_parts
from ldae.tree import replace

WAYS = ("in_parts", "whole_network")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the encoder")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/startup.json"))
    args = parser.parse_args()
    device = device_for(args.device)
    if args.way:
        print(json.dumps(first_step(args, device)))
        return
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with progress(args.rounds * len(WAYS), "first steps") as bar:
        for _ in range(args.rounds):
            for way, times in found.items():
                times.append(in_a_process(args, way))
                bar.update(1)
    medians = {way: statistics.median(times) for way, times in found.items()}
    write_json(
        args.out,
        {
            "what": f"{args.model}, {args.depth} + {args.depth} blocks, 64 tokens, batch "
            f"{args.batch_size}",
            "unit": "seconds to the end of the first forward and backward pass",
            "medians": medians,
            "times_as_fast": round(medians["whole_network"] / medians["in_parts"], 2),
            "rounds": found,
            "environment": environment(device),
        },
    )
    print(medians)


def in_a_process(args: argparse.Namespace, way: str) -> float:
    """Return the seconds to a first step in a new process without caches."""
    sizes = {name: getattr(args, name) for name in ("model", "depth", "batch_size", "device")}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    with tempfile.TemporaryDirectory() as folder:
        alone = {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        done = subprocess.run(
            [sys.executable, __file__, *options, f"--way={way}"],
            env=os.environ | alone,
            stdout=subprocess.PIPE,
            check=True,
        )
    return json.loads(done.stdout)


def first_step(args: argparse.Namespace, device: torch.device) -> float:
    config = replace(
        ldae.config("l_dae", "small"),
        {"model.name": args.model, "model.depth": args.depth, "system.precision": "bf16"},
    )
    images = torch.randint(256, (args.batch_size, 3, 32, 32), dtype=torch.uint8)
    method = prepared_method(config, device, images)
    batch = (images.to(device), torch.arange(args.batch_size, device=device))

    def step() -> None:
        network = method
        if args.way == "in_parts":
            compile_parts(method, config.system.memory_budget)
        else:
            network = torch.compile(method)
        network(*batch).backward()

    return round(seconds(step, device), 2)


if __name__ == "__main__":
    main()
