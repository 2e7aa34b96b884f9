"""Where images come from: folders, archives, arrays, timm's data sets and built-in data."""

import difflib
import functools
import logging
import os
import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, Callable, Literal

import numpy as np
from PIL import Image

from ldae.data.containers import Container, Location, open_container, visible_entries
from ldae.data.image import BadImage, decode, image_extensions
from ldae.errors import InputError

BUILT_IN = ("digits", "scattered-digits")
_SCATTERED_TRAIN, _SCATTERED_EVAL = 20_000, 5_000  # images
_HELD_OUT = ("val", "valid", "validation", "test")  # names of eval splits: the first there is
_log = logging.getLogger(__name__)


class Source:
    """Images by index, with the labels that are known.

    ``spec`` is what the user wrote; ``split`` is train, eval, or all where there are no splits;
    ``classes`` are names, or None; ``labels`` are int64 (N,) into ``classes``, or None.
    A source can be pickled, and read by several processes and threads at once.
    """

    def __init__(self, spec: str, split: str, classes: list[str] | None, labels: np.ndarray | None):
        self.spec = spec
        self.split = split
        self.classes = classes
        self.labels = labels

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """The name of image ``i``, unique and stable: a path in the source, or split and number."""
        return f"{self.split}/{i:06d}"

    def where(self, i: int) -> str:
        """Image ``i`` as messages call it."""
        return f"{self.spec}/{self.name(i)}"

    def image(self, i: int) -> Image.Image | np.ndarray:
        """Image ``i``, as :func:`ldae.data.image.decode` returns it.

        Raises: BadImage when it can not be read or decoded.
        """
        raise NotImplementedError


Opener = Callable[[], Source]
FileSplits = Callable[[str, Container], dict[str, Opener]]


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
    return (of_files or _file_splits)(spec, open_container(Path(path)))


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


class FileSource(Source):
    """The image files of a folder or an archive, sorted by name."""

    def __init__(
        self,
        spec: str,
        split: str,
        container: Container,
        files: dict[str, Location],
        classes: list[str] | None,
        labels: np.ndarray | None,
    ):
        super().__init__(spec, split, classes, labels)
        self._container = container
        # Millions of Python objects would be copied into every worker process: two arrays are not.
        encoded = [os.fsencode(name) for name in files]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._locations = np.array(list(files.values()), np.int64)

    def __len__(self) -> int:
        return len(self._locations)

    def _encoded_name(self, i: int) -> bytes:
        return self._names[self._ends[i] : self._ends[i + 1]]

    def name(self, i: int) -> str:
        return self._encoded_name(i).decode("utf-8", "backslashreplace")

    def image(self, i: int) -> Image.Image | np.ndarray:
        return decode(self.open(i), self.where(i))

    def open(self, i: int) -> BinaryIO | bytes:
        """The file of image ``i``, or its path. Raises: BadImage when it can not be read."""
        try:
            return self._container.open(self._encoded_name(i), tuple(self._locations[i].tolist()))
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise BadImage(f"{self.where(i)} can not be read: {error}") from error


def _file_splits(spec: str, container: Container) -> dict[str, Opener]:
    entries = visible_entries(container)
    extensions = image_extensions()
    images = sorted(name for name in entries if os.path.splitext(name)[1].lower() in extensions)
    if not images:
        raise InputError(f"{spec} holds no images")

    def open_split(split: str, inner: str) -> FileSource:
        files = {name: entries[name] for name in images if name.startswith(inner)}
        classes, labels = _classes(list(files), inner)
        if classes is not None:
            folders = {_first_folder(e, inner) for e in entries if e.startswith(inner)} - {""}
            if empty := sorted(folders.difference(classes)):
                _log.warning("%s: left out, for they hold no images: %s", spec, ", ".join(empty))
        return FileSource(spec, split, container, files, classes, labels)

    return {
        split: functools.partial(open_split, split, inner)
        for split, inner in find_splits(images).items()
    }


def _first_folder(name: str, inner: str) -> str:
    """The first folder of ``name`` below the folder ``inner``; empty when there is none between."""
    head, slash, _ = name[len(inner) :].partition("/")
    return head if slash else ""


def find_splits(images: list[str]) -> dict[str, str]:
    """The folder, with its slash, that each split lies in: train and eval, or all, or eval alone."""
    inner = ""
    while True:
        folders = {_first_folder(name, inner) for name in images}
        held_out = next((name for name in _HELD_OUT if name in folders), None)
        if "train" in folders and held_out:
            return {"train": f"{inner}train/", "eval": f"{inner}{held_out}/"}
        lone = f"{inner}{min(folders)}/"
        if len(folders) > 1 or "" in folders or not all(_first_folder(n, lone) for n in images):
            return {"all": inner}
        if lone.rstrip("/").rpartition("/")[2] in _HELD_OUT:
            return {"eval": lone}
        inner = lone  # around all folders: as a class it would say nothing


def _classes(names: list[str], inner: str) -> tuple[list[str], np.ndarray] | tuple[None, None]:
    folders = [_first_folder(name, inner) for name in names]
    classes = sorted(set(folders))
    if "" in classes:
        return None, None
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[folder] for folder in folders], np.int64)


class TorchSource(Source):
    """A data set of torchvision, by timm's name for it, downloaded into its root if absent."""

    def __init__(self, spec: str, split: str):
        name, _, root = spec.removeprefix("torch/").partition("@")
        if not root:
            raise InputError(f"{spec} names no folder for the data: write torch/{name}@ROOT")
        timm_split = "train" if split == "train" else "validation"
        try:
            self._dataset = _create_dataset(f"torch/{name}", root, timm_split)
        except Exception as error:  # of download, checksum, archive or name
            raise InputError(f"{spec} can not be opened: {_first_line(error)}") from error
        names = getattr(self._dataset, "wnids", getattr(self._dataset, "classes", None))
        super().__init__(spec, split, *_labelled(names, getattr(self._dataset, "targets", None)))

    def __len__(self) -> int:
        return len(self._dataset)

    def image(self, i: int) -> Image.Image:
        try:
            return self._dataset[i][0]
        except Exception as error:  # the data set decodes: any of Pillow's errors
            raise BadImage(f"{self.where(i)} can not be decoded: {_first_line(error)}") from error


class HfdsSource(Source):
    """A data set of the Hugging Face hub, with columns ``image`` and, if labelled, ``label``."""

    def __init__(self, spec: str, split: str):
        try:
            import datasets  # noqa: F401  timm would end in a bare ImportError
        except ImportError as error:
            raise InputError(
                f"{spec} needs the package datasets: pip install 'ldae[hfds]'"
            ) from error
        name, _, root = spec.removeprefix("hfds/").partition("@")
        for hub_split in ("train",) if split == "train" else _HELD_OUT:
            try:
                self._reader = _create_dataset(f"hfds/{name}", root or None, hub_split).reader
                break
            except ValueError as error:  # most often: there is no such split
                reason = error
            except Exception as error:  # of network, script or format
                raise InputError(f"{spec} can not be opened: {_first_line(error)}") from error
        else:
            raise InputError(f"{spec} has no {split} split: {_first_line(reason)}") from reason
        table, key = self._reader.dataset, self._reader.label_key
        names = sorted(self._reader.class_to_idx, key=self._reader.class_to_idx.get)
        values = list(table[key]) if key in table.column_names else None
        super().__init__(spec, split, *_labelled(names, values))

    def __len__(self) -> int:
        return len(self._reader)

    def image(self, i: int) -> Image.Image | np.ndarray:
        return decode(self._reader[i][0], self.where(i))


def _create_dataset(name: str, root: str | None, split: str):
    from timm.data import create_dataset

    root = os.path.expanduser(root) if root else None
    return create_dataset(name, root=root, split=split, download=name.startswith("torch/"))


def _labelled(names, values) -> tuple[list[str], np.ndarray] | tuple[None, None]:
    """Classes and labels; values without names are their own names, -1 means unlabelled."""
    if values is None or -1 in (values := np.asarray(values)):
        return None, None
    if not names:
        names, values = np.unique(values, return_inverse=True)
    return [str(name) for name in names], values.astype(np.int64)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
