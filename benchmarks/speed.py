"""Compare the training step with an eager DiT step, and with the limit of the machine.

python benchmarks/speed.py [--model NAME] [--side TOKENS] [--batch-size N] [--budgets] [--out FILE]

All steps run in turn in one process, with the same threads: a DiT step in float32 and under
bfloat16 autocast (``dit_reference``), the step of ``ldae pretrain`` in eager code, and the same
compiled, both in the precision that ``auto`` chooses on the device. The limit is the rate of a
large matrix product of this precision in the same process; the rate in the other precision shows
whether the choice is right. Saved bytes are what one more image keeps for the backward pass, a
token, channel and block. With --budgets the compiled step runs with each memory budget too, in
turn, in processes of their own, because compiled code of one process is shared.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import ldae
from benchmarks.dit_reference import ReferenceDiT
from ldae.devices import device_for
from ldae.files import write_json
from ldae.machine.timing import (
    kept_bytes,
    matmul_rate,
    prepared_method,
    seconds,
    training_flops,
)
from ldae.method import LDAE
from ldae.models.vit import vit_shape
from ldae.runs.environment import environment
from ldae.settings import SystemSettings
from ldae.train.optim import adamw
from ldae.train.parallel import compile_parts
from ldae.tree import replace

BUDGETS = (1.0, 0.9, 0.6, 0.5, 0.4, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the encoder")
    parser.add_argument("--side", type=int, default=8, help="tokens along an edge")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=SystemSettings.memory_budget)
    parser.add_argument("--budgets", action="store_true", help="compare memory budgets too")
    parser.add_argument("--only-compiled", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/speed.json"))
    args = parser.parse_args()

    device, side, batch_size = device_for(args.device), args.side, args.batch_size
    config = replace(
        ldae.config("l_dae", "small"),
        {"model.name": args.model, "model.depth": args.depth, "data.img_size": 4 * side},
    )
    images = torch.randint(256, (batch_size, 3, 4 * side, 4 * side), dtype=torch.uint8)
    method = awake(prepared_method(config, device, images))
    batch = (images.to(device), torch.arange(batch_size, device=device))
    flops = training_flops(method)  # of an image

    sizes = (side, method.denoiser.in_dim, method.denoiser.out_dim)
    reference = awake(ReferenceDiT(vit_shape(args.model), 2 * args.depth, *sizes)).to(device)
    eager = copy.deepcopy(method)
    steps = {
        "dit_fp32": reference_step(reference, batch_size, bf16=False),
        "dit_bf16": reference_step(copy.deepcopy(reference), batch_size, bf16=True),
        "ldae_eager": step_of(eager, batch, adamw(eager, config.optim)),
    }
    compiled = copy.deepcopy(method)
    compile_parts(compiled, args.budget)
    steps["ldae_compiled"] = step_of(compiled, batch, adamw(compiled, config.optim))
    if args.only_compiled:
        steps["ldae_compiled"]()
        rates = [batch_size / seconds(steps["ldae_compiled"], device) for _ in range(args.rounds)]
        print(json.dumps([statistics.median(rates), saved_bytes(compiled, batch)]))
        return
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    products: dict[str, list[float]] = {"bfloat16": [], "float32": []}
    for step in steps.values():
        step()
    for _ in range(args.rounds):
        for precision, rates in products.items():
            rates.append(matmul_rate(device, getattr(torch, precision)))
        for name, step in steps.items():
            speeds[name].append(batch_size / seconds(step, device))
        print({name: round(values[-1], 1) for name, values in speeds.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ours = medians["ldae_compiled"]
    limits = {precision: statistics.median(rates) for precision, rates in products.items()}
    precision = "bfloat16" if method.bf16 else "float32"
    saved = {"eager": saved_bytes(method, batch), "compiled": saved_bytes(compiled, batch)}
    write_json(
        args.out,
        {
            "what": f"{args.model}, {args.depth} + {args.depth} blocks, {side**2} tokens, "
            f"batch {batch_size}",
            "unit": "images/s, median of the rounds",
            "medians": {name: round(value, 2) for name, value in medians.items()},
            "over_dit_fp32": round(ours / medians["dit_fp32"], 3),
            "over_dit_bf16": round(ours / medians["dit_bf16"], 3),
            "precision": precision,
            "gflop_an_image": round(flops / 1e9, 3),
            "matmul_tflops": {name: round(rate / 1e12, 4) for name, rate in limits.items()},
            "share_of_matmul": round(ours * flops / limits[precision], 3),
            "memory_budget": args.budget,
            "saved_bytes": saved,
            "saved_share": round(saved["compiled"] / saved["eager"], 3),
            "budgets": measure_budgets(args) if args.budgets else None,
            "rounds": {name: [round(v, 2) for v in values] for name, values in speeds.items()},
            "threads": torch.get_num_threads(),
            "environment": environment(device),
        },
    )


def awake(network: nn.Module) -> nn.Module:
    """Replace weights of zero, since gates of zero would hide a part of the backward pass."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


def step_of(
    method: LDAE, batch: tuple[torch.Tensor, ...], optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    def step() -> None:
        method(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def reference_step(network: ReferenceDiT, batch_size: int, bf16: bool) -> Callable[[], None]:
    device, tokens = network.pos_embed.device, len(network.pos_embed)
    noised = torch.randn(batch_size, tokens, network.embed.in_features, device=device)
    target = torch.randn(batch_size, tokens, network.linear.out_features, device=device)
    t = torch.randint(1000, (batch_size,), device=device)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = network(noised, t)
        (output.float() - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_budgets(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Return images/s and saved bytes of the compiled step with each memory budget."""
    found: dict[float, list[list[float]]] = {budget: [] for budget in BUDGETS}
    names = ("model", "depth", "side", "batch_size", "rounds", "device")
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    for _ in range(2):
        for budget, measured in found.items():
            command = [sys.executable, __file__, *options, "--only-compiled", f"--budget={budget}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            measured.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        f"{budget:g}": {
            "images_per_second": [round(rate, 2) for rate, _ in measured],
            "saved_bytes": measured[0][1],
        }
        for budget, measured in found.items()
    }


def saved_bytes(method: LDAE, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the bytes that one more image keeps, a token, channel and block."""
    denoiser = method.denoiser
    unit = denoiser.side**2 * denoiser.width * denoiser.stages
    return round(bytes_an_image(method, batch) / unit, 2)


def bytes_an_image(method: LDAE, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    images, positions = batch
    few = max(len(images) // 2, 1)
    more = kept_bytes(method, images, positions)
    return (more - kept_bytes(method, images[:few], positions[:few])) / (len(images) - few)


if __name__ == "__main__":
    main()
