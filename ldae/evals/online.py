"""A linear head trained on the features of images that are augmented anew in every epoch."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import Lars
from tyro.conf import Fixed

from ldae.console import print_main
from ldae.data.loader import Batch, train_batches
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.distributed import all_reduce_sum, barrier, is_main, rank, world_size
from ldae.errors import InputError
from ldae.evals.features import Encoder, known_labels
from ldae.evals.heads import Heads
from ldae.evals.protocol import Protocol
from ldae.evals.taps import Tap
from ldae.files import state_hash
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.folder import names_hash
from ldae.runs.lock import locked
from ldae.runs.metrics import Metrics
from ldae.settings import ExecutionSettings, OptimSettings
from ldae.train.loop import Loop, Plan
from ldae.train.optim import peak_lr
from ldae.tree import COUNT, NOT_NEGATIVE, POSITIVE

_LOG_IMAGES = 2**14  # between two lines of progress


@dataclass(frozen=True)
class OnlineProtocol(Protocol):
    """The constants of a probe on augmented images. Source: MAE, main_linprobe.py and FINETUNE.md."""

    name: Fixed[str]
    blr: Annotated[float, POSITIVE]
    """Learning rate at a batch of 256: lr = blr * total_batch / 256."""
    optimizer: Literal["lars", "sgd", "adamw"]
    """Optimizer of the head."""
    version: Fixed[int] = 1
    epochs: Annotated[int, COUNT] = 90
    """Passes over the images of train."""
    warmup_epochs: Annotated[int, NOT_NEGATIVE] = 10
    """Passes of linear warm-up, before a half-cosine to 0 in every update."""
    total_batch: Annotated[int, COUNT] = 16_384
    """Images of one update, over all devices."""
    batchnorm_batch: Fixed[int] = 512
    """Images of BatchNorm's statistics, as MAE ran it on 32 GPUs; the running ones see each in turn."""
    momentum: Fixed[float] = 0.9
    """Of lars and sgd."""
    trust_coefficient: Fixed[float] = 0.001
    """Of lars, for the weight; the bias is not adapted."""
    betas: Fixed[tuple[float, float]] = (0.9, 0.999)
    """Of adamw."""
    weight_decay: Fixed[float] = 0.0
    crop_area: Fixed[tuple[float, float]] = (0.08, 1.0)
    """Part of an image that a crop keeps; a crop too wide or too high is cut, not drawn again."""
    flip: Fixed[bool] = True
    batchnorm_eps: Fixed[float] = 1e-6
    init_std: Fixed[float] = 0.01
    seed: Fixed[int] = 0
    """Of the initial weights, the order of the images and their augmentation."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (Tap(),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"warmup_epochs must be fewer than epochs: {self.warmup_epochs} of {self.epochs}"
            )


class Sizes(NamedTuple):
    """How a run over so many images is divided."""

    group: int
    """Images of BatchNorm's statistics."""
    groups: int
    """Groups of one update."""
    updates: int

    @property
    def batch(self) -> int:
        """Images of one update."""
        return self.group * self.groups

    @property
    def shares(self) -> int:
        """Equal parts of an update's groups, of which rank r computes part r % shares.

        Where there are fewer parts than ranks, several ranks compute the same one, which does not
        change the mean gradient.
        """
        return math.gcd(self.groups, world_size())


def sizes(images: int, protocol: OnlineProtocol) -> Sizes:
    """Return the protocol's own sizes, or the largest whole groups that a smaller set fills.

    Raises: InputError for a batch that is no whole number of groups.
    """
    group = min(protocol.batchnorm_batch, protocol.total_batch)
    if protocol.total_batch % group:
        raise InputError(
            f"total_batch {protocol.total_batch} is no whole number of BatchNorm's batches of "
            f"{group}"
        )
    group = min(group, images)
    groups = min(protocol.total_batch // group, images // group)
    updates = -(-protocol.epochs * images // (group * groups))
    return Sizes(group, groups, updates)


def check_sizes(encoder: Encoder, images: int, protocol: OnlineProtocol) -> None:
    """Report a batch that a small set cannot fill.

    Raises: InputError as ``sizes`` does, and for a backbone whose images are not squares.
    """
    _, height, width = encoder.transform.input_size
    if height != width:
        raise InputError(f"the protocol {protocol.name} crops squares, not {width} x {height}")
    found = sizes(images, protocol)
    if found.batch < protocol.total_batch:
        print_main(
            f"{protocol.name}: {images:,} train images are fewer than a batch of "
            f"{protocol.total_batch:,}; it is {found.batch:,} here, {found.groups} of "
            f"BatchNorm's batches of {found.group}"
        )


class _Probe(Heads):
    """One head behind a frozen encoder, which is not part of the state. A batch is one group."""

    def __init__(
        self,
        encoder: Encoder,
        source: Source,
        protocol: OnlineProtocol,
        classes: int,
        batch_size: int,
    ) -> None:
        super().__init__(1, encoder.dim, classes, protocol)
        self.encoder, self.source, self.batch_size = encoder, source, batch_size
        self.sizes = sizes(len(source), protocol)
        self.statistics: list[torch.Tensor] = []  # of this rank's groups in the current update

    def forward(
        self, images: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean cross-entropy of uint8 images (B, C, H, W) and labels (B,), a scalar.

        Raises: InputError when features are not finite.
        """
        parts = images.split(self.batch_size)
        features = torch.cat([self.encoder.on_device(part) for part in parts])  # (B, D)
        if not features.isfinite().all():
            raise InputError(
                f"the features of an augmented image of {self.source.spec} in "
                f"{self.encoder.precision} are not finite"
            )
        mean, var = features.mean(0), features.var(0, correction=0)
        self.statistics.append(torch.stack([mean, var]))
        logits = self.logits(self.normalise(features, mean, var))  #              (B, 1, C)
        return F.cross_entropy(logits[:, 0], labels)

    def after_step(self) -> None:
        """Move the running statistics by those of each group, in the order of the groups."""
        own, self.statistics = torch.stack(self.statistics), []  #                (groups, 2, D)
        dealt = own.new_zeros(len(own), self.sizes.shares, *own.shape[1:])
        if rank() < self.sizes.shares:
            dealt[:, rank()] = own
        for mean, var in all_reduce_sum(dealt).flatten(0, 1):
            self.track(mean, var, self.sizes.group)


def train_online(
    encoder: Encoder,
    source: Source,
    protocol: OnlineProtocol,
    batch_size: int,
    workers: int,
    folder: Path,
) -> tuple[Heads, dict]:
    """Train a head as the protocol says, in ``folder``.

    BatchNorm sees one group of the endless training order after the other, whatever the number of
    ranks and ``batch_size``, the images that go through the backbone at once.

    The folder holds the checkpoints and the metrics of the training until ``forget``. The same call
    again resumes, bit for bit on as many ranks. Checkpoints of another protocol, backbone or source
    are removed.

    Returns: the head, and for the results the learning rate and the sizes it was trained with.

    Raises: InputError when features or the loss are not finite; Interrupted when a signal asked to
        stop.
    """
    found, device = sizes(len(source), protocol), encoder.device
    plan = Plan(len(source), found.updates * found.batch, found.batch, found.groups // found.shares)
    optim = OptimSettings(found.batch, protocol.blr, protocol.epochs, protocol.warmup_epochs)
    classes = int(known_labels(source).max()) + 1
    probe = _Probe(encoder, source, protocol, classes, batch_size).to(device)
    describe = {
        "protocol": asdict(protocol) | {"precision": encoder.precision},
        "backbone": state_hash(encoder.model.state_dict()),
        "images": names_hash(source),
    }
    chans, side, _ = encoder.transform.input_size
    transform = CropTransform(
        side, chans, "random", protocol.flip, area=protocol.crop_area, clip=True
    )

    def batches_from(start: int) -> Iterator[Batch]:
        return train_batches(
            source,
            transform,
            seed=protocol.seed,
            start=start,
            stop=plan.total,
            batch_size=plan.batch_size,
            micro_batches=plan.micro_batches,
            rank=rank() % found.shares,
            world_size=found.shares,
            workers=workers,
            pin_memory=device.type == "cuda",
        )

    with locked(folder):
        checkpoints = Checkpoints(folder, keep=1)
        if checkpoints.describe() not in (None, describe):
            forget(folder)
        barrier()  # no rank loads what another one removes
        trained = Loop(
            probe,
            batches_from,
            plan,
            optim,
            ExecutionSettings(log_every=max(1, _LOG_IMAGES // found.batch)),
            device=device,
            checkpoints=checkpoints,
            open_metrics=lambda seen: Metrics(checkpoints.folder, seen),
            describe=describe,
            optimizer=lambda heads, _: optimizer_of(heads, protocol),
        ).train()
    heads = Heads(1, encoder.dim, classes, protocol).to(device)
    heads.load_state_dict(trained.state_dict())
    record = {"learning_rate": peak_lr(optim), "batch": found.batch, "batchnorm_batch": found.group}
    return heads.eval(), record | {"images_seen": plan.total}


def forget(folder: Path) -> None:
    """Remove what a training kept in ``folder``, once the result is written."""
    if is_main():
        shutil.rmtree(Checkpoints(folder).folder, ignore_errors=True)


def optimizer_of(heads: Heads, protocol: OnlineProtocol) -> torch.optim.Optimizer:
    """Return the optimizer of the head; the loop sets the learning rate before each step.

    timm's LARS is MAE's, which multiplies by the learning rate after the momentum. For that, the
    trust ratio is asked for in spite of a decay of 0, for the weight alone, and no epsilon is added
    to its denominator.
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
