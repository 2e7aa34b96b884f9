"""Images/s and peak memory of `ldae sample`, with and without classifier-free guidance.

python benchmarks/sample.py [--row ROW] [--scale SCALE] [--device DEVICE] [--out FILE]

The network is untrained, which changes no time. A class-conditional one of the row's size draws
pictures as the verb does, decoding included, but writes none. Each case runs in a process of its own,
in turn over the rounds, since the peak of a process never falls.
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
from ldae.distributed import device_for
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
    parser.add_argument("--row", default="patch_pca", help="one that starts from pure noise")
    parser.add_argument("--scale", default="small")
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2, help="counted in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sample.json"))
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(measure(asked)))
        return

    rounds: dict[str, list[dict]] = {case: [] for case in CASES}
    for _ in range(asked.rounds):
        for case, found in rounds.items():
            command = [sys.executable, *sys.argv, "--case", case]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        print({case: found[-1] for case, found in rounds.items()}, flush=True)
    medians = {
        case: {key: round(statistics.median(r[key] for r in found), 2) for key in found[0]}
        for case, found in rounds.items()
    }
    write_json(
        asked.out,
        {
            "what": f"{asked.row} at scale {asked.scale}, DDIM of {asked.steps} steps, batch "
            f"{asked.batch_size}, {asked.precision}; peak memory of the device, or what the process "
            "grew by on a CPU",
            "medians": medians,
            "rounds": rounds,
            "environment": environment(device_for(asked.device)),
        },
    )


def measure(asked: argparse.Namespace) -> dict[str, float]:
    """One case: images/s, and MiB at the peak beyond what the process held before the method."""
    device = device_for(asked.device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = replace(ldae.config(asked.row, asked.scale), {"model.class_conditional": True})
    method = build(config, CLASSES, bf16=asked.precision == "bf16").to(device)
    method.eval().requires_grad_(False)
    how = SamplingSettings(steps=asked.steps, guidance=CASES[asked.case], precision=asked.precision)
    names = [str(number) for number in range(CLASSES)]
    draw = partial(generate, method, resolve(method, names, how), None)
    numbers = torch.arange(asked.batch_size, device=device)
    warm = SamplingSettings(steps=2, guidance=how.guidance, precision=how.precision)
    generate(method, resolve(method, names, warm), None, numbers)
    start = time.perf_counter()
    for batch in range(asked.batches):
        draw(numbers + batch * asked.batch_size)  # ends on the CPU: nothing is left in flight
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    speed = asked.batch_size * asked.batches / seconds
    return {"images_per_second": round(speed, 3), "peak_mib": round(peak, 1)}


if __name__ == "__main__":
    main()
