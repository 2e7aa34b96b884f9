"""Measure images/s of the loop, of a training step and of a bare forward and backward pass.

python benchmarks/step.py [--data SOURCE] [--out FILE]

In every round of one process: a step of each method (MAE, l-DAE, and l_dae_masked with three shares
of the tokens dropped) with the same encoder and batch; the network on fixed tokens (bare), the step
(tokenizer, noise, loss, AdamW) on a fixed batch, and the step with the other implementation of
attention. Then the loop with its data and logging runs, and a step on the fixed batch is timed
after each of its steps, so that a drift of the machine's speed affects both.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ldae
from ldae import devices
from ldae.data.loader import train_batches
from ldae.data.open import open_source
from ldae.files import write_json
from ldae.machine.timing import TrainingStep, prepared_method, synchronize
from ldae.method import LDAE
from ldae.models.vit import fuse_attention
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.environment import environment
from ldae.runs.metrics import Metrics
from ldae.settings import Config
from ldae.train.compilation import compiles, fuses_attention
from ldae.train.loop import Loop
from ldae.train.optim import adamw
from ldae.train.plan import Plan
from ldae.train.run import transform_of
from ldae.tree import replace

METHODS = {
    "MAE": ("mae", {}),
    "l-DAE": ("l_dae", {}),
} | {
    f"l_dae_masked, {ratio:.0%} of the tokens dropped": ("l_dae_masked", {"masking.ratio": ratio})
    for ratio in (0.25, 0.5, 0.75)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="scattered-digits:20000")
    parser.add_argument("--scale", default="small")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the encoder")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps in each round")
    parser.add_argument(
        "--pairs", type=int, default=12, help="steps of the loop, each with one alone"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/step.json"))
    args = parser.parse_args()

    config = replace(
        ldae.config("l_dae", args.scale),
        {
            "data.source": args.data,
            "model.depth": args.depth,
            "optim.batch_size": args.batch_size,
            "system.workers": args.workers,
            "system.log_every": 1,
        },
    )
    device = devices.device_for(args.device)
    source = open_source(args.data, "train")
    method, compiled = prepare(config, device, source)
    batch = next(batches(config, source, device)(0, 1))
    images, positions = batch.images.to(device), batch.positions.to(device)
    network = torch.compile(method) if compiled else method
    bare_network = torch.compile(method.denoiser) if compiled else method.denoiser
    optimizer = adamw(method, config.optim)
    tokens = (len(images), method.denoiser.side**2, method.denoiser.in_dim)
    fixed = torch.randn(tokens, device=device)
    t = torch.randint(len(method.sigma), (len(images),), device=device)

    def bare() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=method.bf16):
            bare_network(fixed, t).float().square().mean().backward()
        method.zero_grad()

    def step() -> None:
        network(images, positions).backward()
        optimizer.step()
        optimizer.zero_grad()

    fused = fuses_attention(method.bf16, device)
    speeds: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, run in (("bare", bare), ("step", step)):
            speed = args.batch_size / seconds_a_call(run, args.steps, device)
            speeds.setdefault(name, []).append(speed)
        if not compiled:
            fuse_attention(method, not fused)
            other = args.batch_size / seconds_a_call(step, args.steps, device)
            speeds.setdefault("step_plain" if fused else "step_fused", []).append(other)
            fuse_attention(method, fused)
        print({name: round(values[-1], 1) for name, values in speeds.items()}, flush=True)
    methods = compare_methods(args, device)
    pairs = alternate(config, source, device, step, args.pairs)
    speeds["loop"], speeds["step_in_turn"] = (
        [args.batch_size / seconds for seconds in times] for times in zip(*pairs, strict=True)
    )

    medians = {name: round(statistics.median(values), 2) for name, values in speeds.items()}
    write_json(
        args.out,
        {
            "what": f"{config.model.name}, depth {args.depth} + {args.depth}, "
            f"{config.data.img_size} px, batch {args.batch_size}",
            "unit": "images/s, median of the rounds",
            "medians": medians,
            "loop_over_step": round(statistics.median(step / loop for loop, step in pairs), 4),
            "step_over_bare": round(medians["step"] / medians["bare"], 4),
            "methods": methods,
            "rounds": {name: [round(v, 2) for v in values] for name, values in speeds.items()},
            "bf16": method.bf16,
            "compiled": compiled,
            "data": args.data,
            "workers": args.workers,
            "environment": environment(device),
        },
    )


def compare_methods(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Return images/s and FLOPs of the step of each method, in turn, on random images."""
    changes = {"model.depth": args.depth}
    steps = {
        name: TrainingStep(
            replace(ldae.config(row, args.scale), changes | own), device, args.batch_size
        )
        for name, (row, own) in METHODS.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            rates[name].append(step.rate(args.steps))
        print({name: round(values[-1], 1) for name, values in rates.items()}, flush=True)
    return {
        name: {
            "images_per_second": round(statistics.median(rates[name]), 2),
            "gflop_an_image": round(flops(step.method, step.batch.images[:1]) / 1e9, 3),
            "rounds": [round(rate, 2) for rate in rates[name]],
        }
        for name, step in steps.items()
    }


def flops(method: nn.Module, image: torch.Tensor) -> int:
    """Return the FLOPs of the matrix products of a method for one training image, both passes."""
    method, image = copy.deepcopy(method).to("meta"), image.to("meta")
    with FlopCounterMode(display=False) as counter:
        output = method(image, torch.zeros(1, dtype=torch.int64, device="meta"))
        (output[0] if isinstance(output, tuple) else output).backward()
    return counter.get_total_flops()


def prepare(config: Config, device: torch.device, source) -> tuple[LDAE, bool]:
    """Return a method as of ``ldae pretrain``, fitted on one batch, and whether it compiles."""
    images = next(batches(config, source, device)(0, 1)).images
    return prepared_method(config, device, images), compiles(config.system.compile, device)


def batches(config: Config, source, device: torch.device) -> Callable:
    return lambda start, micro_batches: train_batches(
        source,
        transform_of(config),
        seed=0,
        start=start,
        batch_size=config.optim.batch_size,
        micro_batches=micro_batches,
        workers=config.system.workers,
        pin_memory=device.type == "cuda",
    )


def seconds_a_call(call: Callable[[], None], steps: int, device: torch.device) -> float:
    """Return the mean over ``steps`` calls, after one call of burn-in."""
    call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / steps


def alternate(
    config: Config, source, device: torch.device, step: Callable[[], None], count: int
) -> list[tuple[float, float]]:
    """Return the seconds of each step of the loop and of a step alone after it, without burn-in."""
    method, compiled = prepare(config, device, source)
    size = config.optim.batch_size
    plan = Plan(epoch=len(source), total=(count + 2) * size, batch_size=size, micro_batches=1)
    pairs: list[tuple[float, float]] = []

    class Timed(Metrics):
        resumed = time.perf_counter()

        def write(self, record: dict) -> None:
            super().write(record)
            synchronize(device)
            loop = time.perf_counter() - self.resumed
            start = time.perf_counter()
            step()
            synchronize(device)
            self.resumed = time.perf_counter()
            pairs.append((loop, self.resumed - start))
            print(f"loop {loop:.3f} s, step {pairs[-1][1]:.3f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        Loop(
            method,
            batches(config, source, device),
            plan,
            config.optim,
            config.system,
            device=device,
            checkpoints=Checkpoints(Path(folder)),
            open_metrics=lambda seen: Timed(Path(folder), seen),
            describe={},
            compiled=compiled,
        ).train()
    return pairs[2:]


if __name__ == "__main__":
    main()
