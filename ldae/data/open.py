"""Open the source of images that a user names."""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from ldae.data import cache_file, cached, list_file, parquet, shards, timm_datasets
from ldae.data.containers import (
    COMPRESSED_TAR,
    Container,
    Folder,
    Tar,
    open_container,
    visible_entries,
)
from ldae.data.digits import BUILT_IN, built_in_splits
from ldae.data.image_files import file_splits
from ldae.data.listing import list_images
from ldae.data.npz import NpzSource
from ldae.data.scenes import SCENES, picture_splits
from ldae.data.source import Source, Splits
from ldae.errors import InputError, nearest

SplitsOfFiles = Callable[[str, Container], Splits]
"""A function that finds the splits of a folder or an archive."""

_log = logging.getLogger(__name__)
_NAME_IMAGES = "name images by --eval-data, or data.eval_source in the settings of a run"
_SHARDS = {shards.SUFFIX: shards.shard_splits, parquet.SUFFIX: parquet.parquet_splits}


def image_splits(spec: str, container: Container) -> Splits:
    """Find the image files of a folder or an archive, or the samples of its shards.

    A tar archive is a shard if its images have labels beside them. In a folder, shards are looked
    for when there are no image files.

    Raises: InputError when there are no images, or the folder or archive must not be used.
    """
    if isinstance(container, Tar) and shards.is_shard(container.path):
        return {"all": partial(shards.open_shard, spec, container.path)}
    listing = list_images(container)
    if listing.is_long:  # so would be the search for other files
        return file_splits(spec, container, listing)
    entries = visible_entries(container) if isinstance(container, Folder) else {}
    files = sorted(name for name in entries if not name.endswith("/"))
    for suffix, splits_of in _SHARDS.items():
        found = [name for name in files if name.lower().endswith(suffix)]
        if found and not listing.count:
            return splits_of(spec, container.path, found)
        if found:
            _log.warning(
                "%s: its %d image files are the images, and its %d %s files are left out: to read "
                "them, name a folder without image files",
                spec,
                listing.count,
                len(found),
                suffix,
            )
    if listing.count:
        return file_splits(spec, container, listing)
    for name in files:
        if name.lower().endswith(COMPRESSED_TAR):
            open_container(container.path / name)  # refuses it, with a remedy
    raise InputError(f"{spec} contains no images")


def source_splits(spec: str, splits_of_files: SplitsOfFiles = image_splits) -> Splits:
    """Return functions that open the splits of ``spec``.

    Raises: InputError as :func:`open_source` does.
    """
    kind, _, rest = spec.partition("/")
    name = spec.partition(":")[0]
    if name in BUILT_IN:
        return built_in_splits(spec)
    if name == SCENES:
        return picture_splits(spec)
    if rest and kind in timm_datasets.SOURCES:
        return timm_datasets.timm_splits(spec)
    if not spec:
        raise InputError("no images: name their source with --data SOURCE")
    path = Path(os.path.expanduser(spec))
    if not os.path.exists(path):
        close = nearest(name, (*BUILT_IN, SCENES), likeness=0.6)
        hint = f"; did you mean {close}?" if close else ""
        raise InputError(f"no folder, archive or built-in data set is named {spec!r}{hint}")
    if path.name.lower().endswith(".npz") and path.is_file():
        return {"all": partial(NpzSource, spec, path)}
    if path.name.lower().endswith(cache_file.SUFFIX) and path.is_file():
        return cached.cached_splits(spec, path)
    if path.suffix.lower() in list_file.SUFFIXES and path.is_file():
        return {"all": partial(list_file.ListedFiles, spec, path)}
    if path.suffix.lower() == parquet.SUFFIX and path.is_file():
        return {"all": partial(parquet.ParquetSource, spec, "all", path.parent, [path.name])}
    return splits_of_files(spec, open_container(path))


def open_source(
    spec: str,
    split: Literal["train", "eval"],
    splits_of: Callable[[str], Splits] = source_splits,
) -> Source:
    """Open one split of the source ``spec``, or all of its images when it has no splits.

    - A folder, or a ``.zip`` or uncompressed ``.tar`` archive, which is read in place. Its splits
      are the sub-folders ``train`` and one of ``val``, ``valid``, ``validation``, ``test``. Its
      classes are the first-level sub-folders, sorted; with images directly inside, it is
      unlabelled. A single outer folder, as many archives have, is skipped.
    - A folder of ``.tar`` shards in webdataset's layout or of ``.parquet`` files. The names of the
      files say their splits, see :func:`ldae.data.shards.splits_by_name`. A ``.tar`` file that has
      ``0001.cls``, or ``0001.json`` with a ``label``, beside ``0001.jpg`` is one shard, without
      splits.
    - A list of image files: ``.txt``, ``.csv`` or ``.tsv``, see
      :class:`ldae.data.list_file.ListedFiles`. It has no splits.
    - A ``.parquet`` file without splits, see :class:`ldae.data.parquet.ParquetSource`.
    - A ``.npz`` file of samples: ``arr_0``, uint8 (N, H, W, C), without splits.
    - A cache, the ``.safetensors`` file of ``ldae cache``, with the splits of its source.
    - ``torch/NAME@ROOT`` and ``hfds/NAME[@ROOT]``: data sets that timm opens.
    - ``digits``, ``scattered-digits[:N[:SEED]]`` and ``digit-scenes[:N[:SEED]]``: built-in data
      sets, also beside a folder of that name, which is ``./digits``.

    Raises: InputError when the source does not exist, has no images or lacks the split.
    """
    return _open_split(spec, splits_of(spec), split)


def open_splits(
    data: str, eval_data: str | None, splits_of: Callable[[str], Splits] = source_splits
) -> tuple[Source, Source]:
    """Open the train source and the eval source, with labels by the train source's classes.

    Evaluation uses the eval split of ``eval_data``, or all of ``eval_data`` when it has no splits.
    When ``eval_data`` is None, evaluation uses the eval split of ``data``. Classes are matched by
    name, in any order.

    Raises: InputError as :func:`open_source` does, when there is no evaluation data, and when
        evaluation has a class that training lacks.
    """
    splits = splits_of(data)
    if eval_data is None and "eval" not in splits:
        raise InputError(f"{data} has no evaluation split: {_NAME_IMAGES}")
    eval_splits = splits if eval_data is None else splits_of(eval_data)
    train = _open_split(data, splits, "train")
    evaluation = _open_split(eval_data or data, eval_splits, "eval")
    _adopt_classes(evaluation, train)
    return train, evaluation


def check_unseen(train: Source, test: Source) -> None:
    """Check that no image to grade on is one to learn from.

    It is known of equal sources, and of image files in folders and lists by their places.

    Raises: InputError.
    """
    if len(train) == len(test) and train.fingerprint() == test.fingerprint():
        raise InputError(
            f"the images to grade on, of {test.spec}, are those to learn from: {_NAME_IMAGES}"
        )
    if train.spec == test.spec:  # two splits
        return
    graded = set(test.paths())
    shared = [path for path in train.paths() if path in graded] if graded else []
    if shared:
        raise InputError(
            f"{len(shared):,} of the {len(test):,} images to grade on, of {test.spec}, are among "
            f"those to learn from, such as {os.fsdecode(shared[0])}: {_NAME_IMAGES}"
        )


def check_outside(path: Path, source: Source, flag: str) -> None:
    """Check that a file or folder to write does not lie among the images.

    They would be other images with it: pictures of a run, and a .npy file is an image too.

    Args:
        flag: the flag that names ``path``.

    Raises: InputError.
    """
    folder = Path(source.spec).expanduser()
    if source.split == "all" and folder.is_dir():
        if path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{flag} {path} lies among the images {folder}: name a place outside")


def open_all(spec: str, split: Literal["train", "eval"] | None = None) -> dict[str, Source]:
    """Open all splits of ``spec`` by name, or only ``split``; a source without splits is all.

    Raises: InputError as :func:`open_source` does.
    """
    splits = source_splits(spec)
    sources = {name: splits[name]() for name in splits if split in (None, name) or name == "all"}
    if not sources:
        raise InputError(f"{spec} has no {split} split")
    return sources


def _open_split(spec: str, splits: Splits, split: str) -> Source:
    opener = splits.get(split) or splits.get("all")
    if opener is None:
        only = {"eval": "a training split: there is nothing to evaluate on"}
        rest = only.get(split, "an evaluation split: there is nothing to train on")
        raise InputError(f"{spec} has only {rest}")
    return opener()


def _adopt_classes(evaluation: Source, train: Source) -> None:
    """Renumber the labels of ``evaluation`` by the classes of ``train``, if both have classes."""
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
    if evaluation.labels is not None:  # instances number themselves by the classes
        numbers = np.array([number[name] for name in evaluation.classes])
        evaluation.labels = numbers[evaluation.labels]
    evaluation.classes = train.classes
