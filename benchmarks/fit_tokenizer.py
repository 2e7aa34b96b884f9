"""Measure training steps of conv tokenizers: images/s and peak memory, without each loss term.

python benchmarks/fit_tokenizer.py --data cifar10_train.zip --perceptual-net FOLDER

Each row runs in its own process, which gives its own peak memory. The scale is ``small`` unless
--scale is given. The discriminator takes part from the first step.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import ldae
from ldae import devices
from ldae.data.loader import train_batches
from ldae.data.open import open_source
from ldae.data.workers import Batch
from ldae.files import write_json
from ldae.machine.timing import synchronize
from ldae.pretraining.tokenizer import prepare, tokenizer_loss
from ldae.runs.environment import environment
from ldae.train.optim import adamw
from ldae.train.run import transform_of
from ldae.tree import replace

ROWS = ("dit", "no_perceptual", "no_adversarial", "vqvae", "vqgan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="scattered-digits:5000")
    parser.add_argument("--perceptual-net", default="vgg16")
    parser.add_argument("--scale", default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, help="instead of the scale's")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/fit_tokenizer.json"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args)))
        return
    results = {}
    for row in args.rows:
        command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[row] = json.loads(output.splitlines()[-1])
        print(row, results[row], flush=True)
    device = devices.device_for(args.device)
    write_json(
        args.out,
        {
            "what": "training steps of fit-tokenizer, data already loaded",
            "unit": "images/s, median of the rounds; peak MiB, of the process beyond its start on "
            "a CPU, of torch's allocator on a GPU",
            "rows": results,
            "scale": args.scale,
            "perceptual_net": args.perceptual_net,
            "data": args.data,
            "steps": args.steps,
            "rounds": args.rounds,
            "environment": environment(device),
        },
    )


def measure(args: argparse.Namespace) -> dict:
    changes = {
        "data.source": args.data,
        "system.device": args.device,
        "tokenizer.perceptual_net": args.perceptual_net,
        "tokenizer.adversarial_start": 0,
    }
    if args.batch_size:
        changes["tokenizer.optim.batch_size"] = args.batch_size
    config = replace(ldae.config(args.row, args.scale), changes)
    device = devices.device_for(args.device)
    source = open_source(config.data.source, "train")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fit = prepare(config, source, device, Path("nowhere"))
    batch = next(
        train_batches(source, transform_of(config), seed=0, start=0, batch_size=fit.plan.batch_size)
    )
    fit.tokenizer.to(device).fit_pixels([batch.images])
    loss = tokenizer_loss(fit)
    optimizer = adamw(loss, config.tokenizer.optim)
    seconds = [
        seconds_a_step(loss, optimizer, batch, args.steps, device)
        for _ in range(args.rounds + 1)  # the first round is burn-in
    ][1:]
    speeds = [len(batch.images) / part for part in seconds]
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    return {
        "images_per_second": round(statistics.median(speeds), 2),
        "rounds": [round(speed, 2) for speed in speeds],
        "peak_mib": round(peak, 1),
        "batch_size": fit.plan.batch_size,
        "parameters": sum(p.numel() for p in fit.tokenizer.parameters()),
        "perceptual": fit.perceptual.name if fit.perceptual else None,
        "bf16": loss.bf16,
    }


def seconds_a_step(
    loss: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    steps: int,
    device: torch.device,
) -> float:
    images, positions = batch.images.to(device), batch.positions.to(device)
    start = time.perf_counter()
    for _ in range(steps):
        value, _ = loss(images, positions)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    synchronize(device)
    return (time.perf_counter() - start) / steps


if __name__ == "__main__":
    main()
