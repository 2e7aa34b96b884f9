"""Open what a user calls a source of images."""

import difflib
import functools
import os
import re
from pathlib import Path
from typing import Literal

import numpy as np

from ldae.data.containers import open_container
from ldae.data.datasets import HfdsSource, TorchSource
from ldae.data.folders import FileSplits, Opener, file_splits
from ldae.data.source import Source
from ldae.errors import InputError

BUILT_IN = ("digits", "scattered-digits")
_SCATTERED_TRAIN, _SCATTERED_EVAL = 20_000, 5_000  # images


def open_source(spec: str, split: Literal["train", "eval"]) -> Source:
    """One split of the images that ``spec`` names, or all of them when there are no splits.

    - A folder, or a ``.zip`` or uncompressed ``.tar`` archive, which is read in place. Sub-folders
      ``train`` and one of ``val``, ``valid``, ``validation``, ``test`` are its splits. Images
      directly inside make it unlabelled; otherwise the first-level sub-folders are the classes,
      sorted. A lone outer folder around folders, as archives often have, is looked through.
    - A ``.npz`` file of samples: ``arr_0``, uint8 (N, H, W, C), without splits.
    - ``torch/NAME@ROOT`` and ``hfds/NAME[@ROOT]``: timm's data sets.
    - ``digits`` and ``scattered-digits[:N[:SEED]]``: built in; ``./digits`` would be a folder.

    Raises: InputError when there is no such source or no image in it.
    """
    return _choose(spec, _splits(spec), split)


def open_splits(
    data: str, eval_data: str | None, of_files: FileSplits | None = None
) -> tuple[Source, Source]:
    """The train source and the eval source, the labels of both in the train source's classes.

    ``of_files`` opens the splits of a folder or an archive otherwise than :func:`open_source` does.

    Evaluation uses the eval split of ``eval_data``, or all of it, when it is given, and otherwise
    the eval split of ``data``. Classes are matched by name, whatever their order.

    Raises: InputError as :func:`open_source` does, when there is nothing to evaluate on, and when
        evaluation has a class that training has not.
    """
    splits = _splits(data, of_files)
    if eval_data is None and "eval" not in splits:
        raise InputError(f"{data} has no evaluation split: give one by --eval-data")
    eval_splits = splits if eval_data is None else _splits(eval_data, of_files)
    train = _choose(data, splits, "train")
    evaluation = _choose(eval_data or data, eval_splits, "eval")
    _adopt_classes(evaluation, train)
    return train, evaluation


def _choose(spec: str, splits: dict[str, Opener], split: str) -> Source:
    opener = splits.get(split) or splits.get("all")
    if opener is None:
        raise InputError(f"{spec} holds only an evaluation split: there is nothing to train on")
    return opener()


def _adopt_classes(evaluation: Source, train: Source) -> None:
    """Write the labels of ``evaluation`` in the classes of ``train``, where both have labels."""
    if None in (evaluation.classes, train.classes) or evaluation.classes == train.classes:
        return
    number = {name: i for i, name in enumerate(train.classes)}
    unknown = [name for name in evaluation.classes if name not in number]
    if unknown:
        places = [source.spec for source in (evaluation, train)]
        if places[0] == places[1]:
            places = [f"{source.spec} ({source.split})" for source in (evaluation, train)]
        raise InputError(
            f"class {unknown[0]!r} of {places[0]} is not among the classes of {places[1]}"
        )
    evaluation.labels = np.array([number[name] for name in evaluation.classes])[evaluation.labels]
    evaluation.classes = train.classes


def _splits(spec: str, of_files: FileSplits | None = None) -> dict[str, Opener]:
    """What opens each split of ``spec``: either train and eval, or all."""
    kind, _, rest = spec.partition("/")
    name = spec.partition(":")[0]
    if name in BUILT_IN:
        return _built_in_splits(spec)
    if rest and kind in ("torch", "hfds"):
        source = TorchSource if kind == "torch" else HfdsSource
        return {split: functools.partial(source, spec, split) for split in ("train", "eval")}
    path = os.path.expanduser(spec)
    if not spec or not os.path.exists(path):
        close = difflib.get_close_matches(name, BUILT_IN, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"no folder, archive or built-in data set is named {spec!r}{hint}")
    if path.lower().endswith(".npz") and os.path.isfile(path):
        from ldae.data.npz import NpzSource  # which is a Source

        return {"all": functools.partial(NpzSource, spec, Path(path))}
    return (of_files or file_splits)(spec, open_container(Path(path)))


def _built_in_splits(spec: str) -> dict[str, Opener]:
    from ldae.data import synthetic  # scikit-learn takes a second to import

    if spec == "digits":
        return {s: functools.partial(synthetic.Digits, spec, s) for s in ("train", "eval")}
    numbers = re.fullmatch(r"scattered-digits(?::(\d*[1-9]\d*)(?::(\d+))?)?", spec, re.ASCII)
    if not numbers:
        raise InputError(f"{spec!r} is neither digits nor scattered-digits[:N[:SEED]] with N >= 1")
    counts = {"train": int(numbers[1] or _SCATTERED_TRAIN), "eval": _SCATTERED_EVAL}
    return {
        split: functools.partial(
            synthetic.ScatteredDigits, spec, split, count, seed=int(numbers[2] or 0)
        )
        for split, count in counts.items()
    }
