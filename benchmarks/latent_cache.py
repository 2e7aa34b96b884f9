"""Compare the training step of row 1 from images with the step from cached latents.

python benchmarks/latent_cache.py [--batch-size N] [--scale SCALE] [--out FILE]

Both steps run in turn in one process, with the same network, optimizer and threads. The step from
images encodes them by the tokenizer of LDM's size; the step from cached latents draws from the
posteriors that the cache holds of the same images.
"""

import argparse
import statistics
from pathlib import Path

import torch

import ldae
from benchmarks.speed import awake, step_of
from ldae.devices import device_for
from ldae.files import write_json
from ldae.machine.timing import seconds
from ldae.method import LDAE, build
from ldae.models.vit import fuse_attention
from ldae.precision import runs_in_bf16
from ldae.pretraining.latents import LatentEncoder
from ldae.runs.environment import environment
from ldae.train.compilation import compiles, fuses_attention
from ldae.train.optim import adamw
from ldae.train.parallel import compile_parts
from ldae.tree import replace

CLASSES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="paper")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the encoder")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/latent_cache.json"))
    args = parser.parse_args()

    device, batch_size = device_for(args.device), args.batch_size
    config = replace(ldae.config("dit", args.scale), {"model.depth": args.depth})
    bf16, compiled = runs_in_bf16("auto", device), compiles(args.compile, device)
    method = awake(build(config, CLASSES, bf16)).to(device).train()
    fuse_attention(method, fuses_attention(bf16, device))
    size = (batch_size, config.data.in_chans, config.data.img_size, config.data.img_size)
    images = torch.randint(256, size, dtype=torch.uint8)
    method.tokenizer.fit_pixels([images])
    rows = torch.from_numpy(LatentEncoder(method.tokenizer, device)(images))
    losses = compare_losses(method, images, rows, device)
    if compiled:
        compile_parts(method, config.system.memory_budget)
    optimizer = adamw(method, config.optim)
    steps = {
        name: step_of(method, batch_of(content, device), optimizer)
        for name, content in (("images", images), ("cached_latents", rows))
    }

    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
        print({name: round(values[-1], 3) for name, values in times.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    write_json(
        args.out,
        {
            "what": f"row 1, {config.model.name}, {args.depth} + {args.depth} blocks, "
            f"{config.data.img_size} px, batch {batch_size}",
            "unit": "seconds a step, median of the rounds",
            "medians": {name: round(value, 4) for name, value in medians.items()},
            "times": round(medians["images"] / medians["cached_latents"], 3),
            "bytes_an_image": {"images": images[0].nbytes, "cached_latents": rows[0].nbytes},
            "losses": losses,
            "rounds": {name: [round(v, 4) for v in values] for name, values in times.items()},
            "bf16": bf16,
            "compiled": compiled,
            "threads": torch.get_num_threads(),
            "environment": environment(device),
        },
    )
    print(f"{args.out}: {medians['images'] / medians['cached_latents']:.2f} times")


def batch_of(content: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return images or latents on the device, with their positions and labels."""
    count = len(content)
    return content.to(device), torch.arange(count, device=device), torch.arange(count).to(device)


@torch.no_grad()
def compare_losses(
    method: LDAE, images: torch.Tensor, rows: torch.Tensor, device: torch.device
) -> dict[str, float]:
    """Return the loss of one batch from images and from cached latents."""
    pairs = (("images", images), ("cached_latents", rows))
    return {name: method(*batch_of(content, device)).item() for name, content in pairs}


if __name__ == "__main__":
    main()
