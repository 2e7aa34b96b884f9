"""``ldae segment``: grade a backbone's token map by a linear head that classifies every pixel."""

from dataclasses import replace
from typing import Annotated

import numpy as np
import torch

from ldae.console import progress
from ldae.data.label_maps import open_map_splits
from ldae.data.source import IGNORED, MapSource
from ldae.distributed import all_reduce_sum, rank, world_size
from ldae.errors import InputError
from ldae.evals.dense import (
    SegmentProtocol,
    TokenMaps,
    grade_map_head,
    label_maps,
    own_label_rows,
    rates,
    train_map_head,
)
from ldae.evals.evaluation import (
    BackboneSpec,
    EvalSourceSpec,
    Evaluation,
    Setup,
    SourceSpec,
    open_evaluation,
)
from ldae.evals.features import Encoder, own_features
from ldae.evals.taps import TokenMapReader
from ldae.tree import COUNT

_MAPS_AT_ONCE = 16


def segment(
    backbone: BackboneSpec,
    /,
    data: SourceSpec,
    eval_data: EvalSourceSpec = None,
    *,
    protocol: SegmentProtocol = SegmentProtocol(),
    classes: Annotated[int | None, COUNT] = None,
    setup: Setup = Setup(),
) -> dict:
    """Grade a backbone's token map by a linear head that classifies every pixel.

    The data is a folder, .zip or .tar with images/ and labels/ beside each other, whose files have
    equal stems; label maps are grey or palette .png of the numbers of classes, 255 where nothing is
    known. train/ and val/ may lie above or below the two. scattered-digits has label maps too.

    The token maps of train are held once, in memory or from 2 GiB on in a file below TMPDIR.

    Args:
        classes: number of classes; by default one more than the highest label of train.

    Returns: what results.json holds; its results are, in percent, the mean IoU over the classes in
    the labels or the predictions, the accuracy over pixels and the IoU of each class.

    Raises: InputError for a backbone or data that cannot be graded.
    """
    if classes is not None and not 2 <= classes <= IGNORED:
        raise InputError(f"classes must be 2 to {IGNORED}, not {classes}")
    with open_evaluation(
        "segment", backbone, data, eval_data, protocol, setup, open_map_splits
    ) as evaluation:
        squashed = replace(evaluation.transform, crop_pct=1.0, crop_mode="squash")
        evaluation, protocol = replace(evaluation, transform=squashed), evaluation.protocol
        reader = TokenMapReader(evaluation.model, protocol.pixel_patch)
        encoder = evaluation.encoder(reader)
        _ = encoder.columns  # refuses a backbone without a map, before the work
        classes = _count_classes(evaluation, classes)
        splits = (evaluation.train, evaluation.eval)
        results = segmentation(encoder, *splits, classes, protocol, setup)
        return evaluation.write(results, reader.shape[2], classes)


def segmentation(
    encoder: Encoder,
    train: MapSource,
    test: MapSource,
    classes: int,
    protocol: SegmentProtocol = SegmentProtocol(),
    setup: Setup = Setup(),
) -> dict:
    """Return mean IoU, pixel accuracy and the IoU of each class, in percent.

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
    return rates(grade_map_head(heads, encoder, maps.shape, test, *how))


def _count_classes(evaluation: Evaluation, wanted: int | None) -> int:
    """Count the classes, reading every label map, so that a wrong one is refused before the work.

    Raises: InputError for a label that is not one of the ``wanted`` classes, and for one class only.
    """
    for source in (evaluation.train, evaluation.eval):
        there = _labels(evaluation, source, wanted)
        if not there.any():
            raise InputError(f"{source.spec} ({source.split}) has no labelled pixel")
        if source is evaluation.train and there.sum() < 2:
            raise InputError(f"the label maps of {source.spec} are of one class only")
        if wanted is None:
            wanted = int(there.nonzero().max()) + 1
    return wanted


def _labels(evaluation: Evaluation, source: MapSource, classes: int | None) -> torch.Tensor:
    """Return which labels the label maps of ``source`` hold, bool (255,).

    Raises: InputError, naming the image, for a label that is no class.
    """
    there = torch.zeros(IGNORED, dtype=torch.int64)
    with progress(len(range(rank(), len(source), world_size())), f"labels of {source.spec}") as bar:
        maps = label_maps(source, _present, _MAPS_AT_ONCE, evaluation.setup.workers)
        for found, indices in maps:
            for row, label in found[:, classes:].nonzero()[:1].tolist() if classes else ():
                raise InputError(
                    f"the label map of {source.where(int(indices[row]))} holds {classes + label}, "
                    f"and there are the classes 0 to {classes - 1}"
                )
            there += found.sum(0)
            bar.update(len(found))
    return all_reduce_sum(there.to(evaluation.device)).cpu() > 0


def _present(labels: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Return which labels a map holds, uint8 (255,)."""
    return torch.from_numpy(np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED] > 0).byte()
