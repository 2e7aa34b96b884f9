"""Measure how each cost grows with tokens, width, blocks, images and ranks.

python benchmarks/growth.py [--rounds N] [--device auto] [--out FILE]

Each cost is measured at several sizes of one quantity. The exponent is the slope of a line through
the logarithms: 1 is linear, 2 quadratic. All sizes are measured once in every round, and the median
of the rounds counts, so that a drift of the machine's speed affects all of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ldae
from benchmarks.knn import features, ours
from ldae.console import progress
from ldae.devices import device_for
from ldae.files import write_json
from ldae.machine.timing import TrainingStep, seconds
from ldae.method import build_tokenizer
from ldae.runs.environment import environment
from ldae.tree import replace

DEFAULT = {"tokens": 64, "width": 192, "blocks": 8, "images": 128}
SIZES = {
    "tokens": (16, 64, 256, 1024),
    "width": (96, 192, 384, 768),
    "blocks": (4, 8, 16, 32),
    "images": (16, 32, 64, 128),
}
FITTED = (1_000, 2_000, 4_000, 8_000)
SEARCHED = (10_000, 20_000, 40_000, 80_000)
QUERIES, DIM, K = 1_000, 384, 20
CPU = torch.device("cpu")

Cost = dict[int, Callable[[], float]]
"""The measurement of a cost, in seconds, at each size."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/growth.json"))
    args = parser.parse_args()
    device = device_for(args.device)
    costs = {
        f"training step, {quantity}": measure(steps(quantity, sizes, device), args.rounds)
        for quantity, sizes in SIZES.items()
    }
    costs["fit of patch-wise PCA, images"] = measure(fits(), args.rounds)
    costs[f"k-NN of {QUERIES:,} queries, images"] = measure(searches(), args.rounds)
    costs["training at one total batch, ranks"] = ranks(args)
    exponents = {name: exponent(times) for name, times in costs.items()}
    write_json(
        args.out,
        {
            "what": "seconds by size, the median of the rounds; step of one image for tokens, "
            "width and blocks",
            "seconds": {
                name: {size: float(f"{time:.4g}") for size, time in times.items()}
                for name, times in costs.items()
            },
            "exponents": exponents,
            "environment": environment(device),
        },
    )
    for name, slope in exponents.items():
        print(f"{name:44}{slope:6.2f}")


def measure(cost: Cost, rounds: int) -> dict[int, float]:
    """Return the median seconds of a cost at each size, after a first call of each."""
    times: dict[int, list[float]] = {size: [] for size in cost}
    with progress((rounds + 1) * len(cost), "sizes") as bar:
        for number in range(rounds + 1):
            for size, call in cost.items():
                found = call()
                times[size] += [found] if number else []
                bar.update(1)
    return {size: statistics.median(found) for size, found in times.items()}


def steps(quantity: str, sizes: tuple[int, ...], device: torch.device) -> Cost:
    """Return the step at each size, for one image unless the quantity is images.

    With more tokens the batch is smaller, so that the step has equally many tokens.
    """

    def step_at(size: int) -> Callable[[], float]:
        now: dict[str, int] = DEFAULT | {quantity: size}
        side = round(now["tokens"] ** 0.5)
        changes: dict[str, Any] = {
            "data.img_size": 4 * side,
            "model.depth": now["blocks"] // 2,
            "model.embed_dim": now["width"],
            "model.num_heads": now["width"] // 32,
            "system.compile": "off",
        }
        tokens = DEFAULT["images"] * DEFAULT["tokens"]
        batch = now["images"] if quantity == "images" else tokens // now["tokens"]
        step = TrainingStep(replace(ldae.config("l_dae", "small"), changes), device, batch)
        return lambda: seconds(step, device) / (1 if quantity == "images" else batch)

    return {size: step_at(size) for size in sizes}


def fits() -> Cost:
    """Return the fit of the tokenizer on each number of images of 32 x 32 pixels."""
    images = torch.randint(256, (max(FITTED), 3, 32, 32), dtype=torch.uint8)
    tokenizer = build_tokenizer(ldae.config("l_dae", "small"))
    return {
        count: lambda count=count: seconds(lambda: tokenizer.fit(images[:count].split(250)), CPU)
        for count in FITTED
    }


def searches() -> Cost:
    """Return the search among each number of features."""
    bank, queries = features(max(SEARCHED), DIM, 0), features(QUERIES, DIM, 1)

    def search(count: int) -> None:
        for found in ours(bank[:count], queries, K):
            found.sum()

    return {count: lambda count=count: seconds(lambda: search(count), CPU) for count in SEARCHED}


def ranks(args: argparse.Namespace) -> dict[int, float]:
    """Return the seconds of an image with one rank and with two, by ``scaling.py``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "scaling.json")
        script = Path(__file__).with_name("scaling.py")
        command = [sys.executable, script, "--rounds", args.rounds, "--device", args.device]
        subprocess.run([*map(str, command), "--out", str(out)], check=True)
        medians = json.loads(out.read_text())["median"]
    return {int(count): 1 / rate for count, rate in medians.items()}


def exponent(times: dict[int, float]) -> float:
    """Return the slope of the logarithms of seconds over the logarithms of sizes."""
    slope, _ = np.polyfit(np.log([*times]), np.log([*times.values()]), 1)
    return round(float(slope), 3)


if __name__ == "__main__":
    main()
