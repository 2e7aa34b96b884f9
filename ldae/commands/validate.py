"""``ldae validate``: measure a classifier's accuracy, also by real labels or under corruptions."""

from dataclasses import asdict, dataclass, replace
from typing import Annotated

import tyro
from tyro.conf import Fixed

from ldae.backbones.preprocessing import EvalTransform
from ldae.console import print_main
from ldae.data.corruptions import NAMES, SEVERITIES, constants, resolve_names
from ldae.data.open import open_source
from ldae.data.source import Source
from ldae.distributed import is_main
from ldae.errors import InputError
from ldae.evals.accuracy import top1_top5
from ldae.evals.class_maps import (
    Targets,
    class_map_hash,
    label_targets,
    real_label_targets,
)
from ldae.evals.corrupted import (
    Cells,
    CorruptedTransform,
    corruption_pictures,
    corruption_table,
    mean_by_corruption,
)
from ldae.evals.evaluation import Evaluation, Setup
from ldae.evals.open import open_classifier, open_evaluation
from ldae.evals.protocol import Protocol
from ldae.evals.seeds import over_seeds
from ldae.files import write
from ldae.plots.pictures import save_grid
from ldae.runs import layout
from ldae.tree import AnyPath


@dataclass(frozen=True)
class ValidationProtocol(Protocol):
    """The images that count, the classes that compete, and the corruptions."""

    name: Fixed[str] = "validation"
    version: Fixed[int] = 1
    class_map: str | None = None
    """imagenet-a, imagenet-r, imagenet-sketch, imagenet-v2, or a text file of lines FOLDER CLASS.
    CLASS is a name or number of a class of the classifier, and may be left out if it equals FOLDER.
    Only the map's classes compete. By default classes are matched by name or number, and all
    compete."""
    real_labels: bool = False
    """The images are ImageNet's validation set, graded by its reassessed labels."""
    corruption: tuple[str, ...] = ()
    """Names of ImageNet-C's corruptions, or all."""
    severity: tuple[int, ...] = SEVERITIES
    """Severities of the corruptions, 1 to 5."""
    seed: Fixed[int] = 0
    """Seed of the corruptions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_map and self.real_labels:
            raise InputError("real labels need all of ImageNet's classes: leave --class-map out")
        self._set("severity", tuple(sorted(set(self.severity))))
        if not self.corruption and self.severity != SEVERITIES:
            raise InputError("--severity needs corruptions: name them with --corruption")
        for severity in self.severity:
            constants(NAMES[0], severity, 224)  # raises for an unknown severity
        names = resolve_names(self.corruption)
        self._set("corruption", ("all",) if names == NAMES else names)

    @property
    def headlines(self) -> tuple[str, ...]:
        return ("top1", "top5", *(("top1_corrupted",) if self.corruption else ()))

    @property
    def depends_on_seed(self) -> bool:
        return bool(self.corruption)  # the seed draws them

    def file_hashes(self) -> dict[str, str]:
        found = class_map_hash(self.class_map) if self.class_map else None
        return {"class_map_sha256": found} if found else {}


@over_seeds
def validate(
    classifier: Annotated[AnyPath, tyro.conf.arg(metavar="CLASSIFIER")],
    /,
    data: Annotated[AnyPath, tyro.conf.arg(metavar="SOURCE")],
    *,
    protocol: ValidationProtocol = ValidationProtocol(),
    setup: Setup = Setup(),
) -> dict:
    """Measure the accuracy of a classifier on labelled images, and under corruptions of them.

    Nothing is learned. With corruptions there are corruptions.md, a table, and corruptions.png, the
    first image clean and corrupted, beside results.json. The mean corruption error is not divided
    by AlexNet's error.

    Args:
        classifier: a folder of `ldae linear --save` or `ldae finetune`, a timm name or NAME@FILE.
        data: the images; their evaluation split counts, or all images if there are no splits.

    Returns: the content of results.json; its results are top-1 and top-5 in percent, clean and
    under each corruption at each severity.

    Raises: InputError for a classifier or data that cannot be graded.

    Examples:
        >>> imagenet_r = ldae.ValidationProtocol(class_map="imagenet-r")
        >>> record = ldae.validate("classifier", "/data/imagenet-r", protocol=imagenet_r)
        >>> record["results"]["top1"]
    """
    classifier = str(classifier)
    if setup.random_init:
        raise InputError("a classifier with random weights has learned no classes to validate")
    with open_evaluation(
        "validate", classifier, data, None, protocol, setup, _evaluation_split, open_classifier
    ) as evaluation:
        protocol, model = evaluation.protocol, evaluation.model
        if protocol.real_labels:
            targets = real_label_targets(evaluation.eval, model, classifier)
        else:
            targets = label_targets(evaluation.eval, model, classifier, protocol.class_map)
        results = _accuracy(evaluation, targets, evaluation.transform)
        results |= {"counted_images": len(targets.images)}
        if protocol.corruption:
            results |= _corrupted(evaluation, targets, results["top1"])
        return evaluation.write(
            results,
            model.num_features,
            len(targets.compared),
            matched_by=targets.matched_by,
            compared_classes=len(targets.compared),
            constants={
                name: {
                    severity: constants(name, severity, min(evaluation.transform.input_size[1:]))
                    for severity in protocol.severity
                }
                for name in resolve_names(protocol.corruption)
            },
        )


def _evaluation_split(data: str, _: None) -> tuple[None, Source]:
    return None, open_source(data, "eval")


def _corrupted(evaluation: Evaluation, targets: Targets, clean: float) -> dict:
    """Return the results under corruptions, and write their table and pictures."""
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
        pictures = corruption_pictures(evaluation.eval, first, transform, rows)
        save_grid(pictures, folder / layout.CORRUPTIONS_PICTURE)
    cells: Cells = {}
    for name, row in transforms.items():
        cells[name] = {
            severity: _accuracy(evaluation, targets, corrupted)
            for severity, corrupted in row.items()
        }
        numbers = ", ".join(f"{cell['top1']:.2f}" for cell in cells[name].values())
        print_main(f"{name}: top-1 {numbers}")
    if is_main():
        table = corruption_table(cells, clean)
        write(folder / layout.CORRUPTIONS_TABLE, table.encode())
        print(table, end="")
    by_corruption = mean_by_corruption(cells)
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
    """Return top-1 and top-5 in percent of the images that count, over all ranks.

    Raises: InputError when a logit is not finite.
    """
    encoder = replace(evaluation, transform=transform).encoder()
    batches = encoder.share(evaluation.eval, targets.images)
    rows = ((logits[:, targets.compared], indices) for logits, indices in batches)
    return top1_top5(rows, targets.labels, len(targets.images), evaluation.device)
