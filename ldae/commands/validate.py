"""The verb that grades a classifier: by class map, by ImageNet's real labels, under corruptions."""

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

import tyro

from ldae.backbones.open import load_classifier
from ldae.backbones.preprocessing import EvalTransform, preprocessing
from ldae.data.corruptions import NAMES, SEVERITIES, constants, resolve_names
from ldae.data.open import open_source
from ldae.distributed import device_for, is_main, process_group
from ldae.errors import InputError
from ldae.evals.accuracy import top1_top5
from ldae.evals.class_maps import Targets, real_targets, targets_of
from ldae.evals.corrupted import Cells, CorruptedTransform, album, means, table
from ldae.evals.evaluation import Evaluation, Setup, SourceSpec, home_of
from ldae.evals.features import Encoder
from ldae.files import check_writable, write
from ldae.plots.pictures import save_grid
from ldae.runs import layout
from ldae.tree import check


@dataclass(frozen=True)
class ValidationProtocol:
    """Every constant of the numbers."""

    name: str = "validation"
    version: int = 1
    class_map: str | None = None
    real_labels: bool = False
    corruption: tuple[str, ...] = ()
    severity: tuple[int, ...] = SEVERITIES
    seed: int = 0
    """Of the corruptions."""
    matched_by: str = ""
    """How classes were found among the classifier's: names, numbers or order."""
    compared_classes: int = 0
    """How many of the classifier's outputs compete."""
    constants: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    """Of each corruption at each severity, for the size of the classifier's images."""


def validate(
    classifier: Annotated[str, tyro.conf.arg(metavar="CLASSIFIER")],
    /,
    data: SourceSpec,
    *,
    class_map: str | None = None,
    real_labels: bool = False,
    corruption: tuple[str, ...] = (),
    severity: tuple[int, ...] = SEVERITIES,
    setup: Annotated[Setup, tyro.conf.arg(name="")] = Setup(),
) -> dict:
    """Grade a classifier on the evaluation split of labelled images, and under corruptions of them.

    With corruptions, beside results.json: corruptions.md, their table, and corruptions.png, the first
    image clean and corrupted. The mean error over them is not divided by that of AlexNet.

    Args:
        classifier: a folder of `ldae linear --save` or `ldae finetune`, a timm name or NAME@FILE.
        data: the images; all of them where there are no splits.
        class_map: imagenet-a, imagenet-r, imagenet-sketch, imagenet-v2, or a text file with FOLDER
            CLASS on each line, CLASS being a name or number of the classifier's, or left out when it
            is the folder's name. The map's classes alone compete. Without: classes are matched by
            name or number, and all compete.
        real_labels: the images are ImageNet's validation set, graded by its reassessed labels.
        corruption: names of ImageNet-C's, or all.
        severity: 1 to 5, by default all of them.
        setup: how the classifier is opened and run; img_size is for timm names, seed for corruptions.

    Returns: what results.json holds; its results are top-1 and top-5 in percent, and those under
    each corruption at each severity.

    Raises: InputError for a classifier or data that can not be graded.
    """
    check(setup)
    protocol = _protocol(class_map, real_labels, corruption, severity, setup)
    check_writable(setup.out or home_of(classifier))
    device = device_for(setup.device)
    with process_group(device):
        source = open_source(data, "eval")
        model = load_classifier(classifier, setup.in_chans, setup.img_size)
        if real_labels:
            targets = real_targets(source, model, classifier)
        else:
            targets = targets_of(source, model, classifier, class_map)
        transform = preprocessing(model)
        protocol = replace(
            protocol,
            matched_by=targets.matched_by,
            compared_classes=len(targets.compared),
            constants=_constants(protocol, transform),
        )
        graded = Evaluation("validate", classifier, setup, model, None, source, device, transform)
        return _grade(graded, protocol, targets)


def _protocol(
    class_map: str | None,
    real_labels: bool,
    corruption: tuple[str, ...],
    severity: tuple[int, ...],
    setup: Setup,
) -> ValidationProtocol:
    """Raises: InputError for settings that do not go together."""
    if setup.random_init:
        raise InputError("a classifier with random weights has learned no classes to validate")
    if class_map and real_labels:
        raise InputError("real labels are of all of ImageNet's classes: leave --class-map out")
    severity = tuple(sorted(set(severity)))
    if not corruption and severity != SEVERITIES:
        raise InputError("--severity is of corruptions: say which by --corruption")
    if corruption and not severity:
        raise InputError("severity must name at least one")
    names = resolve_names(corruption)
    for number in severity:
        constants(NAMES[0], number, 224)  # told before anything is opened
    names = ("all",) if names == NAMES else names
    return ValidationProtocol(
        class_map=class_map,
        real_labels=real_labels,
        corruption=names,
        severity=severity,
        seed=setup.seed,
    )


def _constants(
    protocol: ValidationProtocol, transform: EvalTransform
) -> dict[str, dict[int, dict[str, float]]]:
    side = min(transform.input_size[1:])
    return {
        name: {severity: constants(name, severity, side) for severity in protocol.severity}
        for name in resolve_names(protocol.corruption)
    }


def _grade(graded: Evaluation, protocol: ValidationProtocol, targets: Targets) -> dict:
    clean = graded.transform
    results = _accuracy(graded, targets, clean) | {"counted_images": len(targets.images)}
    transforms = {
        name: {
            severity: CorruptedTransform(
                **asdict(clean), corruption=name, severity=severity, seed=protocol.seed
            )
            for severity in protocol.severity
        }
        for name in protocol.constants
    }
    if not transforms:
        return graded.write(protocol, results, graded.model.num_features, len(targets.compared))
    if is_main():
        folder = graded.folder(protocol)
        rows = [list(row.values()) for row in transforms.values()]
        pictures = album(graded.eval, int(targets.images[0]), clean, rows)
        save_grid(pictures, folder / layout.CORRUPTIONS_PICTURE)
    cells: Cells = {}
    for name, row in transforms.items():
        cells[name] = {
            severity: _accuracy(graded, targets, corrupted) for severity, corrupted in row.items()
        }
        if is_main():
            numbers = ", ".join(f"{cell['top1']:.2f}" for cell in cells[name].values())
            print(f"{name}: top-1 {numbers}", flush=True)
    shown = table(cells, results["top1"])
    if is_main():
        write(folder / layout.CORRUPTIONS_TABLE, shown.encode())
        print(shown, end="")
    by_corruption = means(cells)
    mean = sum(by_corruption.values()) / len(by_corruption)
    results |= {
        "top1_corrupted": mean,
        "mean_corruption_error_unnormalised": 100 - mean,
        "mean_by_corruption": by_corruption,
        "cells": cells,
    }
    return graded.write(protocol, results, graded.model.num_features, len(targets.compared))


def _accuracy(graded: Evaluation, targets: Targets, transform: EvalTransform) -> dict[str, float]:
    """Each image that counts, once over all ranks.

    Raises: InputError when a logit is not finite.
    """
    setup = graded.setup
    encoder = Encoder(graded.model, graded.device, setup.precision, transform)
    batches = encoder.share(graded.eval, setup.batch_size, setup.workers, targets.images)
    rows = ((logits[:, targets.compared], indices) for logits, indices in batches)
    return top1_top5(rows, targets.labels, len(targets.images), graded.device)
