"""``ldae segment``: grade a backbone's token map by a linear head that classifies every pixel."""

from dataclasses import replace

import numpy as np
import torch

from ldae.console import progress
from ldae.data.label_maps import open_map_splits
from ldae.data.source import IGNORED, MapSource
from ldae.distributed import all_reduce_sum, share_of
from ldae.errors import InputError
from ldae.evals.evaluation import BackboneSpec, EvalSourceSpec, Evaluation, Setup, SourceSpec
from ldae.evals.features import Encoder, encode_share
from ldae.evals.open import open_evaluation
from ldae.evals.seeds import over_seeds
from ldae.evals.segmentation import (
    SegmentProtocol,
    TokenMaps,
    grade_map_head,
    iou_metrics,
    label_maps,
    load_label_share,
    train_map_head,
)
from ldae.evals.taps import TokenMapReader
from ldae.precision import recorded_gradients

_MAPS_AT_ONCE = 16


@over_seeds
@recorded_gradients()
def segment(
    backbone: BackboneSpec,
    /,
    data: SourceSpec,
    eval_data: EvalSourceSpec = None,
    *,
    protocol: SegmentProtocol = SegmentProtocol(),
    setup: Setup = Setup(),
) -> dict:
    """Grade a backbone's token map by a linear head that classifies every pixel.

    The data is a folder, .zip or .tar with images/ and labels/ beside each other; an image and its
    label map have the same stem. Label maps are grey or palette .png files of class numbers, with
    255 for unlabelled pixels. train/ and val/ may lie above or below the two. scattered-digits has
    label maps too.

    The token maps of train are held in memory, or from 2 GiB on in a file below TMPDIR.

    Returns: the content of results.json; its results are, in percent, the mean IoU over the classes
    in the labels or the predictions, the accuracy over pixels and the IoU of each class.

    Raises: InputError for a backbone or data that cannot be graded.

    Examples:
        >>> ldae.segment("runs/l_dae", "/data/ade20k")["results"]["miou"]
    """
    with open_evaluation(
        "segment", backbone, data, eval_data, protocol, setup, open_map_splits
    ) as evaluation:
        squashed = replace(evaluation.transform, crop_pct=1.0, crop_mode="squash")
        evaluation, protocol = replace(evaluation, transform=squashed), evaluation.protocol
        reader = TokenMapReader(evaluation.model, protocol.pixel_patch)
        encoder = evaluation.encoder(reader)
        _ = encoder.columns  # refuses a backbone without a map, before labels are read
        classes = _count_classes(evaluation, protocol.classes)
        splits = (evaluation.train, evaluation.eval)
        results = segmentation(encoder, *splits, classes, protocol)
        return evaluation.write(results, reader.shape[2], classes)


def segmentation(
    encoder: Encoder,
    train: MapSource,
    test: MapSource,
    classes: int,
    protocol: SegmentProtocol = SegmentProtocol(),
) -> dict:
    """Return mean IoU, pixel accuracy and the IoU of each class, in percent.

    The encoder reads token maps.
    """
    tokens, size = encode_share(encoder, train), encoder.transform.input_size[1:]
    labels = load_label_share(train, size, _MAPS_AT_ONCE, encoder.workers)
    maps = TokenMaps(tokens, labels, encoder.reader.shape, size)
    heads = train_map_head(maps, len(train), classes, protocol, encoder.device)
    if not all(value.isfinite().all() for value in heads.parameters()):
        raise InputError(
            f"the head diverged at learning_rate {protocol.learning_rate:g}: ask for a lower rate"
        )
    return iou_metrics(grade_map_head(heads, encoder, test))


def _count_classes(evaluation: Evaluation, classes: int | None) -> int:
    """Read every label map, and return the number of classes, ``classes`` if it is given.

    Raises: InputError for a label that is not one of the classes, and for one class only.
    """
    for source in (evaluation.train, evaluation.eval):
        present = _labels(evaluation, source, classes)
        if not present.any():
            raise InputError(f"{source.spec} ({source.split}) has no labelled pixel")
        if source is evaluation.train and present.sum() < 2:
            raise InputError(f"the label maps of {source.spec} are of one class only")
        if classes is None:
            classes = int(present.nonzero().max()) + 1
    return classes


def _labels(evaluation: Evaluation, source: MapSource, classes: int | None) -> torch.Tensor:
    """Return which labels occur in the label maps of ``source``, bool (255,).

    Raises: InputError, naming the image, for a label that is no class.
    """
    counts = torch.zeros(IGNORED, dtype=torch.int64)
    with progress(len(share_of(len(source))), f"labels of {source.spec}") as bar:
        maps = label_maps(source, _present, _MAPS_AT_ONCE, evaluation.setup.workers)
        for present, indices in maps:
            unknown = present[:, classes:].nonzero().tolist() if classes else []
            if unknown:
                row, label = unknown[0]
                raise InputError(
                    f"the label map of {source.where(int(indices[row]))} holds {classes + label}, "
                    f"and there are the classes 0 to {classes - 1}"
                )
            counts += present.sum(0)
            bar.update(len(present))
    return all_reduce_sum(counts.to(evaluation.device)).cpu() > 0


def _present(labels: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Return which labels occur in a label map, uint8 (255,)."""
    return torch.from_numpy(np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED] > 0).byte()
