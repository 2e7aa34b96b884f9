"""Images with label maps: the class of every pixel."""

import logging
import os
from collections.abc import Iterable
from functools import partial

import numpy as np

from ldae.data.containers import Container, Location, visible_entries
from ldae.data.image import BadImage, decode_label_map, image_extensions, image_size
from ldae.data.image_files import FileSource, find_splits
from ldae.data.listing import listing_of
from ldae.data.open import open_splits, source_splits
from ldae.data.source import MapSource, Splits
from ldae.errors import InputError

_log = logging.getLogger(__name__)


def open_map_splits(data: str, eval_data: str | None) -> tuple[MapSource, MapSource]:
    """Open the train and the eval source, chosen as :func:`ldae.data.open.open_splits` does.

    In a folder or an archive, each file in ``images`` has a label map in ``labels``: a .png file of
    the same stem. The splits lie above or below these two folders: train/images or images/train.

    Raises: InputError as ``open_splits`` does, for a source without label maps, and for an image
        without one.
    """
    sources = open_splits(data, eval_data, partial(source_splits, splits_of_files=_paired_splits))
    for source in sources:
        if not isinstance(source, MapSource):
            raise InputError(
                f"{source.spec} has no label maps: they come from a folder or an archive with "
                "images/ and labels/, or from scattered-digits"
            )
    return sources


class PairedFiles(FileSource, MapSource):
    """Image files with their label maps, sorted by the images' stems."""

    def __init__(
        self,
        spec: str,
        split: str,
        container: Container,
        images: dict[str, Location],
        maps: dict[str, Location],
    ):
        super().__init__(spec, split, container, listing_of(images), None, None)
        self._maps = FileSource(spec, split, container, listing_of(maps), None, None)

    def label_map(self, i: int) -> np.ndarray:
        labels = decode_label_map(self._maps.open(i), self._maps.where(i))
        height, width = labels.shape
        size = image_size(self.open(i), self.where(i))
        if size != (width, height):
            raise BadImage(
                f"{self.where(i)} is {size[0]} x {size[1]} pixels, but its label map "
                f"{self._maps.name(i)} is {width} x {height}"
            )
        return labels

    def stamp(self) -> bytes:
        return super().stamp() + self._maps.fingerprint().encode()


def _paired_splits(spec: str, container: Container) -> Splits:
    """Pair the images of a container with their label maps; return functions that open its splits.

    Raises: InputError when a folder is empty, a pair is incomplete or a stem is ambiguous.
    """
    entries = visible_entries(container)
    images, maps = _names_by_stem(spec, entries)
    if not images:
        raise InputError(f"{spec} has no folder images/ with images")
    if not maps:
        raise InputError(f"{spec} has no folder labels/ with .png label maps")
    if missing := sorted(images.keys() - maps.keys()):
        stem = missing[0]
        raise InputError(f"{spec}/{images[stem]} has no label map {stem}.png in labels/")
    if unpaired := sorted(maps.keys() - images.keys()):
        _log.warning("%s: ignored label maps without images: %s", spec, ", ".join(unpaired[:5]))

    def open_split(split: str, root: str) -> PairedFiles:
        stems = sorted(stem for stem in images if stem.startswith(root))
        files = ({names[stem]: entries[names[stem]] for stem in stems} for names in (images, maps))
        return PairedFiles(spec, split, container, *files)

    stems = sorted(images)
    return {split: partial(open_split, split, root) for split, root in find_splits(stems).items()}


def _names_by_stem(spec: str, entries: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Map stems to the names of the images and of the label maps.

    A stem is the name without the extension and without the folder images/ or labels/.

    Raises: InputError when two files of a folder have the same stem.
    """
    extensions = {"images": image_extensions(), "labels": {".png"}}
    names: dict[str, dict[str, str]] = {"images": {}, "labels": {}}
    for name in sorted(entries):
        *folders, file = name.split("/")
        depth = next((depth for depth, part in enumerate(folders) if part in names), None)
        stem, extension = os.path.splitext(file)
        if depth is None or extension.lower() not in extensions[folders[depth]]:
            continue
        siblings = names[folders.pop(depth)]
        stem = "/".join([*folders, stem])
        if stem in siblings:
            raise InputError(f"{spec} contains {siblings[stem]} and {name} of the same stem")
        siblings[stem] = name
    return names["images"], names["labels"]
