"""Listings: image files in a few arrays, and those of a container, kept from start to start."""

import itertools
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np

from ldae.data import user_cache
from ldae.data.containers import Archive, Container, Folder, Location, hidden, visible_entries
from ldae.data.image import image_extensions
from ldae.distributed import is_main
from ldae.errors import InputError

_KEPT_FROM = 10_000  # images; fewer are listed in less than a tenth of a second
_SETTLED_NS = 2_000_000_000  # some file systems count times in steps of two seconds
_VERSION = 3

_relist = False  # whether kept listings are out of use

Stamp = tuple[int, ...]
"""Inode, size and times of a folder or an archive: they change when files come, go or get names."""


@dataclass(frozen=True)
class Listing:
    """Image files in order, most often sorted by name.

    They are in arrays, because a million Python strings take seconds to make, and because worker
    processes would copy them one by one.
    """

    names: np.ndarray  # uint8, the encoded names one after another
    ends: np.ndarray  # int64 (N + 1,), name i is names[ends[i] : ends[i + 1]]
    locations: np.ndarray  # int64 (N, length)
    runs: list[tuple[str, int]]  # files in a row in the same folder: folder, number of files
    stamps: dict[str, Stamp | None]  # of each folder; None: a change may go unseen
    labels: list[str] = field(default_factory=list)  # that the last number of a location counts

    @property
    def count(self) -> int:
        return len(self.locations)

    @property
    def is_long(self) -> bool:
        """Whether to list the files takes so long that their listing is kept."""
        return self.count >= _KEPT_FROM

    def part(self, first: int, count: int, runs: list[tuple[str, int]]) -> "Listing":
        """Return ``count`` files from file ``first`` on, which have these runs."""
        ends = self.ends[first : first + count + 1]
        names, locations = self.names[ends[0] : ends[-1]], self.locations[first : first + count]
        return Listing(names, ends - ends[0], locations, runs, {}, self.labels)

    def below(self, root: str) -> "Listing":
        """Return the files below the folder ``root``."""
        return self.below_each({root}).get(root, self.part(0, 0, []))

    def below_each(self, roots: set[str]) -> dict[str, "Listing"]:
        """Return the files below each folder of ``roots``, none of which lies in another.

        Folders without files are left out.
        """
        parts, first = {}, 0
        for root, group in itertools.groupby(self.runs, lambda run: _root_of(run[0], roots)):
            runs = [*group]
            count = sum(length for _, length in runs)
            if root is not None:
                parts[root] = self.part(first, count, runs)
            first += count
        return parts


def listing_of(
    files: dict[str, Location], stamps: dict[str, Stamp | None] | None = None
) -> Listing:
    """Return the listing of files with the given names and locations, in the given order."""
    encoded = [os.fsencode(name) for name in files]
    return Listing(
        np.frombuffer(b"".join(encoded), np.uint8),
        np.cumsum([0, *map(len, encoded)]),
        np.array([*files.values()], np.int64),
        [(folder, len([*group])) for folder, group in itertools.groupby(map(_folder_of, files))],
        stamps or {},
    )


def _folder_of(name: str) -> str:
    """Return the folder of a file, or of a folder itself, with its trailing slash."""
    return name[: name.rfind("/") + 1]


def _root_of(folder: str, roots: set[str]) -> str | None:
    """Return the one of ``roots`` in which ``folder`` lies, or None if it lies in none."""
    parents = itertools.accumulate(folder.split("/")[:-1], "{}{}/".format, initial="")
    return next((parent for parent in parents if parent in roots), None)


def list_images(container: Container) -> Listing:
    """Return the listing of the image files of a container. Its ``stamps`` name all folders.

    The listing of many images is kept in the user's cache folder ($XDG_CACHE_HOME or ~/.cache).
    A folder that has changed since then is listed anew, and so is an archive. Changes are seen by
    inode and times, and without the cache folder everything is listed anew.

    Raises: InputError when the container cannot be listed or must not be used.
    """
    if not isinstance(container, Folder | Archive):
        return _list_entries(container, None)
    kept = kept_listing(container.path)
    listing = (_list_folder if isinstance(container, Folder) else _list_archive)(container, kept)
    keep(container.path, listing, kept)
    return listing


@contextmanager
def relisting() -> Iterator[None]:
    """List everything anew inside of this context. The new listings are kept again.

    Examples:
        >>> with ldae.relisting():
        ...     ldae.knn("runs/l_dae", "/data/imagenet")
    """
    global _relist
    _relist = True
    try:
        yield
    finally:
        _relist = False


def _list_archive(archive: Archive, kept: Listing | None) -> Listing:
    stamp = stamp_of(archive.path)
    if kept and stamp and set(kept.stamps.values()) == {stamp}:
        return kept
    return _list_entries(archive, stamp)


def _list_entries(container: Container, stamp: Stamp | None) -> Listing:
    """List the entries of a container. All its folders get the stamp of the container."""
    entries = visible_entries(container)
    files = {name: entries[name] for name in sorted(filter(is_image, entries))}
    return listing_of(files, dict.fromkeys(map(_folder_of, entries), stamp))


def _list_folder(folder: Folder, kept: Listing | None) -> Listing:
    """List a folder; only those folders in it are read that have changed since ``kept``."""
    stamps: dict[str, Stamp | None] = {}
    unchanged = _contents(kept) if kept else {}

    def contents(name: str, status: os.stat_result) -> Iterable[str | Listing]:
        stamp = stamps[name] = _stamp(status)
        if kept and stamp and kept.stamps.get(name) == stamp:
            return unchanged[name]
        names, has_lost_link = folder.scan(name)
        if has_lost_link:
            stamps[name] = None
        parts: list[str | Listing] = []
        for is_folder, group in itertools.groupby(names, lambda name: name.endswith("/")):
            visible = [name for name in group if not hidden(name)]
            parts += visible if is_folder else [_images_of(visible)]
        return parts

    parts = [part for part in folder.walk(contents) if isinstance(part, Listing)]
    return join(parts, stamps, [])


def _images_of(names: list[str]) -> Listing:
    return listing_of(dict.fromkeys(filter(is_image, names), ()))


def _contents(listing: Listing) -> dict[str, list[str | Listing]]:
    """Return what ``listing`` has in each folder, sorted: sub-folders, and files in a row."""
    contents: dict[str, list[tuple[str, str | Listing]]] = {name: [] for name in listing.stamps}
    first = 0
    for folder, count in listing.runs:
        part = listing.part(first, count, [(folder, count)])
        contents[folder].append((os.fsdecode(part.names[: part.ends[1]].tobytes()), part))
        first += count
    for folder in filter(None, listing.stamps):
        contents[_folder_of(folder[:-1])].append((folder, folder))
    return {
        folder: [part for _, part in sorted(parts, key=itemgetter(0))]
        for folder, parts in contents.items()
    }


def join(parts: list[Listing], stamps: dict[str, Stamp | None], labels: list[str]) -> Listing:
    """Return the files of all parts, which are in order, with these stamps and labels."""
    parts = [part for part in parts if part.count] or [listing_of({})]
    lengths = np.concatenate([np.diff(part.ends) for part in parts])
    return Listing(
        np.concatenate([part.names for part in parts]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([part.locations for part in parts]),
        [run for part in parts for run in part.runs],
        stamps,
        labels,
    )


def is_image(name: str) -> bool:
    """Return whether a file is an image by the extension of its name."""
    return os.path.splitext(name)[1].lower() in image_extensions()


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of an archive, or None when it has just changed.

    Raises: InputError when it cannot be examined.
    """
    try:
        return _stamp(os.stat(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _stamp(status: os.stat_result) -> Stamp | None:
    """Return the stamp of a folder or an archive, or None when it has just changed.

    A change within one step of its time would go unseen. The time of the inode (ctime) shows a
    change also after a program like rsync has set the time of the content (mtime) back.
    """
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _SETTLED_NS:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def kept_listing(key: Path) -> Listing | None:
    """Return the listing kept for a path, or None if there is none that can be used."""
    found = None if _relist else user_cache.read(key)
    if found is None:
        return None
    arrays, facts = found
    if facts.pop("for") != _reader():
        return None
    facts["stamps"] = {name: stamp and tuple(stamp) for name, stamp in facts["stamps"].items()}
    return Listing(**arrays, runs=[tuple(run) for run in facts.pop("runs")], **facts)


def keep(key: Path, listing: Listing, before: Listing | None) -> None:
    """Keep a listing of many images for a path, unless it is the one that was kept ``before``."""
    if listing.is_long and is_main() and listing.stamps != (before and before.stamps):
        arrays = {name: getattr(listing, name) for name in ("names", "ends", "locations")}
        facts = {name: getattr(listing, name) for name in ("runs", "stamps", "labels")}
        user_cache.write(key, arrays, {"for": _reader(), **facts})


def _reader() -> list:
    """Return what decides which files are listed."""
    return [_VERSION, *sorted(image_extensions())]
