"""Compare the loss after training in float32 without compilation and in bfloat16 with it.

python benchmarks/agreement.py --runs runs/agreement [--seeds 0 1 2] [--steps 500] [--out FILE]

Each seed trains both, on the same images and noise. The loss is that of the trained weights, in
float32, on the first images of the evaluation split. The difference of the two should be below the
spread over seeds. The same command resumes.
"""

import argparse
import statistics
from pathlib import Path

import torch

import ldae
from ldae.backbones.run import load_method
from ldae.commands.pretrain import pretrain
from ldae.data.loader import eval_batches
from ldae.data.open import open_source
from ldae.data.transforms import CropTransform
from ldae.devices import device_for
from ldae.files import write_json
from ldae.runs.environment import environment
from ldae.settings import Config
from ldae.tree import replace

KINDS = {
    "fp32, eager": {"system.precision": "fp32", "system.compile": "off"},
    "bf16, compiled": {"system.precision": "bf16", "system.compile": "on"},
}
EVALUATED = 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="scattered-digits:20000")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/agreement.json"))
    args = parser.parse_args()

    device = device_for(args.device)
    images = len(open_source(args.data, "train"))
    config = replace(
        ldae.config("l_dae", "small"),
        {
            "data.source": args.data,
            "model.name": args.model,
            "model.depth": args.depth,
            "optim.batch_size": args.batch_size,
            "optim.epochs": args.steps * args.batch_size / images,
            "optim.warmup_epochs": args.steps * args.batch_size / images / 10,
            "optim.blr": 1e-2,  # a learning rate of 3.1e-4 at a batch of 8
            "system.device": args.device,
            "system.workers": 0,
            "system.log_every": 100,
        },
    )
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for seed in args.seeds:
        for kind, changes in KINDS.items():
            run = args.runs / f"{kind.replace(', ', '-')}-{seed}"
            pretrain(replace(config, {**changes, "seed": seed}), run, "l_dae")
            losses[kind].append(loss_of(run, config, device))
            print(f"{kind}, seed {seed}: {losses[kind][-1]:.5f}", flush=True)
    (eager, compiled) = losses.values()
    differences = [right - left for left, right in zip(eager, compiled, strict=True)]
    write_json(
        args.out,
        {
            "what": f"l_dae, {args.model}, {args.depth} + {args.depth} blocks, {args.data}, "
            f"{args.steps} steps of {args.batch_size} images; loss on {EVALUATED} others",
            "losses": losses,
            "largest_difference": max(map(abs, differences)),
            "deviation_of_seeds": statistics.stdev(eager) if len(eager) > 1 else None,
            "environment": environment(device),
        },
    )


@torch.no_grad()
def loss_of(run: Path, config: Config, device: torch.device) -> float:
    """Return the mean loss of a run's weights in float32 on evaluation images."""
    method, _ = load_method(run)
    method.to(device)
    source = open_source(config.data.source, "eval")
    transform = CropTransform(config.data.img_size, config.data.in_chans)
    total = 0.0
    for pixels, _, numbers in eval_batches(source, transform, range(EVALUATED), 100, 0):
        total += len(pixels) * method(pixels.to(device), numbers.to(device)).item()
    return total / EVALUATED


if __name__ == "__main__":
    main()
