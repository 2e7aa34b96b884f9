"""Listings: the image files of a container in a few arrays, kept from one start to the next."""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np

from ldae.data.containers import Archive, Container, Folder, Location, hidden, visible_entries
from ldae.data.image import image_extensions
from ldae.distributed import is_main
from ldae.errors import InputError
from ldae.files import open_atomic

_KEPT_FROM = 10_000  # images; fewer are listed in less than a tenth of a second
_UNUSED_SECONDS = 30 * 24 * 3600  # after which a kept listing is deleted
_SETTLED_NS = 2_000_000_000  # some file systems count times in steps of two seconds
_VERSION = 1

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

    @property
    def count(self) -> int:
        return len(self.locations)

    def part(self, first: int, count: int, runs: list[tuple[str, int]]) -> "Listing":
        """Return ``count`` files from file ``first`` on, which have these runs, without stamps."""
        ends = self.ends[first : first + count + 1]
        names, locations = self.names[ends[0] : ends[-1]], self.locations[first : first + count]
        return Listing(names, ends - ends[0], locations, runs, {})

    def below(self, root: str) -> "Listing":
        """Return the files below the folder ``root``."""
        before = itertools.takewhile(lambda run: not run[0].startswith(root), self.runs)
        runs = [run for run in self.runs if run[0].startswith(root)]
        return self.part(sum(count for _, count in before), sum(count for _, count in runs), runs)


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


def list_images(container: Container) -> Listing:
    """Return the listing of the image files of a container. Its ``stamps`` name all folders.

    The listing of many images is kept in the user's cache folder ($XDG_CACHE_HOME or ~/.cache).
    A folder that has changed since then is listed anew, and so is an archive. Changes are seen by
    inode and times, and without the cache folder everything is listed anew.

    Raises: InputError when the container cannot be listed or must not be used.
    """
    if not isinstance(container, Folder | Archive):
        return _list_entries(container, None)
    path = _kept_at(container.path)
    kept = None if _relist else _read(path)
    listing = (_list_folder if isinstance(container, Folder) else _list_archive)(container, kept)
    if listing.count >= _KEPT_FROM and is_main() and listing.stamps != (kept and kept.stamps):
        _write(path, listing)
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
    try:
        stamp = _stamp(os.stat(archive.path))
    except OSError as error:
        raise InputError(f"{archive.path} cannot be read: {error.strerror}") from error
    if kept and stamp and set(kept.stamps.values()) == {stamp}:
        return kept
    return _list_entries(archive, stamp)


def _list_entries(container: Container, stamp: Stamp | None) -> Listing:
    """List the entries of a container. All its folders get the stamp of the container."""
    entries = visible_entries(container)
    files = {name: entries[name] for name in sorted(filter(_is_image, entries))}
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

    return _join([part for part in folder.walk(contents) if isinstance(part, Listing)], stamps)


def _images_of(names: list[str]) -> Listing:
    return listing_of(dict.fromkeys(filter(_is_image, names), ()))


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


def _join(parts: list[Listing], stamps: dict[str, Stamp | None]) -> Listing:
    """Return the files of all parts, which are in order."""
    parts = [part for part in parts if part.count] or [listing_of({})]
    lengths = np.concatenate([np.diff(part.ends) for part in parts])
    return Listing(
        np.concatenate([part.names for part in parts]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([part.locations for part in parts]),
        [run for part in parts for run in part.runs],
        stamps,
    )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_extensions()


def _stamp(status: os.stat_result) -> Stamp | None:
    """Return the stamp of a folder or an archive, or None when it has just changed.

    A change within one step of its time would go unseen. The time of the inode (ctime) shows a
    change also after a program like rsync has set the time of the content (mtime) back.
    """
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _SETTLED_NS:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _kept_at(container: Path) -> Path | None:
    """Return where the listing of a container is kept, or None without a cache folder."""
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    key = hashlib.sha256(os.fsencode(os.path.realpath(container))).hexdigest()[:32]
    return Path(home, "ldae", "listings", f"{key}.npz") if os.path.isabs(home) else None


def _read(path: Path | None) -> Listing | None:
    """Return a kept listing, or None if there is none that can be used."""
    if path is None or not path.exists():
        return None
    with suppress(OSError):
        os.utime(path)  # it is in use
    try:
        with np.load(path) as arrays:
            names, ends, locations, index = (arrays[name] for name in _ARRAYS)
        about = json.loads(index.tobytes())
    except Exception:  # numpy does not say how it reports damaged files; they have checksums
        return None
    if about.pop("for") != _reader():
        return None
    stamps = {name: stamp and tuple(stamp) for name, stamp in about["stamps"].items()}
    return Listing(names, ends, locations, [tuple(run) for run in about["runs"]], stamps)


_ARRAYS = ("names", "ends", "locations", "index")


def _reader() -> list:
    """Return what decides which files are listed."""
    return [_VERSION, *sorted(image_extensions())]


def _write(path: Path | None, listing: Listing) -> None:
    """Keep a listing if that is possible, and delete those that are not used any more."""
    if path is None:
        return
    about = {"for": _reader(), "runs": listing.runs, "stamps": listing.stamps}
    index = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(path) as file:
            arrays = (listing.names, listing.ends, listing.locations, index)
            np.savez_compressed(file, **dict(zip(_ARRAYS, arrays)))
        for other in path.parent.glob("*.npz"):
            if time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                other.unlink()
