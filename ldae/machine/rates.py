"""The rates of the parts of a pre-training: decoding, copies to the GPU, the step and saving."""

import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch

from ldae.data.loader import train_batches
from ldae.data.source import Source
from ldae.data.workers import available_cpus
from ldae.machine.timing import TrainingStep, fitting_step, matmul_rate, seconds, training_flops
from ldae.runs.checkpoints import Checkpoints
from ldae.settings import Config
from ldae.train.run import transform_of

_SECONDS = 3.0  # of a measurement


def decoding_rates(source: Source, config: Config) -> dict:
    """Return the images a second that one worker decodes and crops, and a worker on each core."""
    rates = {}
    for name, workers in (("decode_one_worker", 1), ("decode", available_cpus())):
        batches = train_batches(
            source,
            transform_of(config),
            seed=0,
            start=0,
            batch_size=16,
            workers=workers,
            bad_images=config.data.bad_images,
        )
        with closing(batches):
            for _ in range(2 * workers):  # the workers start
                next(batches)
            begun, images = time.perf_counter(), 0
            while time.perf_counter() - begun < _SECONDS:
                images += len(next(batches).images)
            rates[name] = images / (time.perf_counter() - begun)
    return rates


def copying_rate(config: Config, device: torch.device) -> dict:
    """Return the images a second that are copied from pinned memory to a GPU; {} on a CPU."""
    if device.type == "cpu":
        return {}
    side, chans = config.data.img_size, config.data.in_chans
    images = torch.empty(256, chans, side, side, dtype=torch.uint8, pin_memory=True)
    taken = [seconds(lambda: images.to(device, non_blocking=True), device) for _ in range(5)]
    return {"copy": len(images) / min(taken)}


def training_rates(config: Config, device: torch.device, batch_size: int, run: Path) -> dict:
    """Return the rates of a training step and of saving its state below the folder ``run``.

    They are ``step`` in images/s, ``product`` of large matrices in FLOP/s and ``save`` in bytes/s.
    ``step_flops`` are the FLOP of an image, and ``save_bytes`` the size of a checkpoint.
    A step that does not fit into the memory of a GPU is measured with half of the batch.
    """
    step = fitting_step(config, device, batch_size)
    rate = step.rate(at_most=2 * _SECONDS)
    flops = training_flops(step.method)
    product = matmul_rate(device, torch.bfloat16 if step.method.bf16 else torch.float32)
    denoiser = step.method.denoiser
    return {
        "step": rate,
        "step_size": f"{config.model.name}, {denoiser.encoder_size:,} parameters in the encoder, "
        f"{denoiser.side**2} tokens, batch {step.batch_size}",
        "step_flops": flops,
        "bf16": step.method.bf16,
        "product": product,
        **_saving_rate(step, run),
    }


def _saving_rate(step: TrainingStep, run: Path) -> dict:
    """Return the bytes a second with which a checkpoint is written, and its size."""
    while not run.exists():
        run = run.parent
    with tempfile.TemporaryDirectory(dir=run, prefix=".doctor-") as folder:
        state, copied = step.state.capture()
        if copied:
            copied.synchronize()
        begun = time.perf_counter()
        path = Checkpoints(Path(folder)).save(
            state | {"images_seen": 0, "describe": {}, "watchdog": None}
        )
        taken = time.perf_counter() - begun
        size = path.stat().st_size
    return {"save": size / taken, "save_bytes": size}
