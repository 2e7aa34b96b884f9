"""A linear head trained on the features of images that are augmented anew in every epoch."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from timm.optim import Lars
from torch.optim import Optimizer

from ldae.console import progress
from ldae.data.loader import Batch, train_batches
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.distributed import all_reduce_sum, is_main, rank, world_size
from ldae.errors import InputError
from ldae.evals.features import Encoder, known_labels
from ldae.evals.heads import Heads
from ldae.evals.taps import Tap
from ldae.files import state_hash
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.folder import names_hash
from ldae.runs.lock import locked
from ldae.train.interrupt import Interrupted, StopRequest
from ldae.train.optim import lr_at, set_lr
from ldae.tree import COUNT, NOT_NEGATIVE, POSITIVE, check

_SAVE_SECONDS = 600.0  # between two checkpoints of a training


@dataclass(frozen=True)
class OnlineProtocol:
    """Every constant of the number. Source: MAE, main_linprobe.py and FINETUNE.md."""

    name: str
    blr: Annotated[float, POSITIVE]
    """Learning rate at a batch of 256: lr = blr * total_batch / 256."""
    optimizer: Literal["lars", "sgd", "adamw"]
    version: int = 1
    epochs: Annotated[int, COUNT] = 90
    warmup_epochs: Annotated[int, NOT_NEGATIVE] = 10
    """Of linear warm-up, before a half-cosine to 0 in every update."""
    total_batch: Annotated[int, COUNT] = 16_384
    """Images of one update, over all devices."""
    batchnorm_batch: int = 512
    """Images of BatchNorm's statistics, as MAE ran it on 32 GPUs; the running ones see each in turn."""
    momentum: float = 0.9
    """Of lars and sgd."""
    trust_coefficient: float = 0.001
    """Of lars, for the weight; the bias is not adapted."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adamw."""
    weight_decay: float = 0.0
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Part of an image that a crop keeps; a crop too wide or too high is cut, not drawn again."""
    flip: bool = True
    batchnorm_eps: float = 1e-6
    init_std: float = 0.01
    seed: int = 0
    """Of the initial weights, the order of the images and their augmentation."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (Tap(),)

    def __post_init__(self) -> None:
        check(self)
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"warmup_epochs must be fewer than epochs: {self.warmup_epochs} of {self.epochs}"
            )


class Sizes(NamedTuple):
    """How a run over so many images is divided."""

    group: int
    """Images of BatchNorm's statistics."""
    groups: int
    """Of one update."""
    updates: int

    @property
    def batch(self) -> int:
        return self.group * self.groups


def sizes(images: int, protocol: OnlineProtocol) -> Sizes:
    """The protocol's own, or the largest whole groups that a smaller set fills.

    Raises: InputError for a batch that is no whole number of groups.
    """
    group = min(protocol.batchnorm_batch, protocol.total_batch)
    if protocol.total_batch % group:
        raise InputError(
            f"total_batch {protocol.total_batch} is no whole number of BatchNorm's batches of {group}"
        )
    group = min(group, images)
    groups = min(protocol.total_batch // group, images // group)
    updates = -(-protocol.epochs * images // (group * groups))
    return Sizes(group, groups, updates)


def check_sizes(encoder: Encoder, images: int, protocol: OnlineProtocol) -> None:
    """Tell of a batch that a small set can not fill.

    Raises: InputError as ``sizes`` does, and for a backbone of images that are no squares.
    """
    _, height, width = encoder.transform.input_size
    if height != width:
        raise InputError(f"the protocol {protocol.name} crops squares, not {width} x {height}")
    found = sizes(images, protocol)
    if found.batch < protocol.total_batch and is_main():
        print(
            f"{protocol.name}: {images:,} train images are fewer than a batch of "
            f"{protocol.total_batch:,}; it is {found.batch:,} here, {found.groups} of "
            f"BatchNorm's batches of {found.group}",
            flush=True,
        )


def train_online(
    encoder: Encoder,
    source: Source,
    protocol: OnlineProtocol,
    batch_size: int,
    workers: int,
    folder: Path | None = None,
) -> tuple[Heads, dict]:
    """The head after the last epoch, and the sizes and the rate that it was trained with.

    The group of images that BatchNorm sees is group ``g`` of the endless training order, whatever
    the ranks and ``batch_size``, the images that go through the backbone at once: each group is one
    rank's, g mod world size, and its statistics move the running ones in the order of groups.

    In the ``folder``, where there is one, the training is kept: the same call again goes on from
    there, bit for bit on as many ranks, and once it has ended has its result at once.

    Raises: InputError when features are not finite; Interrupted when a signal asked to stop, and there
        is a folder.
    """
    found, device = sizes(len(source), protocol), encoder.device
    classes = int(known_labels(source).max()) + 1
    heads = Heads(1, encoder.dim, classes, protocol).to(device)
    optimizer = optimizer_of(heads, protocol)
    peak, images = protocol.blr * found.batch / 256, found.updates * found.batch
    warmup = protocol.warmup_epochs * len(source)
    describe = {
        "protocol": asdict(protocol) | {"precision": encoder.precision},
        "backbone": state_hash(encoder.model.state_dict()) if folder else None,
        "images": names_hash(source) if folder else None,
    }
    with (
        _kept(folder, heads, optimizer, describe, found) as (done, keep),
        progress(images, f"{protocol.name} probe") as bar,
    ):
        bar.update(done * found.batch)
        batches = _groups(encoder, source, protocol, found, done * found.groups, workers)
        for update in range(done, found.updates):
            first = update * found.groups
            statistics = torch.zeros(found.groups, 2, encoder.dim, device=device)
            slopes = [torch.zeros_like(value) for value in (heads.weight, heads.bias)]
            for group in range(found.groups):
                if (first + group) % world_size() != rank():
                    continue
                batch = next(batches)
                features = _augmented(encoder, batch.images, batch_size, source)
                statistics[group] = torch.stack([features.mean(0), features.var(0, correction=0)])
                normed = heads.normalise(features, *statistics[group])
                labels = batch.targets.to(device)
                for total, slope in zip(slopes, heads.gradients(normed, labels, found.batch)):
                    total += slope
            for mean, var in all_reduce_sum(statistics):
                heads.track(mean, var, found.group)
            heads.weight.grad, heads.bias.grad = (all_reduce_sum(slope) for slope in slopes)
            seen = update * found.batch
            set_lr(optimizer, lr_at(seen, peak=peak, warmup=warmup, total=images))
            optimizer.step()
            bar.update(found.batch)
            keep(update + 1)
    record = {"learning_rate": peak, "batch": found.batch, "batchnorm_batch": found.group}
    return heads.eval(), record | {"images_seen": images}


@contextmanager
def _kept(
    folder: Path | None, heads: Heads, optimizer: Optimizer, describe: dict, found: Sizes
) -> Iterator[tuple[int, Callable[[int], None]]]:
    """The number of updates that are done, with their state in place, and what to call after each.

    What is in the folder counts only when it was described in the same way.
    """
    if folder is None:
        yield 0, lambda done: None
        return
    checkpoints = Checkpoints(folder, keep=1)
    with locked(folder), StopRequest() as stop:
        state, done = checkpoints.load_together(), 0
        if state and state["describe"] == describe:
            heads.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            done = state["images_seen"] // found.batch
        saved_at = time.monotonic()

        def keep(done: int) -> None:
            nonlocal saved_at
            late = is_main() and time.monotonic() - saved_at >= _SAVE_SECONDS
            asked = torch.tensor([stop.received > 0, late], device=heads.weight.device).float()
            stop_now, save_now = all_reduce_sum(asked).tolist()
            at_end = done == found.updates
            if not (stop_now or save_now or at_end):
                return
            if is_main():
                state = {"images_seen": done * found.batch, "model": heads.state_dict()}
                state |= {"optimizer": optimizer.state_dict(), "average": None}
                checkpoints.save(state | {"describe": describe})
            saved_at = time.monotonic()
            if stop_now and not at_end:
                raise Interrupted(
                    stop.received or signal.SIGTERM,
                    f"stopped after {done:,} of {found.updates:,} updates; they are saved, and the "
                    "same command goes on from here",
                )

        yield done, keep


def forget(folder: Path) -> None:
    """What a training kept in ``folder``, once its result is written down."""
    if is_main():
        shutil.rmtree(Checkpoints(folder).folder, ignore_errors=True)


def _groups(
    encoder: Encoder,
    source: Source,
    protocol: OnlineProtocol,
    found: Sizes,
    first: int,
    workers: int,
) -> Iterator[Batch]:
    """Batches of this rank's groups, one after the other, from group ``first`` on."""
    chans, side, _ = encoder.transform.input_size
    transform = CropTransform(
        side, chans, "random", protocol.flip, area=protocol.crop_area, clip=True
    )
    # The loader deals the groups out in rounds of one to each rank.
    start = first // world_size() * world_size()
    batches = train_batches(
        source,
        transform,
        seed=protocol.seed,
        start=start * found.group,
        stop=found.updates * found.batch,
        batch_size=found.group * world_size(),
        rank=rank(),
        world_size=world_size(),
        workers=workers,
        pin_memory=encoder.device.type == "cuda",
    )
    if start + rank() < first:
        next(batches)
    return batches


def _augmented(
    encoder: Encoder, images: torch.Tensor, batch_size: int, source: Source
) -> torch.Tensor:
    """Features (B, D), on the device."""
    features = torch.cat([encoder.on_device(part) for part in images.split(batch_size)])
    if not features.isfinite().all():
        raise InputError(
            f"the features of an augmented image of {source.spec} in {encoder.precision} are not "
            "finite"
        )
    return features


def optimizer_of(heads: Heads, protocol: OnlineProtocol) -> torch.optim.Optimizer:
    """The optimizer of the head; its rate is set before each step.

    timm's LARS is MAE's, with the rate outside of the momentum, when the trust ratio is asked for in
    spite of a decay of 0, for the weight alone, and no epsilon is added to its denominator.
    """
    decay = {"weight_decay": protocol.weight_decay}
    if protocol.optimizer == "lars":
        groups = [
            {"params": [heads.weight], "always_adapt": True, **decay},
            {"params": [heads.bias], "always_adapt": False, "weight_decay": 0.0},
        ]
        trust = protocol.trust_coefficient
        return Lars(groups, lr=0.0, momentum=protocol.momentum, trust_coeff=trust, eps=0.0)
    groups = [
        {"params": [heads.weight], **decay},
        {"params": [heads.bias], "weight_decay": 0.0},
    ]
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=protocol.momentum)
    return torch.optim.AdamW(groups, lr=0.0, betas=protocol.betas)
