"""Image files in a folder or an archive, with splits and classes named by its sub-folders."""

import itertools
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from functools import cache, partial
from typing import BinaryIO

import numpy as np
from PIL import Image

from ldae.data.containers import Container, Folder, Storage
from ldae.data.image import BadImage, decode
from ldae.data.listing import Listing
from ldae.data.source import Source, Splits

EVAL_NAMES = ("val", "valid", "validation", "test")  # of eval splits; the first present is used
_SPLIT_NAMES = {"train", "training", "testing", *EVAL_NAMES}
_log = logging.getLogger(__name__)


class FileSource(Source):
    """The image files of one split of a folder or an archive, sorted by name."""

    def __init__(
        self,
        spec: str,
        split: str,
        storage: Storage,
        listing: Listing,
        classes: list[str] | None,
        labels: np.ndarray | None,
    ):
        super().__init__(spec, split, classes, labels)
        self._storage = storage
        self._names = listing.names.tobytes()
        self._ends = listing.ends
        self._locations = listing.locations

    def __len__(self) -> int:
        return len(self._locations)

    def _encoded_name(self, i: int) -> bytes:
        return self._names[self._ends[i] : self._ends[i + 1]]

    def name(self, i: int) -> str:
        return self._encoded_name(i).decode("utf-8", "backslashreplace")

    def paths(self) -> Iterator[bytes]:
        if not isinstance(self._storage, Folder):
            return
        root = os.fsencode(self._storage.path)
        # Links to folders are followed, but not those to a million files, which takes minutes.
        real = cache(lambda folder: os.path.realpath(os.path.join(root, folder)) + b"/")
        for i in range(len(self)):
            name = self._encoded_name(i)
            start = name.rfind(b"/") + 1
            yield real(name[:start]) + name[start:]

    def image(self, i: int) -> Image.Image | np.ndarray:
        return decode(self.open(i), self.where(i))

    def open(self, i: int) -> BinaryIO | bytes:
        """Return the file of image ``i``, opened or as a path.

        Raises: BadImage when the file cannot be read.
        """
        try:
            return self._storage.open(self._encoded_name(i), tuple(self._locations[i].tolist()))
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise BadImage(f"{self.where(i)} cannot be read: {error}") from error

    def stamp(self) -> bytes:
        names = [self._encoded_name(i) for i in range(len(self))]
        return self._storage.stamp(names, self._locations)


def file_splits(spec: str, container: Container, listing: Listing) -> Splits:
    """Return functions that open the splits of a container with these image files."""

    def open_split(split: str, root: str) -> FileSource:
        part = listing.below(root)
        classes, labels = _classes(part, root)
        if classes is not None:
            folders = {
                _first_folder(name, root) for name in listing.stamps if name.startswith(root)
            }
            if empty := sorted(folders - {"", *classes}):
                _log.warning("%s: ignored folders without images: %s", spec, ", ".join(empty))
            if len(classes) > 1 and {name.lower() for name in classes} <= _SPLIT_NAMES:
                _log.warning(
                    "%s: %s count as classes; as splits they must be named train/ and val/",
                    spec,
                    " and ".join(f"{name}/" for name in classes),
                )
        source = FileSource(spec, split, container, part, classes, labels)
        if classes is None and any(folder != root for folder, _ in part.runs):
            before = itertools.takewhile(lambda run: run[0] != root, part.runs)
            stray = source.name(sum(count for _, count in before))
            source.unlabelled = f"its sub-folders are no classes, since {stray} lies beside them"
        return source

    roots = find_splits([folder for folder, _ in listing.runs])
    if left_out := [run for run in listing.runs if not run[0].startswith(tuple(roots.values()))]:
        level = roots["train"].count("/")
        beside = {"/".join(folder.split("/")[:level]) for folder, _ in left_out}
        _log.warning(
            "%s: its splits are %s, and %d images beside them are left out, in %s",
            spec,
            " and ".join(roots.values()),
            sum(count for _, count in left_out),
            ", ".join(folder or "the folder itself" for folder in sorted(beside)),
        )
    return {split: partial(open_split, split, root) for split, root in roots.items()}


def _first_folder(name: str, root: str) -> str:
    """Return the first folder of the path ``name`` below ``root``, or "" if there is none."""
    head, slash, _ = name[len(root) :].partition("/")
    return head if slash else ""


def find_splits(names: list[str]) -> dict[str, str]:
    """Return the folder of each split, with its trailing slash; the keys are as in ``Splits``.

    ``names`` are those of the images, or only of the folders that have images directly inside.
    The folders may be in capitals, such as Train/.
    """
    root = ""
    while True:
        folders = {_first_folder(name, root) for name in names}
        spelt = {folder.lower(): folder for folder in sorted(folders)}  # small letters come last
        eval_name = next((spelt[name] for name in EVAL_NAMES if name in spelt), None)
        if "train" in spelt and eval_name:
            return {"train": f"{root}{spelt['train']}/", "eval": f"{root}{eval_name}/"}
        folder = min(folders)
        below = f"{root}{folder}/"
        if len(folders) > 1 or not folder or not all(_first_folder(name, below) for name in names):
            return {"all": root}
        if folder.lower() in EVAL_NAMES:
            return {"eval": below}
        root = below  # a single folder around all other folders cannot distinguish classes


def _classes(listing: Listing, root: str) -> tuple[list[str], np.ndarray] | tuple[None, None]:
    folders = [_first_folder(folder, root) for folder, _ in listing.runs]
    classes = sorted(set(folders))
    if "" in classes:
        return None, None
    number = {name: i for i, name in enumerate(classes)}
    counts = [count for _, count in listing.runs]
    return classes, np.repeat(np.array([number[name] for name in folders], np.int64), counts)
