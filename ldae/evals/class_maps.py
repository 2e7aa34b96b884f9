"""Which output of a classifier each class of a source is, and which outputs are compared."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from ldae.backbones.open import label_names
from ldae.data.source import Source
from ldae.errors import InputError
from ldae.evals.features import known_labels

# Subsets of ImageNet, by their lists of synsets in timm. Folders are synsets; those of V2, numbers.
CLASS_MAPS = {
    "imagenet-a": "imagenet_a_synsets.txt",
    "imagenet-r": "imagenet_r_synsets.txt",
    "imagenet-sketch": "imagenet_synsets.txt",
    "imagenet-v2": "imagenet_synsets.txt",
}

_SYNSETS = "imagenet_synsets.txt"
_REAL_LABELS = "imagenet_real_labels.json"
_VAL_NAME = re.compile(r"(?:^|/)ILSVRC2012_val_(\d{8})\.\w+$")


class Targets(NamedTuple):
    """What is right for each image of a source."""

    labels: torch.Tensor
    """int64 (N, m): places among ``compared``, any of which is right; -1 fills up."""
    images: np.ndarray
    """int64: the indices of the images that count."""
    compared: torch.Tensor
    """int64 (K,), ascending: the classifier's outputs that compete."""
    matched_by: str
    """names, numbers, or order: how classes were found among the outputs."""


def targets_of(
    source: Source, model: nn.Module, spec: str, class_map: str | None = None
) -> Targets:
    """One right class for each image of ``source``, as its labels say.

    Without a map, classes are outputs by name, else by number, else by order where the classifier has
    no names and as many outputs; all of them compete. A map says which class each folder is, and only
    its classes compete. ``spec`` is what messages call the classifier.

    Raises: InputError, naming the class or the file, when classes can not be matched.
    """
    labels = known_labels(source)
    folders = source.classes or [str(label) for label in range(int(labels.max()) + 1)]
    if class_map is None:
        places, matched_by = _match(folders, source, model, spec)
        return _targets(labels, places, range(model.num_classes), matched_by)
    entries = _read_map(class_map)
    unknown = [folder for folder in folders if _plain(folder) not in entries]
    if unknown:
        raise InputError(f"class {unknown[0]!r} of {source.spec} is not in class map {class_map}")
    outputs, matched_by = _outputs(entries.values(), model)
    for folder in folders:
        if (name := entries[_plain(folder)]) not in outputs:
            raise InputError(
                f"class {name!r} of class map {class_map} is none of the {model.num_classes} "
                f"classes of {spec}"
            )
    places = [outputs[entries[_plain(folder)]] for folder in folders]
    return _targets(labels, places, outputs.values(), matched_by)


def real_targets(source: Source, model: nn.Module, spec: str) -> Targets:
    """The right classes of images of ImageNet's validation set after all, by their file names.

    Images that no class was found right for do not count. ImageNet's 1000 classes compete.

    Source: Beyer et al. 2020, Are we done with ImageNet?

    Raises: InputError for a file of another name, and a classifier that has not all of the classes.
    """
    synsets = _lines(_SYNSETS)
    outputs, matched_by = _outputs(synsets, model)
    if len(outputs) < len(synsets):
        raise InputError(
            f"{spec} knows {len(outputs)} of ImageNet's {len(synsets)} classes; real labels need all"
        )
    known = json.loads(_content(_REAL_LABELS))
    right = [known[_number(source, i, len(known))] for i in range(len(source))]
    compared = torch.tensor(sorted(outputs.values()))
    place = torch.searchsorted(compared, torch.tensor([outputs[name] for name in synsets]))
    labels = torch.full((len(right), max(1, *map(len, right))), -1)
    for row, classes in zip(labels, right):
        row[: len(classes)] = place[classes]
    images = np.flatnonzero([bool(classes) for classes in right])
    if not len(images):
        raise InputError(f"none of the images of {source.spec} has a real label")
    return Targets(labels, images, compared, matched_by)


def _targets(
    labels: torch.Tensor, outputs: list[int], compared: Iterable[int], matched_by: str
) -> Targets:
    """``outputs`` are those of each class that ``labels`` (N,) name."""
    compared = torch.tensor(sorted(set(compared)))
    places = torch.searchsorted(compared, torch.tensor(outputs))
    return Targets(places[labels][:, None], np.arange(len(labels)), compared, matched_by)


def _match(
    folders: list[str], source: Source, model: nn.Module, spec: str
) -> tuple[list[int], str]:
    """The output of each folder, and how it was found."""
    plain = [_plain(folder) for folder in folders]
    outputs, matched_by = _outputs(plain, model)
    unknown = [folder for folder in folders if _plain(folder) not in outputs]
    if not unknown:
        return [outputs[name] for name in plain], matched_by
    if len(folders) == model.num_classes and not label_names(model):
        return list(range(len(folders))), "order"
    raise InputError(
        f"class {unknown[0]!r} of {source.spec} is none of the {model.num_classes} classes of "
        f"{spec}: say which one by --class-map FILE"
    )


def _outputs(names: Iterable[str], model: nn.Module) -> tuple[dict[str, int], str]:
    """The outputs of those names that the classifier has, in the naming that has most of them."""
    namings = [(label_names(model), "names")]
    if subset := infer_imagenet_subset(model):
        namings.append((ImageNetInfo(subset).label_names(), "names"))
    namings.append(([str(number) for number in range(model.num_classes)], "numbers"))
    names = list(names)
    found = []
    for naming, kind in namings:
        count = Counter(naming)  # a name of two outputs, as ImageNet's crane, is none
        outputs = {name: i for i, name in enumerate(naming) if count[name] == 1}
        found.append(({name: outputs[name] for name in names if name in outputs}, kind))
    return max(found, key=lambda pair: len(pair[0]))


def _plain(folder: str) -> str:
    """A number without leading zeros, for 007 is 7."""
    return str(int(folder)) if folder.isdecimal() else folder


def _read_map(class_map: str) -> dict[str, str]:
    """Folder -> name or number of a class.

    Raises: InputError when there is no such map, or a line of the file is none.
    """
    if class_map in CLASS_MAPS:
        names = _lines(CLASS_MAPS[class_map])
        entries = {name: name for name in names}
        if class_map == "imagenet-v2":
            entries |= {str(number): name for number, name in enumerate(names)}
        return entries
    try:
        text = Path(class_map).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"class map {class_map!r} is neither {', '.join(CLASS_MAPS)} nor a text file: {error}"
        ) from None
    entries = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("\t") if "\t" in line else line.split()
        if not words:
            continue
        if len(words) > 2 or _plain(words[0]) in entries:
            raise InputError(
                f"line {number} of class map {class_map} is not FOLDER [CLASS], each folder once"
            )
        entries[_plain(words[0])] = _plain(words[-1])
    if not entries:
        raise InputError(f"class map {class_map} is empty")
    return entries


def _number(source: Source, i: int, count: int) -> int:
    """The number, from 0, of a validation image of ImageNet."""
    found = _VAL_NAME.search(source.name(i))
    if not found or not 1 <= int(found[1]) <= count:
        raise InputError(
            f"{source.where(i)} is not named ILSVRC2012_val_00000001 to {count:08d}, by which real "
            "labels are found"
        )
    return int(found[1]) - 1


def _lines(name: str) -> list[str]:
    return _content(name).split()


def _content(name: str) -> str:
    return (files("timm.data") / "_info" / name).read_text(encoding="utf-8")
