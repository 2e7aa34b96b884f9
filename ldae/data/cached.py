"""Decoded crops in one mapped file: the format of the file, and the source that reads it."""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldae.data.image import BadImage
from ldae.data.source import Source, Splits
from ldae.data.transforms import CropTransform
from ldae.errors import InputError

SUFFIX = ".safetensors"
BLOCK = 64  # images that share a checksum
_FORMAT, _VERSION = "ldae cache", "1"
_MAX_HEADER = 100_000_000  # bytes, the limit of safetensors
_DTYPES = {"I64": np.int64, "U8": np.uint8}
_UNWRITTEN = -1  # in place of the checksum of a block


class CacheFile:
    """A cache: a safetensors file with the arrays of each split, mapped read-only.

    - ``images``: uint8 (N, C, S, S).
    - ``bad``: uint8 (N,), 1 for an image that could not be decoded, which is black.
    - ``labels``: int64 (N,).
    - ``names``: uint8, the names in UTF-8 one after another; ``ends``: int64 (N + 1,), name i is
      ``names[ends[i] : ends[i + 1]]``.
    - ``checksums``: int64, the CRC-32 of ``bad`` and ``images`` of each ``BLOCK`` images.

    The metadata has spec, classes and fingerprint of each split, and the CRC-32 of its labels and
    names as ``index``. A cache can be pickled.

    Raises: InputError when ``file`` is another file, truncated, or of another version.
    """

    def __init__(self, file: BinaryIO):
        self.path = Path(file.name)
        metadata, entries, start = _read_header(file)
        self.splits: dict[str, dict] = json.loads(metadata["splits"])
        data = np.asarray(np.memmap(file, np.uint8, "r"))
        self.arrays: dict[str, dict[str, np.ndarray]] = {split: {} for split in self.splits}
        self._places = {}  # of the arrays in the file, in bytes
        for key, entry in entries.items():
            split, _, name = key.partition(".")
            first, end = (start + offset for offset in entry["data_offsets"])
            array = data[first:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            self.arrays[split][name] = array
            self._places[split, name] = first

    def __reduce__(self) -> tuple:
        return open_cache, (self.path,)

    def whole_blocks(self, split: str) -> Iterator[bool]:
        """Yield for each block whether it is written and has its checksum, on all cores."""
        arrays = self.arrays[split]

        def is_whole(block: int) -> bool:
            rows, checksum = slice(block * BLOCK, (block + 1) * BLOCK), arrays["checksums"][block]
            bad, images = arrays["bad"][rows], arrays["images"][rows]
            return checksum != _UNWRITTEN and checksum == _checksum(bad, images)

        with ThreadPoolExecutor() as pool:
            yield from pool.map(is_whole, range(len(arrays["checksums"])))

    def index_is_whole(self, split: str) -> bool:
        """Return whether labels and names of a split have their checksum."""
        arrays = self.arrays[split]
        found = _checksum(*(arrays[name] for name in ("labels", "ends", "names")))
        return found == self.splits[split]["index"]

    def write_block(
        self, file: BinaryIO, split: str, first: int, bad: np.ndarray, images: np.ndarray
    ) -> None:
        """Write a block that begins at image ``first`` to ``file``, which is open for writing.

        Raises: OSError when it cannot be written. (A full disk would kill a process that writes to
            mapped memory.)
        """
        checksum = np.array([_checksum(bad, images)])
        rows = {"bad": (first, bad), "images": (first, images)}
        for name, (row, content) in (rows | {"checksums": (first // BLOCK, checksum)}).items():
            file.seek(self._places[split, name] + row * self.arrays[split][name][0].nbytes)
            file.write(content)
        file.flush()


def open_cache(path: Path) -> CacheFile:
    """Open the cache at ``path``. Raises: InputError when it cannot be opened or is no cache."""
    try:
        with open(path, "rb") as file:
            return CacheFile(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def write_index(file: BinaryIO, sources: dict[str, Source], side: int, in_chans: int) -> None:
    """Write a cache whose blocks are not written yet: names, labels and room for the crops.

    ``file`` is empty and open for writing. The room takes no space on the disk before it is filled.
    """
    splits, numbers, names, rooms = {}, {}, {}, {}
    for split, source in sources.items():
        encoded = [source.name(i).encode() for i in range(len(source))]
        labels = np.full(len(source), -1) if source.labels is None else source.labels
        ends, joined = (
            np.cumsum([0, *map(len, encoded)]),
            np.frombuffer(b"".join(encoded), np.uint8),
        )
        splits[split] = {
            "spec": source.spec,
            "classes": source.classes,
            "fingerprint": source.fingerprint(),
            "index": _checksum(labels, ends, joined),
        }
        numbers[f"{split}.labels"] = labels
        numbers[f"{split}.ends"] = ends
        numbers[f"{split}.checksums"] = np.full(math.ceil(len(source) / BLOCK), _UNWRITTEN)
        names[f"{split}.names"] = joined
        rooms[f"{split}.bad"] = np.broadcast_to(np.uint8(0), len(source))
        shape = (len(source), in_chans, side, side)
        rooms[f"{split}.images"] = np.broadcast_to(np.uint8(0), shape)
    metadata = {"format": _FORMAT, "version": _VERSION, "splits": json.dumps(splits)}
    header, end = {"__metadata__": metadata}, 0
    for name, array in (numbers | names | rooms).items():  # numbers first, so that they are aligned
        dtype, places = "U8" if array.dtype == np.uint8 else "I64", (end, end := end + array.nbytes)
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": places}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.truncate(8 + len(text) + end)
    file.seek(8)
    file.write(text)
    for array in (numbers | names).values():
        file.write(array)
    file.flush()
    os.fsync(file.fileno())
    file.seek(0)
    file.write(len(text).to_bytes(8, "little"))  # last, as ``has_index`` reads it
    file.flush()


def has_index(file: BinaryIO) -> bool:
    """Return whether ``write_index`` has written to the end, or ``file`` has other content."""
    file.seek(0)
    return any(file.read(8))


def _read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, dict], int]:
    """Return the metadata of a cache, the entries of its arrays, and the position of their data.

    Raises: InputError when ``file`` is another file, truncated, or of another version.
    """
    file.seek(0)
    length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    try:
        entries = json.loads(file.read(length if length <= _MAX_HEADER else 0))
        metadata = entries.pop("__metadata__")
        is_cache = metadata["format"] == _FORMAT
    except (ValueError, LookupError, TypeError, AttributeError):
        is_cache = False
    if not is_cache:
        raise InputError(f"{file.name} is no file of `ldae cache`, or its header is truncated")
    if metadata["version"] != _VERSION:
        raise InputError(
            f"{file.name} is a cache of version {metadata['version']}, and this ldae reads version "
            f"{_VERSION}: write it again by `ldae cache`"
        )
    wanted = 8 + length + max(entry["data_offsets"][1] for entry in entries.values())
    if size != wanted:
        raise InputError(
            f"{file.name} is truncated or damaged: it has {size:,} bytes, not {wanted:,}"
        )
    return metadata, entries, 8 + length


def _checksum(*arrays: np.ndarray) -> int:
    """Return the CRC-32 of the bytes of arrays."""
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return checksum


class CachedSource(Source):
    """Center crops of the images of another source, with its names, classes and fingerprint.

    An image is an array (S, S, C) in the mapped file, whatever its number of channels.
    """

    def __init__(self, spec: str, split: str, file: CacheFile):
        classes = file.splits[split]["classes"]
        labels = None if classes is None else np.array(file.arrays[split]["labels"])
        super().__init__(spec, split, classes, labels)
        self._file = file

    @property
    def _arrays(self) -> dict[str, np.ndarray]:
        return self._file.arrays[self.split]

    def __len__(self) -> int:
        return len(self._arrays["images"])

    def name(self, i: int) -> str:
        first, end = self._arrays["ends"][i : i + 2]
        return self._arrays["names"][first:end].tobytes().decode()

    def image(self, i: int) -> np.ndarray:
        if self._arrays["bad"][i]:
            raise BadImage(f"{self.where(i)} could not be decoded when the cache was written")
        return self._arrays["images"][i].transpose(1, 2, 0)

    def fingerprint(self) -> str:
        return self._file.splits[self.split]["fingerprint"]

    def resizes_twice(self, transform: Callable) -> bool:
        side = self._arrays["images"].shape[1:]
        return not (
            isinstance(transform, CropTransform)
            and transform.crop == "center"
            and (transform.in_chans, transform.img_size, transform.img_size) == side
        )


def cached_splits(spec: str, path: Path) -> Splits:
    """Return functions that open the splits of the cache at ``path``, as ``open_cache`` does."""
    file = open_cache(path)
    return {split: partial(CachedSource, spec, split, file) for split in file.splits}
