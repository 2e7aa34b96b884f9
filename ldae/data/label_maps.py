"""Images that have a label map each: the class of every pixel."""

import logging
import os
from functools import partial

import numpy as np

from ldae.data.containers import Container, Location, visible_entries
from ldae.data.folders import FileSource, Opener, find_splits
from ldae.data.image import BadImage, decode_label_map, image_extensions, size_of
from ldae.data.open import open_splits
from ldae.data.source import MapSource
from ldae.errors import InputError

_FOLDERS = ("images", "labels")
_log = logging.getLogger(__name__)


def open_map_splits(data: str, eval_data: str | None) -> tuple[MapSource, MapSource]:
    """The train and the eval source, as :func:`ldae.data.sources.open_splits` chooses them.

    In a folder or an archive, ``images`` and ``labels`` hold files of equal stems, the label maps as
    .png. The splits lie above or below these two: train/images or images/train.

    Raises: InputError as ``open_splits`` does, for a source without label maps, and for an image
        without one.
    """
    found = open_splits(data, eval_data, _paired_splits)
    for source in found:
        if not isinstance(source, MapSource):
            raise InputError(
                f"{source.spec} has no label maps: they come from a folder or an archive with "
                "images/ and labels/, or from scattered-digits"
            )
    return found


class PairedFiles(FileSource, MapSource):
    """Image files and their label maps, in the order of the images' names."""

    def __init__(
        self,
        spec: str,
        split: str,
        container: Container,
        images: dict[str, Location],
        maps: dict[str, Location],
    ):
        super().__init__(spec, split, container, images, None, None)
        self._maps = FileSource(spec, split, container, maps, None, None)

    def label_map(self, i: int) -> np.ndarray:
        labels = decode_label_map(self._maps.open(i), self._maps.where(i))
        height, width = labels.shape
        image = size_of(self.open(i), self.where(i))
        if image != (width, height):
            raise BadImage(
                f"{self.where(i)} is {image[0]} x {image[1]} pixels, and its label map "
                f"{self._maps.name(i)} {width} x {height}"
            )
        return labels


def _paired_splits(spec: str, container: Container) -> dict[str, Opener]:
    entries = visible_entries(container)
    images, maps = _by_stem(spec, entries, "images"), _by_stem(spec, entries, "labels")
    for what, found in zip(_FOLDERS, (images, maps)):
        if not found:
            files = "images" if what == "images" else ".png label maps"
            raise InputError(f"{spec} has no folder {what}/ that holds {files}")
    for stem in sorted(images.keys() - maps.keys()):
        raise InputError(
            f"{spec}/{images[stem]} has no label map: there is no {stem}.png in labels/"
        )
    if lone := sorted(maps.keys() - images.keys()):
        _log.warning("%s: left out, for they have no image: %s", spec, ", ".join(lone[:5]))

    def open_split(split: str, inner: str) -> PairedFiles:
        stems = sorted(stem for stem in images if stem.startswith(inner))
        files = ({part[stem]: entries[part[stem]] for stem in stems} for part in (images, maps))
        return PairedFiles(spec, split, container, *files)

    return {
        split: partial(open_split, split, inner)
        for split, inner in find_splits(sorted(images)).items()
    }


def _by_stem(spec: str, entries: dict[str, Location], folder: str) -> dict[str, str]:
    """Stem -> name of the files in ``folder``; a stem is the name without the folder and suffix.

    Raises: InputError when two have the same stem.
    """
    suffixes = image_extensions() if folder == "images" else {".png"}
    found: dict[str, str] = {}
    for name in sorted(entries):
        *above, last = name.split("/")
        here = next((place for place, part in enumerate(above) if part in _FOLDERS), None)
        stem, suffix = os.path.splitext(last)
        if here is None or above[here] != folder or suffix.lower() not in suffixes:
            continue
        key = "/".join([*above[:here], *above[here + 1 :], stem])
        if key in found:
            raise InputError(f"{spec} holds {found[key]} and {name}, which have the same label map")
        found[key] = name
    return found
