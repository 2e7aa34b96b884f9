"""Measure images/s and peak memory of `ldae sample`, with and without classifier-free guidance.

python benchmarks/sample.py [--row ROW] [--scale SCALE] [--device DEVICE] [--out FILE]

A class-conditional, untrained network of the row's size samples and decodes as the command does,
but writes no files. In every round each case runs in its own process, because the recorded peak
memory of a process never falls.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

import ldae
from ldae.devices import device_for
from ldae.files import write_json
from ldae.method import build
from ldae.runs.environment import environment
from ldae.sampling.generation import generate, resolve
from ldae.sampling.settings import SamplingSettings
from ldae.tree import replace

CLASSES = 10
CASES = {"unguided": 1.0, "guided": 2.0}  # weight of classifier-free guidance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", default="patch_pca", help="a row that starts from pure noise")
    parser.add_argument("--scale", default="small")
    parser.add_argument("--steps", type=int, default=50, help="steps of DDIM")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2, help="batches in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/sample.json"))
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args)))
        return

    rounds: dict[str, list[dict]] = {case: [] for case in CASES}
    for _ in range(args.rounds):
        for case, results in rounds.items():
            command = [sys.executable, *sys.argv, "--case", case]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
        print({case: results[-1] for case, results in rounds.items()}, flush=True)
    medians = {
        case: {key: round(statistics.median(r[key] for r in results), 2) for key in results[0]}
        for case, results in rounds.items()
    }
    write_json(
        args.out,
        {
            "what": f"{args.row} at scale {args.scale}, DDIM of {args.steps} steps, batch "
            f"{args.batch_size}, {args.precision}; peak memory of the device, or the growth of the "
            "process on a CPU",
            "medians": medians,
            "rounds": rounds,
            "environment": environment(device_for(args.device)),
        },
    )


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return images/s and the peak memory in MiB beyond the memory before the method was built."""
    device = device_for(args.device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = replace(ldae.config(args.row, args.scale), {"model.class_conditional": True})
    method = build(config, CLASSES, bf16=args.precision == "bf16").to(device)
    method.eval().requires_grad_(False)
    how = SamplingSettings(steps=args.steps, guidance=CASES[args.case], precision=args.precision)
    names = [str(number) for number in range(CLASSES)]
    draw = partial(generate, method, resolve(method, names, how), None)
    numbers = torch.arange(args.batch_size, device=device)
    warm = SamplingSettings(steps=2, guidance=how.guidance, precision=how.precision)
    generate(method, resolve(method, names, warm), None, numbers)
    start = time.perf_counter()
    for batch in range(args.batches):
        draw(numbers + batch * args.batch_size)  # ends on the CPU, so nothing is in flight
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    speed = args.batch_size * args.batches / seconds
    return {"images_per_second": round(speed, 3), "peak_mib": round(peak, 1)}


if __name__ == "__main__":
    main()
