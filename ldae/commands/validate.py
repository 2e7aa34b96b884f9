"""``ldae validate``: a classifier's accuracy, by class map, real labels, or under corruptions."""

from dataclasses import asdict, dataclass
from typing import Annotated

import tyro
from tyro.conf import Fixed

from ldae.backbones.preprocessing import EvalTransform
from ldae.data.corruptions import NAMES, SEVERITIES, constants, resolve_names
from ldae.data.open import open_source
from ldae.data.source import Source
from ldae.distributed import is_main
from ldae.errors import InputError
from ldae.evals.accuracy import top1_top5
from ldae.evals.class_maps import Targets, real_targets, targets_of
from ldae.evals.corrupted import Cells, CorruptedTransform, album, means, table
from ldae.evals.evaluation import Evaluation, Setup, open_classifier, open_evaluation
from ldae.evals.features import Encoder
from ldae.evals.protocol import Protocol
from ldae.files import write
from ldae.plots.pictures import save_grid
from ldae.runs import layout


@dataclass(frozen=True)
class ValidationProtocol(Protocol):
    """The images that count, the classes that compete, and the corruptions."""

    name: Fixed[str] = "validation"
    version: Fixed[int] = 1
    class_map: str | None = None
    """imagenet-a, imagenet-r, imagenet-sketch, imagenet-v2, or a text file with FOLDER CLASS on each
    line. CLASS is a name or number of the classifier's, and is left out when it is the folder's name.
    The map's classes alone compete. By default classes are matched by name or number, and all
    compete."""
    real_labels: bool = False
    """The images are ImageNet's validation set, graded by its reassessed labels."""
    corruption: tuple[str, ...] = ()
    """Names of ImageNet-C's, or all."""
    severity: tuple[int, ...] = SEVERITIES
    """Severities of the corruptions, 1 to 5."""
    seed: Fixed[int] = 0
    """Of the corruptions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_map and self.real_labels:
            raise InputError("real labels are of all of ImageNet's classes: leave --class-map out")
        self._set("severity", tuple(sorted(set(self.severity))))
        if not self.corruption and self.severity != SEVERITIES:
            raise InputError("--severity is of corruptions: say which by --corruption")
        for severity in self.severity:
            constants(NAMES[0], severity, 224)  # raises for an unknown severity
        names = resolve_names(self.corruption)
        self._set("corruption", ("all",) if names == NAMES else names)

    @property
    def headlines(self) -> tuple[str, ...]:
        return ("top1", "top5", *(("top1_corrupted",) if self.corruption else ()))


def validate(
    classifier: Annotated[str, tyro.conf.arg(metavar="CLASSIFIER")],
    /,
    data: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
    *,
    protocol: ValidationProtocol = ValidationProtocol(),
    setup: Setup = Setup(),
) -> dict:
    """Measure the accuracy of a classifier on labelled images, and under corruptions of them.

    Nothing is learned: the classes are those that the classifier knows. With corruptions, beside
    results.json: corruptions.md, their table, and corruptions.png, the first image clean and corrupted.
    The mean error over them is not divided by that of AlexNet.

    Args:
        classifier: a folder of `ldae linear --save` or `ldae finetune`, a timm name or NAME@FILE.
        data: the images, of which the evaluation split counts; all of them where there are no splits.

    Returns: what results.json holds; its results are top-1 and top-5 in percent, and those under
    each corruption at each severity.

    Raises: InputError for a classifier or data that cannot be graded.
    """
    if setup.random_init:
        raise InputError("a classifier with random weights has learned no classes to validate")
    opened = (classifier, data, None, protocol, setup, _evaluation_split, open_classifier)
    with open_evaluation("validate", *opened) as evaluation:
        protocol, model = evaluation.protocol, evaluation.model
        if protocol.real_labels:
            targets = real_targets(evaluation.eval, model, classifier)
        else:
            targets = targets_of(evaluation.eval, model, classifier, protocol.class_map)
        results = _accuracy(evaluation, targets, evaluation.transform)
        results |= {"counted_images": len(targets.images)}
        if protocol.corruption:
            results |= _corrupted(evaluation, targets, results["top1"])
        return evaluation.write(
            results,
            model.num_features,
            len(targets.compared),
            matched_by=targets.matched_by,  # names, numbers or order
            compared_classes=len(targets.compared),
            constants=_constants(protocol, min(evaluation.transform.input_size[1:])),
        )


def _evaluation_split(data: str, _: None) -> tuple[None, Source]:
    return None, open_source(data, "eval")


def _constants(protocol: ValidationProtocol, side: int) -> dict[str, dict[int, dict[str, float]]]:
    """Return the constants of each corruption at each severity, for images of ``side`` pixels."""
    return {
        name: {severity: constants(name, severity, side) for severity in protocol.severity}
        for name in resolve_names(protocol.corruption)
    }


def _corrupted(evaluation: Evaluation, targets: Targets, clean: float) -> dict:
    """Return the results under corruptions; write their table and a picture of them."""
    protocol, transform, folder = evaluation.protocol, evaluation.transform, evaluation.folder
    transforms = {
        name: {
            severity: CorruptedTransform(
                **asdict(transform), corruption=name, severity=severity, seed=protocol.seed
            )
            for severity in protocol.severity
        }
        for name in resolve_names(protocol.corruption)
    }
    if is_main():
        rows = [list(row.values()) for row in transforms.values()]
        first = int(targets.images[0])
        pictures = album(evaluation.eval, first, transform, rows)
        save_grid(pictures, folder / layout.CORRUPTIONS_PICTURE)
    cells: Cells = {}
    for name, row in transforms.items():
        cells[name] = {
            severity: _accuracy(evaluation, targets, corrupted)
            for severity, corrupted in row.items()
        }
        if is_main():
            numbers = ", ".join(f"{cell['top1']:.2f}" for cell in cells[name].values())
            print(f"{name}: top-1 {numbers}", flush=True)
    shown = table(cells, clean)
    if is_main():
        write(folder / layout.CORRUPTIONS_TABLE, shown.encode())
        print(shown, end="")
    by_corruption = means(cells)
    mean = sum(by_corruption.values()) / len(by_corruption)
    return {
        "top1_corrupted": mean,
        "mean_corruption_error_unnormalised": 100 - mean,
        "mean_by_corruption": by_corruption,
        "cells": cells,
    }


def _accuracy(
    evaluation: Evaluation, targets: Targets, transform: EvalTransform
) -> dict[str, float]:
    """Measure top-1 and top-5, with each image that counts once over all ranks.

    Raises: InputError when a logit is not finite.
    """
    setup = evaluation.setup
    encoder = Encoder(evaluation.model, evaluation.device, setup.precision, transform)
    batches = encoder.share(evaluation.eval, setup.batch_size, setup.workers, targets.images)
    rows = ((logits[:, targets.compared], indices) for logits, indices in batches)
    return top1_top5(rows, targets.labels, len(targets.images), evaluation.device)
