"""Image files of a folder or an archive, with the splits and classes that their folders say."""

import functools
import logging
import os
import struct
import zlib
from typing import BinaryIO, Callable

import numpy as np
from PIL import Image

from ldae.data.containers import Container, Location, visible_entries
from ldae.data.image import BadImage, decode, image_extensions
from ldae.data.source import Source
from ldae.errors import InputError

HELD_OUT = ("val", "valid", "validation", "test")  # names of eval splits: the first there is
_log = logging.getLogger(__name__)
Opener = Callable[[], Source]
FileSplits = Callable[[str, Container], dict[str, Opener]]


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


def file_splits(spec: str, container: Container) -> dict[str, Opener]:
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
        held_out = next((name for name in HELD_OUT if name in folders), None)
        if "train" in folders and held_out:
            return {"train": f"{inner}train/", "eval": f"{inner}{held_out}/"}
        lone = f"{inner}{min(folders)}/"
        if len(folders) > 1 or "" in folders or not all(_first_folder(n, lone) for n in images):
            return {"all": inner}
        if lone.rstrip("/").rpartition("/")[2] in HELD_OUT:
            return {"eval": lone}
        inner = lone  # around all folders: as a class it would say nothing


def _classes(names: list[str], inner: str) -> tuple[list[str], np.ndarray] | tuple[None, None]:
    folders = [_first_folder(name, inner) for name in names]
    classes = sorted(set(folders))
    if "" in classes:
        return None, None
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[folder] for folder in folders], np.int64)
