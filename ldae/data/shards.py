"""The .tar shards of webdataset: samples of files with the same key."""

import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldae.console import progress
from ldae.data.classes import ordered
from ldae.data.containers import Location, Tar, hidden, read_at, visible_entries
from ldae.data.image import image_extensions
from ldae.data.image_files import EVAL_NAMES, FileSource
from ldae.data.listing import Listing, is_image, join, keep, kept_listing, listing_of, stamp_of
from ldae.data.source import Splits
from ldae.errors import InputError, first_line

SUFFIX = ".tar"
_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # key and extension of a file, by webdataset
_SPLIT = re.compile(rf"(?<![a-z])(train|{'|'.join(EVAL_NAMES)})(?![a-z])")
_NO_LABEL = -1
_EXAMINED = 100  # entries of an archive that show whether it is a shard
_log = logging.getLogger(__name__)


class Shards:
    """The shards in a folder, read in place.

    The name of an entry begins with that of its shard. A location is offset, size and time of an
    entry, and the number of its label.
    """

    def __init__(self, path: Path):
        self.path = path

    def open(self, name: bytes, location: Location) -> BinaryIO:
        # No folder around shards is named like one.
        end = name.lower().index(b".tar/") + len(SUFFIX)
        shard = name[:end]
        offset, size, *_ = location
        with open(os.path.join(os.fsencode(self.path), shard), "rb", buffering=0) as file:
            return io.BytesIO(read_at(file, offset, size))

    def stamp(self, names: list[bytes], locations: np.ndarray) -> bytes:
        return locations[:, 1:3].tobytes()  # size and time


def shard_splits(spec: str, folder: Path, shards: list[str]) -> Splits:
    """Find the images in the shards of a folder and return functions that open its splits.

    A sample is all files of a shard whose paths are the same up to the first dot of the file's
    name. It is an image (``.jpg``, ``.png`` or any other extension of images) and perhaps its
    label: ``.cls``, a text or a number, or ``label`` in ``.json``. Images are in the order of the
    shards' names, and of their own names in a shard. The names of the shards say their splits, see
    ``splits_by_name``.

    Raises: InputError when a shard cannot be listed, a label cannot be read, there are no images,
        or only some images of a split have a label.
    """
    for name in shards:
        if f"{SUFFIX}/" in name.lower():
            raise InputError(f"{spec} has the shard {name} in a folder that is named like a shard")
    key = folder / f"*{SUFFIX}"  # beside the listing of the folder itself
    listing = _list_shards(spec, key, {f"{name}/": folder / name for name in shards})
    if not listing.count:
        raise InputError(f"{spec} contains no images: its .tar shards have none")

    def open_split(split: str, names: list[str]) -> FileSource:
        starts = [f"{name}/" for name in names]
        below = listing.below_each({*starts})
        part = join([below[start] for start in starts if start in below], {}, listing.labels)
        if not part.count:
            raise InputError(f"{spec} has no images in the shards of its {split} split")
        return FileSource(spec, split, Shards(folder), part, *_classes(spec, part))

    splits = splits_by_name(shards)
    return {split: partial(open_split, split, names) for split, names in splits.items()}


def is_shard(path: Path) -> bool:
    """Return whether a tar archive is a shard: among its first images, one has a label beside it.

    An archive that cannot be read is none.
    """
    samples: dict[str, dict[str, Location]] = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in islice(archive, _EXAMINED):
                match = _KEY.fullmatch(member.name.removeprefix("./"))
                if match and member.isreg() and not hidden(match[0]):
                    location = (member.offset_data, member.size)
                    samples.setdefault(match[1], {})[match[2].lower()] = location
            images = [parts for parts in samples.values() if _image_among(parts)]
            if any("cls" in parts for parts in images):
                return True
            with_json = next((parts for parts in images if "json" in parts), {})
            return _label(file, with_json) is not None
    except (OSError, ValueError, RecursionError, tarfile.TarError):
        return False


def open_shard(spec: str, path: Path) -> FileSource:
    """Open one shard, as ``shard_splits`` does but without splits and with the names in it.

    Raises: InputError as ``shard_splits``.
    """
    listing = _list_shards(spec, path / "*", {"": path})  # beside the listing as a plain archive
    return FileSource(spec, "all", Tar(path), listing, *_classes(spec, listing))


def _classes(spec: str, listing: Listing) -> tuple[list[str], np.ndarray] | tuple[None, None]:
    numbers = listing.locations[:, -1]
    unlabelled = numbers == _NO_LABEL
    if unlabelled.all():
        return None, None
    if unlabelled.any():
        first = int(unlabelled.argmax())
        name = listing.names[listing.ends[first] : listing.ends[first + 1]].tobytes()
        raise InputError(f"{spec}/{os.fsdecode(name)} has no label, and others have")
    used = np.unique(numbers).tolist()
    classes = ordered(listing.labels[number] for number in used)
    class_of = np.zeros(len(listing.labels), np.int64)
    class_of[used] = [classes.index(listing.labels[number]) for number in used]
    return classes, class_of[numbers]


def splits_by_name(files: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of each split; the keys are as in ``Splits``.

    The last word of a path that is ``train`` or one of ``EVAL_NAMES`` names the split, as in
    ``imagenet-train-0042.tar`` or ``val/0042.tar``. If both splits are there, all other files
    belong to neither.
    """
    found: dict[str, list[str]] = {}
    for name in files:
        words = _SPLIT.findall(name.lower())
        found.setdefault(words[-1] if words else "", []).append(name)
    eval_name = next((name for name in EVAL_NAMES if name in found), None)
    if eval_name and "train" in found:
        return {"train": found["train"], "eval": found[eval_name]}
    if eval_name and len(found) == 1:
        return {"eval": found[eval_name]}
    return {"all": [name for names in found.values() for name in names]}


def _list_shards(spec: str, key: Path, shards: dict[str, Path]) -> Listing:
    """List shards; only those are read that have changed since their listing was kept for ``key``.

    ``shards`` are their paths, by the beginning that the names of their images get.
    """
    kept = kept_listing(key)
    unchanged = kept.below_each({*shards}) if kept else {}
    left_out: list[str] = []
    numbers = {label: number for number, label in enumerate(kept.labels if kept else ())}
    stamps, parts = {}, []
    with progress(len(shards), "listing shards", after=1) as bar:
        for start, path in shards.items():
            stamp = stamps[start] = stamp_of(path)
            if kept and stamp and kept.stamps.get(start) == stamp:
                parts.append(unchanged.get(start, listing_of({})))
            else:
                parts.append(listing_of(_samples(path, start, numbers, left_out)))
            bar.update()
    if left_out:
        _log.warning(
            "%s: %d image files in its shards are left out, such as %s: names that agree up to the "
            "first dot are one sample, of one image",
            spec,
            len(left_out),
            left_out[0],
        )
    listing = join(parts, stamps, [*numbers])
    keep(key, listing, kept)
    return listing


def _samples(
    path: Path, start: str, numbers: dict[str, int], left_out: list[str]
) -> dict[str, Location]:
    """Return the location of the image of every sample in a shard, sorted by name.

    Their names begin with ``start``. Labels that ``numbers`` does not have are added to it, and to
    ``left_out`` the names of image files that are of no sample, without arrays.
    """
    entries = visible_entries(Tar(path))
    samples: dict[str, dict[str, str]] = {}
    for name in entries:
        if match := _KEY.fullmatch(name):
            samples.setdefault(match[1], {})[match[2].lower()] = name
    images = {}
    with open(path, "rb", buffering=0) as file:
        for key, names in samples.items():
            if (extension := _image_among(names)) is None:
                continue
            try:
                label = _label(file, {part: entries[name] for part, name in names.items()})
            except (OSError, ValueError, RecursionError) as error:
                raise InputError(
                    f"the label of {path}/{key} cannot be read: {first_line(error)}"
                ) from error
            number = _NO_LABEL if label is None else numbers.setdefault(label, len(numbers))
            image = names[extension]
            images[start + image] = (*entries[image], number)
    others = (start + name for name in entries if is_image(name) and not name.endswith(".npy"))
    left_out += (name for name in others if name not in images)
    return {name: images[name] for name in sorted(images)}


def _image_among(extensions: Iterable[str]) -> str | None:
    """Return the extension of the image of a sample, or None if it has no image."""
    images = sorted(part for part in extensions if f".{part}" in image_extensions())
    # Beside another image, an array is most often an embedding of it.
    return next((part for part in images if part != "npy"), images[0] if images else None)


def _label(file: BinaryIO, parts: dict[str, Location]) -> str | None:
    """Return the label of a sample, or None if it has none.

    ``parts`` are the locations of its files in the shard by their extensions.

    Raises: OSError, ValueError or RecursionError when the label cannot be read.
    """
    label: object = None
    if "cls" in parts:
        label = read_at(file, *parts["cls"][:2]).decode()
    elif "json" in parts:
        facts = json.loads(read_at(file, *parts["json"][:2]))
        label = facts.get("label") if isinstance(facts, dict) else None
    if label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
        raise ValueError(f"{label!r} is neither a text nor a whole number")
    return str(label).strip()
