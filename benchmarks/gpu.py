"""Measure one part of the work of a GPU, on random images.

python benchmarks/gpu.py PART [--device cuda] [--tiny] [--out FILE]

`benchmarks/gpu.sh` runs all parts, each under a time limit:

waits            20 steps of the training loop, in which no operation may wait for the GPU
step-l           the step of ViT-L: images/s, share of the rate of a matrix product, memory and the
                 seconds of the first step, beside DiT's step in eager bf16
step-b           the same for ViT-B, 12 + 12 blocks
step-small       the same at the scale small
features         extraction by the encoder of ViT-L, and the search of nearest neighbours
resume           hashes of the weights after 20 steps: run twice, and killed and resumed
resume-deterministic  the same with system.deterministic
ranks            two ranks, of which one raises an error
memory           pre-training of ViT-L with system.device_batch auto

With --tiny all sizes are tiny, to try a part on a CPU.
"""

import argparse
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import ldae
from benchmarks.dit_reference import ReferenceDiT
from benchmarks.speed import awake, reference_step
from ldae import devices, distributed
from ldae.backbones.fold import stock_vit
from ldae.commands.cache import cache
from ldae.data.open import open_source
from ldae.data.workers import Batch, available_cpus
from ldae.errors import InputError
from ldae.evals.features import Encoder, Features, encode_share
from ldae.evals.neighbours import Bank
from ldae.files import state_hash, write_json
from ldae.machine.timing import (
    TrainingStep,
    fitting_step,
    matmul_rate,
    prepared_method,
    seconds,
    training_flops,
)
from ldae.method import build
from ldae.models.vit import vit_shape
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.environment import environment
from ldae.runs.metrics import Metrics
from ldae.settings import Config
from ldae.train import loop
from ldae.train.compilation import compiles
from ldae.train.loop import Loop
from ldae.train.memory import release_memory
from ldae.train.plan import Plan
from ldae.tree import replace

# Scale, changes and largest batch of the measured steps.
SIZES: dict[str, tuple[str, dict, int]] = {
    "l": ("paper", {}, 128),
    "b": ("paper", {"model.name": "vit_base_patch16_224"}, 256),
    "small": ("small", {}, 1024),
    "loop": ("paper", {"model.name": "vit_small_patch16_224", "model.depth": 2}, 64),
}
TINY = {
    "data.img_size": 32,
    "model.name": "vit_tiny_patch16_224",
    "model.patch_size": 8,
    "model.depth": 1,
    "model.embed_dim": 32,
    "model.num_heads": 2,
    "tokenizer.dim": 6,
}
STEPS = 20
KILLED_AT = 10
WARM_UP = 3  # steps of the loop, which compile and allocate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # of a process of resume
    parser.add_argument("--kill-at", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = devices.device_for(args.device)
    if args.run:
        train_in(args, device)
    elif args.part == "ranks" and "RANK" in os.environ:
        fail_on_rank_1(device)
    else:
        record = PARTS[args.part](args, device) | {"environment": environment(device)}
        write_json(args.out or Path(f"runs/benchmarks/gpu-{args.part}.json"), record)
        print({name: value for name, value in record.items() if name != "environment"})


def config_of(size: str, args: argparse.Namespace, **system: object) -> Config:
    scale, changes, _ = SIZES[size]
    changes = changes | (TINY if args.tiny else {})
    changes |= {f"system.{name}": value for name, value in system.items()}
    return replace(ldae.config("l_dae", scale), changes)


def batch_of(size: str, args: argparse.Namespace) -> int:
    return 4 if args.tiny else SIZES[size][2]


def waits(args: argparse.Namespace, device: torch.device) -> dict:
    """Run the loop while torch raises an error for each operation that waits for the GPU."""
    config = config_of("loop", args, log_every=10**6, save_minutes=1e9)
    ahead = 2 if device.type == "cuda" else 1  # batches fetched before the first step
    first = WARM_UP + ahead

    def watched(start: int, micro_batches: int) -> Generator[Batch]:
        for number, batch in enumerate(random_batches(config, batch_of("loop", args), start)):
            if device.type == "cuda" and number in (first, first + STEPS):
                mode = "error" if number == first else "default"
                torch.cuda.set_sync_debug_mode(mode)
            yield batch

    # A record of metrics waits for the GPU: the only one is at the end.
    once = patch.object(loop, "_RECORDS", 1)
    with tempfile.TemporaryDirectory() as folder, once:
        steps = first + STEPS + 1
        prepare_loop(config, device, Path(folder), steps, batch_of("loop", args), watched).train()
    what = {"what": "steps of the training loop in which no operation waits for the GPU"}
    return what | ({"steps": STEPS} if device.type == "cuda" else {"skipped": "there is no GPU"})


def random_batches(config: Config, batch_size: int, start: int) -> Generator[Batch]:
    """Yield pinned batches, each a function of the number of its first image."""
    shape = (batch_size, config.data.in_chans, config.data.img_size, config.data.img_size)
    for first in itertools.count(start, batch_size):
        generator = torch.Generator().manual_seed(first)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.zeros(batch_size, dtype=torch.int64)
        positions = torch.arange(first, first + batch_size)
        if torch.cuda.is_available():
            images, labels, positions = (t.pin_memory() for t in (images, labels, positions))
        yield Batch(images, labels, positions, [])


def prepare_loop(
    config: Config,
    device: torch.device,
    folder: Path,
    steps: int,
    batch_size: int,
    batches,
    metrics: type[Metrics] = Metrics,
) -> Loop:
    images = next(random_batches(config, batch_size, 0)).images
    total = steps * batch_size
    return Loop(
        prepared_method(config, device, images),
        batches,
        Plan(epoch=total, total=total, batch_size=batch_size, micro_batches=1),
        replace(config, {"optim.warmup_epochs": 0.0, "optim.epochs": 1.0}).optim,
        config.system,
        device=device,
        checkpoints=Checkpoints(folder, keep=2),
        open_metrics=lambda seen: metrics(folder, seen),
        describe={},
        compiled=compiles(config.system.compile, device),
    )


def resume(args: argparse.Namespace, device: torch.device) -> dict:
    """Compare the weights of runs, each in its own process, by their hashes."""
    hashes = {}
    with tempfile.TemporaryDirectory() as folder:
        for run in ("first", "second", "killed"):
            command = [*own_command(args), "--run", str(Path(folder, run))]
            if run == "killed":
                kill = [*command, "--kill-at", str(KILLED_AT)]
                done = subprocess.run(kill, capture_output=True, text=True)
                if done.returncode != -signal.SIGKILL:
                    raise InputError(f"the run was not killed: {last_line(done.stderr)}")
                kept = Checkpoints(Path(folder, run)).load()
                resumed_at = kept["images_seen"] // batch_of("loop", args) if kept else 0
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise InputError(f"the {run} run failed: {last_line(done.stderr)}")
            hashes[run] = done.stdout.splitlines()[-1]
    return {
        "what": f"weights after {STEPS} steps: run twice, and killed and resumed",
        "twice_equal": hashes["first"] == hashes["second"],
        "resumed_equal": hashes["first"] == hashes["killed"],
        "resumed_at_step": resumed_at,
        "hashes": hashes,
    }


def train_in(args: argparse.Namespace, device: torch.device) -> None:
    """Train in a run folder, or be killed there, and print the hash of the weights."""
    deterministic = args.part == "resume-deterministic"
    config = config_of("loop", args, log_every=1, save_minutes=0, deterministic=deterministic)
    size = batch_of("loop", args)

    class Killed(Metrics):
        def write(self, record: dict) -> None:
            super().write(record)
            if record["images"] == args.kill_at * size:
                os.kill(os.getpid(), signal.SIGKILL)

    def batches(start: int, micro_batches: int) -> Generator[Batch]:
        return random_batches(config, size, start)

    prepare_loop(config, device, args.run, STEPS, size, batches, Killed).train()
    checkpoint = Checkpoints(args.run).load()
    assert checkpoint is not None
    print(state_hash(checkpoint["model"]))


def own_command(args: argparse.Namespace) -> list[str]:
    tiny = ["--tiny"] if args.tiny else []
    return [sys.executable, __file__, args.part, "--device", args.device, *tiny]


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def measure_steps(size: str):
    def measure(args: argparse.Namespace, device: torch.device) -> dict:
        """Measure the step of ldae, without and with CUDA graphs, and DiT's step in eager bf16."""
        config = config_of(size, args)
        ceiling = matmul_rate(device, size=256 if args.tiny else 0)
        step, measured = measure_step(config, device, batch_of(size, args), ceiling)
        denoiser, batch_size = step.method.denoiser, step.batch_size
        sizes = (denoiser.side, denoiser.in_dim, denoiser.out_dim)
        record = {
            "what": f"{config.model.name}, {denoiser.stages} blocks, {denoiser.side**2} tokens",
            "gflop_an_image": round(training_flops(step.method) / 1e9, 3),
            "matmul_tflops": round(ceiling / 1e12, 4),
            "step": measured,
        }
        del step, denoiser
        if device.type == "cuda":
            graphs = replace(config, {"system.cuda_graphs": True})
            record["step_with_cuda_graphs"] = attempt(
                lambda: measure_step(graphs, device, batch_size, ceiling)[1]
            )
        record["dit_bf16"] = attempt(
            lambda: dit_rate(config, sizes, record["what"], batch_size, device)
        )
        if isinstance(record["dit_bf16"], float):
            record["over_dit_bf16"] = round(measured["images_per_second"] / record["dit_bf16"], 3)
        return record

    return measure


def measure_step(
    config: Config, device: torch.device, batch_size: int, ceiling: float
) -> tuple[TrainingStep, dict]:
    """Return the step, and its rate, share of the ceiling, memory and seconds to the first step."""
    free_memory(device)
    step = fitting_step(config, device, batch_size)
    rate = step.rate(steps=10, at_most=20)
    share = rate * training_flops(step.method) / ceiling
    measured = {
        "images_per_second": round(rate, 2),
        "share_of_matmul": round(share, 4),
        "batch": step.batch_size,
        "first_step_seconds": round(step.first_seconds, 2),
    }
    if device.type == "cuda":
        measured["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return step, measured


def free_memory(device: torch.device) -> None:
    release_memory(device, compiled=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def dit_rate(config: Config, sizes, what: str, batch_size: int, device: torch.device) -> float:
    """Return images/s of DiT's step in eager bf16, on batches half as large until one fits."""
    model = config.model
    shape = vit_shape(model.name, embed_dim=model.embed_dim, num_heads=model.num_heads)
    network = awake(ReferenceDiT(shape, 2 * model.depth, *sizes)).to(device)
    while batch_size:
        free_memory(device)
        try:
            step = reference_step(network, batch_size, bf16=True)
            times = [seconds(step, device) for _ in range(6)][1:]
            return round(batch_size / sorted(times)[len(times) // 2], 2)
        except torch.OutOfMemoryError:
            batch_size //= 2
    raise InputError("DiT's step of one image does not fit into the memory")


def attempt(call):
    """Return what a call returns, or the first line of its error: the rest is still measured."""
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def features(args: argparse.Namespace, device: torch.device) -> dict:
    """Measure the encoder on images that are ready, from a cache, and the search of neighbours."""
    config = config_of("l", args)
    images, batch = (16, 4) if args.tiny else (8192, 256)
    method = build(config)
    side = config.data.img_size
    pixels = np.random.default_rng(0).integers(256, size=(images, side, side, 3), dtype=np.uint8)
    ready = torch.from_numpy(pixels[:batch]).permute(0, 3, 1, 2).contiguous()
    method.tokenizer.fit([ready[:16]])
    loading = {"batch_size": batch, "workers": available_cpus()}
    encoder = Encoder(stock_vit(method), device, "bf16", **loading)
    on_device = ready.to(device)
    times = [seconds(lambda: encoder.on_device(on_device), device) for _ in range(6)][1:]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "images.npz")
        np.savez(file, pixels)
        cache(str(file), Path(folder, "cache.safetensors"), side=side)
        source = open_source(str(Path(folder, "cache.safetensors")), "train")
        extraction = [seconds(lambda: encode_share(encoder, source), device) for _ in range(2)]
    record = {
        "what": f"{config.model.name}, the encoder's {config.model.depth} blocks, bf16",
        "network_images_per_second": round(batch / sorted(times)[2], 1),
        "extraction_images_per_second": round(images / extraction[1], 1),
    }
    return record | {"neighbours": attempt(lambda: search_rate(args.tiny, device))}


def search_rate(tiny: bool, device: torch.device) -> dict:
    """Measure the search of the 20 nearest of random features."""
    count, queries, dim = (200, 20, 8) if tiny else (500_000, 10_000, 1024)
    bank, asked = (
        Features(torch.randn(n, dim), torch.zeros(n, dtype=torch.int64)) for n in (count, queries)
    )
    searched = Bank(bank, device)
    taken = [seconds(lambda: list(searched.nearest(asked, 20)), device) for _ in range(2)]
    return {
        "features": count,
        "dim": dim,
        "queries": queries,
        "queries_per_second": round(queries / taken[1], 1),
    }


def ranks(args: argparse.Namespace, device: torch.device) -> dict:
    """Start two ranks, of which one raises, and measure until the other has ended."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        return {"what": "two ranks, one of which raises", "skipped": "there is one GPU"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # Each rank takes its own GPU: both would share one that is given by its number.
    command = own_command(argparse.Namespace(**vars(args) | {"device": device.type}))
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | launch | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    (_, lost), (raised_at, raised) = (process.communicate() for process in processes)
    if not raised_at:
        raise InputError(f"rank 1 ended before it could raise: {last_line(raised)}")
    return {
        "what": "two ranks, one of which raises",
        "seconds_until_both_ended": round(time.time() - float(raised_at), 2),
        "statuses": [process.returncode for process in processes],
        "reported": [
            [line for line in text.splitlines() if line.startswith("ldae:")]
            for text in (lost, raised)
        ],
    }


def fail_on_rank_1(device: torch.device) -> None:
    """Join the other rank, and raise on rank 1 while rank 0 waits for it."""
    try:
        with distributed.process_group(device, rank_timeout=0.3):
            distributed.all_reduce_sum(torch.ones(1, device=device)).item()
            if distributed.rank() == 1:
                print(time.time(), flush=True)
                raise InputError("the error of rank 1")
            distributed.all_reduce_sum(torch.ones(1, device=device)).item()
    except InputError as error:
        sys.exit(error.exit_status)


def memory(args: argparse.Namespace, device: torch.device) -> dict:
    """Pre-train two steps with ``system.device_batch auto``."""
    what = {"what": "ldae pretrain with system.device_batch auto"}
    size = ["--scale", "demo"] if args.tiny else []
    batch, data = (16, "scattered-digits:32") if args.tiny else (2048, "scattered-digits:4096")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ldae", "pretrain", "l_dae", *size, "--data", data]
        command += ["--run", folder + "/run", "--system.device-batch", "auto"]
        command += ["--optim.batch-size", str(batch), "--optim.epochs", "1"]
        command += ["--optim.warmup-epochs", "0", "--tokenizer.fit-images", "32"]
        command += ["--system.log-every", "1", "--system.device", str(args.device)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(last_line(done.stderr))
    return what | {"batch": batch, "printed": re.sub(r"\S*/run\b", "run", done.stdout).splitlines()}


PARTS = {
    "waits": waits,
    "resume": resume,
    "resume-deterministic": resume,
    "step-l": measure_steps("l"),
    "step-b": measure_steps("b"),
    "step-small": measure_steps("small"),
    "features": features,
    "ranks": ranks,
    "memory": memory,
}

if __name__ == "__main__":
    main()
