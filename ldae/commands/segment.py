"""The verb that grades a backbone's token map: a linear head that names the class of every pixel."""

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
import tyro

from ldae.console import progress
from ldae.data.label_maps import open_map_splits
from ldae.data.source import IGNORED, MapSource
from ldae.distributed import all_reduce_sum, rank, world_size
from ldae.errors import InputError
from ldae.evals.dense import (
    TokenMaps,
    grade_map_head,
    label_maps,
    own_label_rows,
    rates,
    train_map_head,
)
from ldae.evals.evaluation import BackboneSpec, Evaluation, Setup, SourceSpec, open_evaluation
from ldae.evals.features import Encoder, own_features
from ldae.evals.taps import TokenMapReader
from ldae.tree import COUNT, DECAY, NOT_NEGATIVE, POSITIVE, check

_MAPS_AT_ONCE = 16


@dataclass(frozen=True)
class SegmentProtocol:
    """Every constant of the numbers.

    Source: the linear head of DINOv2, eval/segmentation: BatchNorm and a 1x1 convolution on the last
    block's tokens, AdamW, batch 16, the share of warm-up. Other than there, images are neither
    cropped nor augmented, the steps are a quarter, the rate falls by a cosine and BatchNorm has no
    affine, which the convolution behind it can express.
    """

    name: str = "linear"
    version: int = 1
    steps: Annotated[int, COUNT] = 10_000
    total_batch: Annotated[int, COUNT] = 16
    """Images of one step, and of BatchNorm's statistics."""
    learning_rate: Annotated[float, POSITIVE] = 1e-3
    warmup: Annotated[float, DECAY] = 0.0375
    """Share of the steps, of linear warm-up, before a half-cosine to 0."""
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-4
    """Of weight and bias."""
    batchnorm_eps: float = 1e-5
    init_std: float = 0.01
    tokens: str = "last block, behind the final norm"
    pixel_patch: int = 4
    """Side of the patches of raw pixels that stand for tokens, in pixels."""
    resize: str = "squash"
    """Images, and in training label maps (nearest), are stretched to the network's input."""
    augmentation: str = "none"
    upsampling: str = "bilinear"
    """Of logits: in training to the network's input, in evaluation to each label map's own size."""
    ignored: int = IGNORED
    mean_over: str = "classes in the labels or predictions of evaluation"
    seed: int = 0
    """Of the initial weights and of the order of the images."""

    def __post_init__(self) -> None:
        check(self)


def segment(
    backbone: BackboneSpec,
    /,
    data: SourceSpec,
    eval_data: SourceSpec | None = None,
    *,
    classes: Annotated[int | None, COUNT] = None,
    steps: int = SegmentProtocol.steps,
    total_batch: int = SegmentProtocol.total_batch,
    learning_rate: float = SegmentProtocol.learning_rate,
    setup: Annotated[Setup, tyro.conf.arg(name="")] = Setup(),
) -> dict:
    """Grade a backbone's token map by a linear head that tells the class of every pixel.

    The data is a folder, .zip or .tar with images/ and labels/ beside each other, whose files have
    equal stems; label maps are grey or palette .png of the numbers of classes, 255 where nothing is
    known. train/ and val/ may lie above or below the two. scattered-digits has label maps too.

    The token maps of train are held once, in memory or from 2 GiB on in a file below TMPDIR.

    Args:
        backbone: a run folder, an exported folder, a timm name, NAME@FILE or pixels[:SIZE].
        data: the images with label maps whose train split is learned from.
        eval_data: the images to grade instead of the evaluation split of data.
        classes: how many there are; by default one more than the highest label of train.
        steps: of the head's training.
        total_batch: images of one step.
        learning_rate: the highest one.
        setup: how the backbone is opened and run.

    Returns: what results.json holds; its results are, in percent, the mean IoU over the classes in
    the labels or the predictions, the accuracy over pixels and the IoU of each class.

    Raises: InputError for a backbone or data that can not be graded.
    """
    protocol = SegmentProtocol(
        steps=steps, total_batch=total_batch, learning_rate=learning_rate, seed=setup.seed
    )
    if classes is not None and not 2 <= classes <= IGNORED:
        raise InputError(f"classes must be 2 to {IGNORED}, not {classes}")
    with open_evaluation("segment", backbone, data, eval_data, setup, open_map_splits) as graded:
        squashed = replace(graded.transform, crop_pct=1.0, crop_mode="squash")
        graded = replace(graded, transform=squashed)
        reader = TokenMapReader(graded.model, protocol.pixel_patch)
        encoder = Encoder(graded.model, graded.device, setup.precision, squashed, reader)
        _ = encoder.columns  # tells of a backbone without a map, before the work
        classes = _count_classes(graded, classes)
        results = segmentation(encoder, graded.train, graded.eval, classes, protocol, setup)
        return graded.write(protocol, results, reader.shape[2], classes)


def segmentation(
    encoder: Encoder,
    train: MapSource,
    evaluation: MapSource,
    classes: int,
    protocol: SegmentProtocol = SegmentProtocol(),
    setup: Setup = Setup(),
) -> dict:
    """Mean IoU, pixel accuracy and the IoU of each class, in percent.

    The encoder reads token maps; of ``setup``, batch size and workers are used.
    """
    how = (setup.batch_size, setup.workers)
    tokens, size = own_features(encoder, train, *how), encoder.transform.input_size[1:]
    labels = own_label_rows(train, size, _MAPS_AT_ONCE, setup.workers)
    maps = TokenMaps(tokens, labels, encoder.reader.shape, size)
    heads = train_map_head(maps, len(train), classes, protocol, encoder.device)
    if not all(value.isfinite().all() for value in heads.parameters()):
        raise InputError(
            f"the head has diverged at learning_rate {protocol.learning_rate:g}: ask for a lower one"
        )
    return rates(grade_map_head(heads, encoder, maps.shape, evaluation, *how))


def _count_classes(graded: Evaluation, wanted: int | None) -> int:
    """How many there are, once every label map was looked at, so that what is wrong is told before
    the work.

    Raises: InputError for a label that is none of them, and for too few to tell apart.
    """
    for source in (graded.train, graded.eval):
        there = _labels(graded, source, wanted)
        if not there.any():
            raise InputError(f"{source.spec} ({source.split}) has no labelled pixel")
        if source is graded.train and there.sum() < 2:
            raise InputError(f"the label maps of {source.spec} are of one class only")
        if wanted is None:
            wanted = int(there.nonzero().max()) + 1
    return wanted


def _labels(graded: Evaluation, source: MapSource, classes: int | None) -> torch.Tensor:
    """Which labels its label maps hold, bool (255,).

    Raises: InputError, naming the image, for one that is no class.
    """
    there = torch.zeros(IGNORED, dtype=torch.int64)
    with progress(len(range(rank(), len(source), world_size())), f"labels of {source.spec}") as bar:
        maps = label_maps(source, _present, _MAPS_AT_ONCE, graded.setup.workers)
        for found, indices in maps:
            for row, label in found[:, classes:].nonzero()[:1].tolist() if classes else ():
                raise InputError(
                    f"the label map of {source.where(int(indices[row]))} holds {classes + label}, "
                    f"and there are the classes 0 to {classes - 1}"
                )
            there += found.sum(0)
            bar.update(len(found))
    return all_reduce_sum(there.to(graded.device)).cpu() > 0


def _present(labels: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Which labels a map holds, uint8 (255,)."""
    return torch.from_numpy(np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED] > 0).byte()
