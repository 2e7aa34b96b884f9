"""A linear head trained on frozen features of images that are augmented anew in every epoch."""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import Lars
from tyro.conf import Fixed

from ldae.console import print_main
from ldae.data.loader import train_batches
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.data.workers import Batch
from ldae.distributed import all_reduce_sum, barrier, is_main, rank, world_size
from ldae.errors import InputError
from ldae.evals.features import Encoder, known_labels
from ldae.evals.heads import Heads
from ldae.evals.protocol import Protocol
from ldae.evals.taps import Tap
from ldae.files import as_json, state_hash
from ldae.runs import layout
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.identity import LABELS_HASH, NAMES_HASH, images_hashes, labels_hash
from ldae.runs.lock import locked
from ldae.runs.metrics import Metrics
from ldae.settings import ExecutionSettings, OptimSettings
from ldae.train.loop import Loop
from ldae.train.optim import peak_lr
from ldae.train.plan import Plan
from ldae.tree import COUNT, NOT_NEGATIVE, POSITIVE

_LOG_IMAGES = 2**14  # images between two lines of progress


@dataclass(frozen=True)
class AugmentedProtocol(Protocol):
    """The constants of a probe on augmented images. Source: MAE, main_linprobe.py, FINETUNE.md."""

    name: Fixed[str]
    blr: Annotated[float, POSITIVE]
    """Learning rate at a batch of 256: lr = blr * total_batch / 256."""
    optimizer: Literal["lars", "sgd", "adamw"]
    """Optimizer of the head."""
    version: Fixed[int] = 1
    epochs: Annotated[int, COUNT] = 90
    """Passes over the train images."""
    warmup_epochs: Annotated[int, NOT_NEGATIVE] = 10
    """Epochs of linear warm-up, before a half-cosine to 0. Both change in every update."""
    total_batch: Annotated[int, COUNT] = 16_384
    """Images of one update, over all devices."""
    batchnorm_batch: Fixed[int] = 512
    """Images of BatchNorm's statistics, as in MAE's run on 32 GPUs. The running statistics follow
    one such group after the other."""
    momentum: Fixed[float] = 0.9
    """Momentum of lars and sgd."""
    trust_coefficient: Fixed[float] = 0.001
    """Trust coefficient of lars, for the weight; the bias is not adapted."""
    betas: Fixed[tuple[float, float]] = (0.9, 0.999)
    """Betas of adamw."""
    weight_decay: Fixed[float] = 0.0
    crop_area: Fixed[tuple[float, float]] = (0.08, 1.0)
    """Share of an image that a crop keeps. A crop too wide or too high is cut, not drawn again."""
    flip: Fixed[bool] = True
    batchnorm_eps: Fixed[float] = 1e-6
    init_std: Fixed[float] = 0.01
    seed: Fixed[int] = 0
    """Seed of the initial weights, of the order of the images and of their augmentation."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (Tap(),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"warmup_epochs must be fewer than epochs: {self.warmup_epochs} of {self.epochs}"
            )


class BatchSizes(NamedTuple):
    """The division of a training into updates, and of an update into groups for BatchNorm."""

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

        With fewer parts than ranks, several ranks compute the same part, and the mean gradient is
        the same.
        """
        return math.gcd(self.groups, world_size())


def batch_sizes(images: int, protocol: AugmentedProtocol) -> BatchSizes:
    """Return the protocol's sizes, or the largest whole groups that fit a smaller set of images.

    Raises: InputError when the batch is not a multiple of the group.
    """
    group = min(protocol.batchnorm_batch, protocol.total_batch)
    if protocol.total_batch % group:
        raise InputError(
            f"total_batch {protocol.total_batch} is not a multiple of BatchNorm's batch of {group}"
        )
    group = min(group, images)
    groups = min(protocol.total_batch // group, images // group)
    updates = -(-protocol.epochs * images // (group * groups))
    return BatchSizes(group, groups, updates)


def check_batch_sizes(encoder: Encoder, images: int, protocol: AugmentedProtocol) -> None:
    """Report when the train images do not fill a batch.

    Raises: InputError as ``batch_sizes`` does, and for a backbone of images that are not square.
    """
    _, height, width = encoder.transform.input_size
    if height != width:
        raise InputError(f"the protocol {protocol.name} crops squares, not {width} x {height}")
    division = batch_sizes(images, protocol)
    if division.batch < protocol.total_batch:
        print_main(
            f"{protocol.name}: {images:,} train images are fewer than a batch of "
            f"{protocol.total_batch:,}; a batch is {division.batch:,} here, {division.groups} of "
            f"BatchNorm's batches of {division.group}"
        )


class _Probe(Heads):
    """A head behind a frozen encoder. The encoder is not saved. A micro-batch is a group."""

    def __init__(
        self,
        encoder: Encoder,
        source: Source,
        protocol: AugmentedProtocol,
        classes: int,
    ) -> None:
        super().__init__(1, encoder.dim, classes, protocol)
        self.encoder, self.source = encoder, source
        self.sizes = batch_sizes(len(source), protocol)
        self.statistics: list[torch.Tensor] = []  # of this rank's groups in the current update

    def forward(
        self, images: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean cross-entropy of uint8 images (B, C, H, W) and labels (B,), a scalar.

        Raises: InputError when features are not finite.
        """
        parts = images.split(self.encoder.batch_size)
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
        """Update the running statistics with the statistics of each group, in order."""
        share, self.statistics = torch.stack(self.statistics), []  #              (groups, 2, D)
        every = share.new_zeros(len(share), self.sizes.shares, *share.shape[1:])
        if rank() < self.sizes.shares:
            every[:, rank()] = share
        for mean, var in all_reduce_sum(every).flatten(0, 1):
            self.track(mean, var, self.sizes.group)


def train_on_augmented(
    encoder: Encoder,
    source: Source,
    protocol: AugmentedProtocol,
    folder: Path,
) -> tuple[Heads, dict]:
    """Train a head by the protocol; ``folder`` holds checkpoints and metrics meanwhile.

    BatchNorm sees one group of the training order after the other, for any number of ranks and any
    batch size of the encoder, the number of images that go through the backbone at once.

    The same call again resumes, on a CPU bit for bit with as many ranks, until ``remove_training``.
    Checkpoints of another protocol, backbone, preprocessing, images or labels are removed.

    Returns: the head; and its learning rate, sizes and images seen, for the results.

    Raises: InputError when features or the loss are not finite; Interrupted when a signal asked to
        stop.
    """
    division, device = batch_sizes(len(source), protocol), encoder.device
    batch, micro_batches = division.batch, division.groups // division.shares
    plan = Plan(len(source), division.updates * batch, batch, micro_batches)
    optim = OptimSettings(batch, protocol.blr, protocol.epochs, protocol.warmup_epochs)
    classes = int(known_labels(source).max()) + 1
    probe = _Probe(encoder, source, protocol, classes).to(device)
    images = images_hashes(source)
    describe = {
        "protocol": asdict(protocol) | {"precision": encoder.precision},
        "backbone": state_hash(encoder.model.state_dict()),
        "images": images.pop(NAMES_HASH),
        **images,
        LABELS_HASH: labels_hash(source),
        "preprocessing": as_json(asdict(encoder.transform)),
    }
    chans, side, _ = encoder.transform.input_size
    transform = CropTransform(
        side, chans, "random", protocol.flip, area=protocol.crop_area, clip=True
    )

    def batches_from(start: int, micro_batches: int) -> Iterator[Batch]:
        return train_batches(
            source,
            transform,
            seed=protocol.seed,
            start=start,
            stop=plan.total,
            batch_size=plan.batch_size,
            micro_batches=micro_batches,
            rank=rank() % division.shares,
            world_size=division.shares,
            workers=encoder.workers,
            pin_memory=device.type == "cuda",
        )

    with locked(folder):
        checkpoints = Checkpoints(folder, keep=1)
        before = checkpoints.describe() or {}  # in older ones, fewer entries
        if not before.items() <= describe.items():
            remove_training(folder)
        barrier()  # so that no rank loads a checkpoint that another one removes
        trained = Loop(
            probe,
            batches_from,
            plan,
            optim,
            ExecutionSettings(log_every=max(1, _LOG_IMAGES // batch)),
            device=device,
            checkpoints=checkpoints,
            open_metrics=lambda seen: Metrics(checkpoints.folder, seen),
            describe=describe,
            optimizer=lambda heads, _: optimizer_of(heads, protocol),
        ).train()
    heads = Heads(1, encoder.dim, classes, protocol).to(device)
    heads.load_state_dict(trained.state_dict())
    return heads.eval(), {
        "learning_rate": peak_lr(optim),
        "batch": batch,
        "batchnorm_batch": division.group,
        "images_seen": plan.total,
    }


def remove_training(folder: Path) -> None:
    """Remove a training's checkpoints and metrics from ``folder``, once the result is written.

    Other files stay, as in a folder checkpoints/ that was there before.
    """
    if is_main():
        checkpoints = Checkpoints(folder)
        saved = checkpoints.folder.glob(f"{layout.CHECKPOINT}*.pt*")  # partial ones too
        for path in (*saved, checkpoints.folder / layout.METRICS):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # it is not there, or not empty
            checkpoints.folder.rmdir()


def optimizer_of(heads: Heads, protocol: AugmentedProtocol) -> torch.optim.Optimizer:
    """Return the optimizer of the head; the loop sets the learning rate before each step.

    timm's LARS equals MAE's, which multiplies by the learning rate after the momentum, with two
    settings: ``always_adapt`` for the weight alone, because the decay is 0, and no epsilon in the
    denominator of the trust ratio.
    """
    weight = {"params": [heads.weight], "weight_decay": protocol.weight_decay}
    bias = {"params": [heads.bias], "weight_decay": 0.0}
    if protocol.optimizer == "lars":
        groups = [weight | {"always_adapt": True}, bias | {"always_adapt": False}]
        trust = protocol.trust_coefficient
        return Lars(groups, lr=0.0, momentum=protocol.momentum, trust_coeff=trust, eps=0.0)
    if protocol.optimizer == "sgd":
        return torch.optim.SGD([weight, bias], lr=0.0, momentum=protocol.momentum)
    return torch.optim.AdamW([weight, bias], lr=0.0, betas=protocol.betas)
