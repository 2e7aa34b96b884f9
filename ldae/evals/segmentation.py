"""A linear head on token maps: trained on maps extracted once, graded pixel by pixel."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tyro.conf import Fixed

from ldae.console import progress
from ldae.data.loader import Transform, eval_batches
from ldae.data.source import IGNORED, MapSource, Source
from ldae.devices import report_low_memory
from ldae.distributed import all_reduce_sum, rank, share_of, world_size
from ldae.errors import InputError
from ldae.evals.features import Encoder, allocate_rows
from ldae.evals.heads import Heads
from ldae.evals.protocol import Protocol
from ldae.train.optim import lr_at, set_lr
from ldae.tree import COUNT, DECAY, NOT_NEGATIVE, POSITIVE


def confusion_matrix(labels: torch.Tensor, predicted: torch.Tensor, classes: int) -> torch.Tensor:
    """Count the pixels by their class (row) and predicted class (column), int64 (classes, classes).

    Both arguments are class maps of one shape; pixels that ``labels`` ignores are not counted.
    """
    known = labels != IGNORED
    pairs = labels[known].long() * classes + predicted[known]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def iou_metrics(matrix: torch.Tensor) -> dict:
    """Return mean IoU, pixel accuracy and the IoU of each class in percent.

    The mean is over the classes that occur in the labels or the predictions. The IoU of the other
    classes is None.
    """
    matrix = matrix.cpu().double()
    right = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - right
    iou = 100 * right / union  # NaN for a class that does not occur
    return {
        "miou": iou[union > 0].mean().item(),
        "pixel_accuracy": (100 * right.sum() / matrix.sum()).item(),
        "classes_counted": int((union > 0).sum()),
        "iou": [None if math.isnan(value) else value for value in iou.tolist()],
    }


# At most so many up-sampled logits at once, to bound memory; the numbers do not depend on it.
_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class SegmentProtocol(Protocol):
    """BatchNorm and a 1x1 convolution on the tokens of the last block, trained by AdamW.

    Source: the linear head of DINOv2, eval/segmentation, for the batch of 16 and the share of
    warm-up. In contrast to DINOv2, images are neither cropped nor augmented, there are a quarter of
    the steps, the rate falls by a cosine, and BatchNorm has no affine, which the convolution behind
    it can express.
    """

    name: Fixed[str] = "linear"
    version: Fixed[int] = 1
    classes: Annotated[int | None, COUNT] = None
    """Number of classes; by default one more than the highest label of train."""
    steps: Annotated[int, COUNT] = 10_000
    """Steps of the head's training."""
    total_batch: Annotated[int, COUNT] = 16
    """Images of one step and of BatchNorm's statistics."""
    learning_rate: Annotated[float, POSITIVE] = 1e-3
    """Peak learning rate, after the warm-up."""
    warmup: Annotated[Fixed[float], DECAY] = 0.0375
    """Linear warm-up as a share of the steps, before a half-cosine to 0."""
    optimizer: Fixed[str] = "adamw"
    betas: Fixed[tuple[float, float]] = (0.9, 0.999)
    weight_decay: Annotated[Fixed[float], NOT_NEGATIVE] = 1e-4
    """Decay of weight and bias."""
    batchnorm_eps: Fixed[float] = 1e-5
    init_std: Fixed[float] = 0.01
    tokens: Fixed[str] = "last block, behind the final norm"
    pixel_patch: Fixed[int] = 4
    """Side in pixels of the patches that are the tokens of raw pixels."""
    resize: Fixed[str] = "squash"
    """Images are stretched to the network's input, and so are label maps in training (nearest)."""
    augmentation: Fixed[str] = "none"
    upsampling: Fixed[str] = "bilinear"
    """Logits are up-sampled to the network's input in training, else to each label map's size."""
    ignored: Fixed[int] = IGNORED
    mean_over: Fixed[str] = "classes in the labels or predictions of evaluation"
    seed: Fixed[int] = 0
    """Seed of the initial weights and of the order of the images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is not None and not 2 <= self.classes <= IGNORED:
            raise InputError(f"classes must be 2 to {IGNORED}, not {self.classes}")

    @property
    def headlines(self) -> tuple[str, ...]:
        return ("miou", "pixel_accuracy")


class TokenMaps(NamedTuple):
    """Token maps and label maps of this rank's share of the images."""

    tokens: torch.Tensor
    """float32 (N, h * w * D)."""
    labels: torch.Tensor
    """uint8 (N, H * W), at the size of the network's input."""
    shape: tuple[int, int, int]
    """h, w, D."""
    size: tuple[int, int]
    """H, W."""


@dataclass(frozen=True)
class ResizeNearest:
    """A transform of a label map to H x W pixels by nearest neighbour: uint8 (H * W,)."""

    size: tuple[int, int]

    def __call__(self, labels: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        height, width = self.size
        resized = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
        return torch.from_numpy(np.asarray(resized).copy()).flatten()


def unchanged(labels: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Return a label map as it is, uint8 (H, W)."""
    return torch.from_numpy(np.ascontiguousarray(labels))


class _Maps(Source):
    """A source that has the label maps of another one as its images."""

    def __init__(self, source: MapSource) -> None:
        super().__init__(source.spec, source.split, None, None)
        self._source = source
        self.name, self.where, self.image = source.name, source.where, source.label_map

    def __len__(self) -> int:
        return len(self._source)


def label_maps(
    source: MapSource, transform: Transform, batch_size: int, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this rank's label maps, transformed from (H, W), and their indices, in batches."""
    share = share_of(len(source))
    for maps, _, indices in eval_batches(_Maps(source), transform, share, batch_size, workers):
        yield maps, indices


def load_label_share(
    source: MapSource, size: tuple[int, int], batch_size: int, workers: int
) -> torch.Tensor:
    """Return this rank's label maps at H x W pixels, uint8 (N, H * W)."""
    count = len(share_of(len(source)))
    rows = allocate_rows(count, size[0] * size[1], torch.uint8)
    for maps, indices in label_maps(source, ResizeNearest(size), batch_size, workers):
        rows[indices // world_size()] = maps
    return rows


def train_map_head(
    train: TokenMaps, images: int, classes: int, protocol: SegmentProtocol, device: torch.device
) -> Heads:
    """Train a head on the shares of all ranks, ``images`` together; return it after the last step.

    The logits of a batch are up-sampled to the label maps, and the loss is the mean cross-entropy
    over the labelled pixels. A short last batch is left out, as in ``train_heads``.

    Raises: InputError when the device has too little memory.
    """
    height, width, dim = train.shape
    heads = Heads(1, dim, classes, protocol).to(device)
    optimizer = torch.optim.AdamW(
        heads.parameters(), lr=0.0, betas=protocol.betas, weight_decay=protocol.weight_decay
    )
    piece = max(_LOGITS_AT_ONCE // (classes * train.size[0] * train.size[1]), 1)
    warmup = round(protocol.warmup * protocol.steps)
    at_once = f"the token maps of {protocol.total_batch} images"
    with (
        progress(protocol.steps, "head") as bar,
        report_low_memory(device, at_once, "--total-batch"),
    ):
        for step, batch in zip(range(protocol.steps), _batches(images, protocol)):
            share = batch[batch % world_size() == rank()] // world_size()
            tokens = train.tokens[share].to(device).view(-1, dim)
            normed = heads.normalise_batch(tokens, len(batch) * height * width)
            normed = normed.view(-1, height, width, dim)
            labels = train.labels[share].to(device).view(-1, *train.size).long()
            pixels = all_reduce_sum((labels != IGNORED).sum()).clamp(min=1)
            optimizer.zero_grad()
            for tokens, targets in zip(normed.split(piece), labels.split(piece)):
                logits = upsample(map_logits(heads, tokens), train.size)
                loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
                (loss / pixels).backward()
            for value in heads.parameters():  # a rank without images has no gradient
                gradient = torch.zeros_like(value) if value.grad is None else value.grad
                value.grad = all_reduce_sum(gradient)
            rate = lr_at(step, peak=protocol.learning_rate, warmup=warmup, total=protocol.steps)
            set_lr(optimizer, rate)
            optimizer.step()
            bar.update()
    return heads.eval()


def _batches(images: int, protocol: SegmentProtocol) -> Iterator[torch.Tensor]:
    """Yield batches of image indices without end, each image at most once an epoch."""
    generator = torch.Generator().manual_seed(protocol.seed)
    while True:
        order = torch.randperm(images, generator=generator).split(protocol.total_batch)
        yield from order[: max(images // protocol.total_batch, 1)]


def map_logits(heads: Heads, normed: torch.Tensor) -> torch.Tensor:
    """Apply the head to tokens behind BatchNorm: (B, h, w, D) -> (B, classes, h, w)."""
    return heads.logits(normed.flatten(0, 2))[:, 0].unflatten(0, normed.shape[:3]).movedim(-1, 1)


def upsample(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (B, classes, h, w) -> (B, classes, H, W), with pixels as areas, not as points."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def predict(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the class of every pixel, int64 (H, W), from the logits of an image (classes, h, w).

    Of equal logits the smaller class wins. Classes are up-sampled in parts, to bound memory.
    """
    best = logits.new_full(size, -torch.inf)
    predicted = torch.zeros(size, dtype=torch.int64, device=logits.device)
    first = 0
    for part in logits.split(max(_LOGITS_AT_ONCE // (size[0] * size[1]), 1)):
        value, number = upsample(part[None], size)[0].max(0)
        better = value > best
        best, predicted = best.where(~better, value), predicted.where(~better, number + first)
        first += len(part)
    return predicted


@torch.inference_mode()
def grade_map_head(heads: Heads, encoder: Encoder, source: MapSource) -> torch.Tensor:
    """Return the confusion matrix over all label maps of ``source``, at their own sizes.

    Each labelled pixel counts once over all ranks. Nothing is kept of an image once it is graded.

    Raises: InputError when the device has too little memory, and as ``Encoder`` does.
    """
    classes, device, shape = heads.bias.shape[1], encoder.device, encoder.reader.shape
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    maps = label_maps(source, unchanged, 1, encoder.workers)  # one at a time: their sizes differ
    for rows, _ in encoder.share(source):
        with report_low_memory(device, f"the maps of {len(rows)} images", "--batch-size"):
            normed = heads.norm(rows.to(device).view(-1, shape[2])).view(-1, *shape)
            for logits, (labels, _) in zip(map_logits(heads, normed), maps):
                labels = labels[0].to(device)
                matrix += confusion_matrix(labels, predict(logits, labels.shape), classes)
    return all_reduce_sum(matrix)
