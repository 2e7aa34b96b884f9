"""Training in a run folder, on a source of images."""

from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldae import distributed
from ldae.console import print_main
from ldae.data.loader import Transform, train_batches
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.data.workers import Batch
from ldae.errors import InputError
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.folder import Settings
from ldae.runs.identity import describe_images
from ldae.runs.metrics import Metrics
from ldae.settings import OptimSettings
from ldae.train.compilation import compiles
from ldae.train.loop import Hook, Loop
from ldae.train.optim import lr_at, peak_lr
from ldae.train.plan import Plan


def train_in(
    run: Path,
    model: nn.Module,
    config: Settings,
    optim: OptimSettings,
    plan: Plan,
    source: Source,
    *,
    row: str,
    learns_labels: bool = False,
    start: Mapping[str, Any] | None = None,
    transform: Transform,
    mixing: Callable[[Batch], Batch] | None = None,
    device: torch.device,
    hooks: tuple[Hook, ...] = (),
) -> nn.Module:
    """Train ``model`` on ``source`` and write checkpoints and metrics to ``run``, see ``Loop``.

    Args:
        row: the name of the trained model in the records.
        learns_labels: whether a run that resumes must have the same labels.
        start: what the training begins from, for the checkpoints.
        transform: applied to each image by the loader.
        mixing: applied to each batch before the model sees it.
    """

    resizes_twice = source.resizes_twice(transform)

    def batches_from(start: int, micro_batches: int) -> Generator[Batch]:
        return train_batches(
            source,
            transform,
            seed=config.seed,
            start=start,
            stop=plan.total,
            batch_size=plan.batch_size,
            micro_batches=micro_batches,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            workers=config.system.workers,
            bad_images=config.data.bad_images,
            pin_memory=device.type == "cuda",
        )

    def open_metrics(seen: int) -> Metrics:
        resized = ", resized twice," if resizes_twice else ""
        steps = f"{plan.total:,} images{resized} in {plan.steps:,} steps"
        print_main(f"{run}: {row}, {steps}, from image {seen:,}")
        return Metrics(run, seen, config.system.tensorboard, config.system.wandb)

    return Loop(
        model,
        batches_from,
        plan,
        optim,
        config.system,
        device=device,
        checkpoints=Checkpoints(run, config.system.keep),
        open_metrics=open_metrics,
        describe={
            "row": row,
            **describe_images(source, resizes_twice, learns_labels),
            **(start or {}),
        },
        compiled=compiles(config.system.compile, device),
        hooks=hooks,
        seed=config.seed,
        mixing=mixing,
    ).train()


def check_warmup(run: Path, optim: OptimSettings, name: str = "optim") -> None:
    """Check that the warm-up ends before the run in the folder ``run`` does.

    A run with a checkpoint resumes with any warm-up, since older versions began such runs.

    Raises: InputError with the settings, whose dotted names begin with ``name``.
    """
    if optim.warmup_epochs >= optim.epochs and not Checkpoints(run).paths():
        raise InputError(
            f"{name}.warmup_epochs {optim.warmup_epochs:g} must be fewer than {name}.epochs "
            f"{optim.epochs:g}"
        )


def describe_training(
    plan: Plan, optim: OptimSettings, bf16: bool, device: torch.device
) -> dict[str, str]:
    """Return what a dry run prints about a training."""
    warmup = round(optim.warmup_epochs * plan.epoch)  # longer than the run in some older runs
    peak = lr_at(min(warmup, plan.total), peak=peak_lr(optim), warmup=warmup, total=plan.total)
    return {
        "steps": f"{plan.steps:,} of {plan.batch_size} images, {plan.total:,} images seen",
        "learning rate": f"{peak:.3g} at its peak",
        "computed in": f"{'bfloat16' if bf16 else 'float32'} on {device}",
    }


def transform_of(config: Settings) -> CropTransform:
    """Return the transform of the training images."""
    data = config.data
    return CropTransform(data.img_size, data.in_chans, data.crop, data.flip)
