"""Class maps: which output of a classifier each class of a source is, and which outputs compete."""

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
from ldae.files import file_hash

# timm's lists of the synsets of ImageNet's subsets. Folders are named by synset, in V2 by number.
CLASS_MAPS = {
    "imagenet-a": "imagenet_a_synsets.txt",
    "imagenet-r": "imagenet_r_synsets.txt",
    "imagenet-sketch": "imagenet_synsets.txt",
    "imagenet-v2": "imagenet_synsets.txt",
}

_VAL_NAME = re.compile(r"(?:^|/)ILSVRC2012_val_(\d{8})\.\w+$")


class Targets(NamedTuple):
    """The right classes of each image of a source."""

    labels: torch.Tensor
    """int64 (N, m): positions in ``compared``, any of which is right, padded with -1."""
    images: np.ndarray
    """int64: indices of the images that count."""
    compared: torch.Tensor
    """int64 (K,), ascending: the classifier's outputs that compete."""
    matched_by: str
    """How classes were matched with outputs: names, numbers or order."""


def label_targets(
    source: Source, model: nn.Module, spec: str, class_map: str | None = None
) -> Targets:
    """Return the class of each image of ``source`` as its label gives it.

    Without a map, a class is an output of the same name, else of the same number. If the classifier
    has no names and as many outputs, classes are matched by order. All outputs compete. A map says
    which class each folder is, and only the map's classes compete. Errors call the classifier
    ``spec``.

    Raises: InputError, naming the class or the file, when classes cannot be matched.
    """
    labels = known_labels(source)
    folders = source.classes or [str(label) for label in range(int(labels.max()) + 1)]
    if class_map is None:
        outputs, matched_by = _match_folders(folders, source, model, spec)
        return _single_label_targets(labels, outputs, range(model.num_classes), matched_by)
    entries = _read_map(class_map)
    for folder in folders:
        if _plain(folder) not in entries:
            raise InputError(f"class {folder!r} of {source.spec} is not in class map {class_map}")
    found, matched_by = _match_names(entries.values(), model)
    names = [entries[_plain(folder)] for folder in folders]
    for name in names:
        if name not in found:
            raise InputError(
                f"class {name!r} of class map {class_map} is none of the {model.num_classes} "
                f"classes of {spec}"
            )
    outputs = [found[name] for name in names]
    return _single_label_targets(labels, outputs, found.values(), matched_by)


def real_label_targets(source: Source, model: nn.Module, spec: str) -> Targets:
    """Return the reassessed labels of ImageNet's validation images, found by their file names.

    Images without a reassessed label do not count. ImageNet's 1000 classes compete.

    Source: Beyer et al. 2020, Are we done with ImageNet?

    Raises: InputError for a file of another name, and for a classifier that lacks a class.
    """
    synsets = _timm_text("imagenet_synsets.txt").split()
    outputs, matched_by = _match_names(synsets, model)
    if len(outputs) < len(synsets):
        raise InputError(
            f"{spec} knows {len(outputs)} of ImageNet's {len(synsets)} classes; real labels "
            "need all"
        )
    real_labels = json.loads(_timm_text("imagenet_real_labels.json"))
    right = [real_labels[_val_number(source, i, len(real_labels))] for i in range(len(source))]
    compared = torch.tensor(sorted(outputs.values()))
    position = torch.searchsorted(compared, torch.tensor([outputs[name] for name in synsets]))
    labels = torch.full((len(right), max(1, *map(len, right))), -1)
    for row, classes in zip(labels, right):
        row[: len(classes)] = position[classes]
    images = np.flatnonzero([bool(classes) for classes in right])
    if not len(images):
        raise InputError(f"none of the images of {source.spec} has a real label")
    return Targets(labels, images, compared, matched_by)


def _single_label_targets(
    labels: torch.Tensor, outputs: list[int], compared: Iterable[int], matched_by: str
) -> Targets:
    """Return targets for ``labels`` (N,), given the output of each class."""
    compared = torch.tensor(sorted(set(compared)))
    positions = torch.searchsorted(compared, torch.tensor(outputs))
    return Targets(positions[labels][:, None], np.arange(len(labels)), compared, matched_by)


def _match_folders(
    folders: list[str], source: Source, model: nn.Module, spec: str
) -> tuple[list[int], str]:
    """Return the output of each folder, and how folders were matched."""
    plain = [_plain(folder) for folder in folders]
    outputs, matched_by = _match_names(plain, model)
    unmatched = [folder for folder in folders if _plain(folder) not in outputs]
    if not unmatched:
        return [outputs[name] for name in plain], matched_by
    if len(folders) == model.num_classes and not label_names(model):
        return list(range(len(folders))), "order"
    raise InputError(
        f"class {unmatched[0]!r} of {source.spec} is none of the {model.num_classes} classes of "
        f"{spec}: say which one by --class-map FILE"
    )


def _match_names(names: Iterable[str], model: nn.Module) -> tuple[dict[str, int], str]:
    """Return name -> output, by the naming of outputs that matches most names, and its kind."""
    namings = [(label_names(model), "names")]
    if subset := infer_imagenet_subset(model):
        namings.append((ImageNetInfo(subset).label_names(), "names"))
    namings.append(([str(number) for number in range(model.num_classes)], "numbers"))
    names, matches = list(names), []
    for given, kind in namings:
        naming = [_plain(name) for name in given]
        count = Counter(naming)  # a name of two outputs, as ImageNet's crane, matches none
        outputs = {name: i for i, name in enumerate(naming) if count[name] == 1}
        matches.append(({name: outputs[name] for name in names if name in outputs}, kind))
    return max(matches, key=lambda match: len(match[0]))


def _plain(folder: str) -> str:
    """Strip leading zeros from a number, so that 007 is 7."""
    return str(int(folder)) if folder.isdecimal() else folder


def _read_map(class_map: str) -> dict[str, str]:
    """Return folder -> class name or number, from a built-in map or a text file.

    Raises: InputError when there is no such map, and for a line that cannot be read.
    """
    if class_map in CLASS_MAPS:
        names = _timm_text(CLASS_MAPS[class_map]).split()
        entries = {name: name for name in names}
        if class_map == "imagenet-v2":
            entries |= {str(number): name for number, name in enumerate(names)}
        return entries
    try:
        text = Path(class_map).expanduser().read_text(encoding="utf-8-sig")
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


def class_map_hash(class_map: str) -> str | None:
    """Return the SHA-256 of the file of a class map, or None for a built-in map.

    Raises: InputError as ``label_targets``, for a file that is no class map.
    """
    if class_map in CLASS_MAPS:
        return None
    _read_map(class_map)
    return file_hash(Path(class_map).expanduser())


def _val_number(source: Source, i: int, count: int) -> int:
    """Return the number, from 0, in the file name of an ImageNet validation image."""
    match = _VAL_NAME.search(source.name(i))
    if not match or not 1 <= int(match[1]) <= count:
        raise InputError(
            f"{source.where(i)} is not named ILSVRC2012_val_00000001 to {count:08d}, by which real "
            "labels are found"
        )
    return int(match[1]) - 1


def _timm_text(name: str) -> str:
    return (files("timm.data") / "_info" / name).read_text(encoding="utf-8")
