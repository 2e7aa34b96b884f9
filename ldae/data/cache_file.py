"""The file of a cache: crops of images, or their latents, mapped into memory."""

import json
import math
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ldae.data.source import Source
from ldae.errors import InputError

SUFFIX = ".safetensors"
BLOCK = 64  # images that share a checksum
_FORMATS = {"ldae cache": "images", "ldae latents": "latents"}  # format -> array that it holds
_VERSION = "1"
_MAX_HEADER = 100_000_000  # bytes, the limit of safetensors
_DTYPES = {"I64": np.dtype(np.int64), "U8": np.dtype(np.uint8), "F16": np.dtype(np.float16)}
_UNWRITTEN = -1  # in place of the checksum of a block


class Content(NamedTuple):
    """The content of a cache, by which two caches of the same images are compared."""

    array: str
    """Name of the array: images or latents."""
    dtype: type
    shape: tuple[int, ...]
    """Shape of one crop, or of the latents of one image."""
    facts: dict[str, Any]
    """Names and values that say how the array was made; JSON can hold them."""

    @classmethod
    def crops(cls, side: int, in_chans: int) -> "Content":
        """Return the content of a cache of crops, uint8 (C, S, S)."""
        facts = {"in_chans": in_chans, "side": side}
        return cls("images", np.uint8, (in_chans, side, side), facts)


class CacheFile:
    """A cache: a safetensors file with the arrays of each split, mapped read-only.

    - ``images``: crops, uint8 (N, C, S, S); or in their place ``latents``, float16
      (N, 1 or 2, tokens, dim): the mean and, if there is one, the log-variance of the posterior.
    - ``bad``: uint8 (N,), 1 for an image that could not be decoded; black is in its place.
    - ``labels``: int64 (N,).
    - ``names``: uint8, the names in UTF-8 one after another; ``ends``: int64 (N + 1,), name i is
      ``names[ends[i] : ends[i + 1]]``.
    - ``checksums``: int64, the CRC-32 of ``bad`` and of crops or latents of each ``BLOCK`` images.

    The metadata has spec, classes and fingerprint of each split, and the CRC-32 of its labels and
    names as ``index``; for latents also how they were made. A cache can be pickled.

    Raises: InputError when ``file`` is another file, truncated, or of another version.
    """

    def __init__(self, file: BinaryIO):
        self.path = Path(file.name)
        self.splits: dict[str, dict] = {}
        self.arrays: dict[str, dict[str, np.ndarray]] = {}
        self._places: dict[tuple[str, str], int] = {}  # of the arrays in the file, in bytes
        try:
            self._map(file)
            for split in self.splits:
                self._check_split(split)
        except InputError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{self.path} is damaged: its header does not describe a cache"
            ) from error

    def _map(self, file: BinaryIO) -> None:
        """Map the arrays in the file as its header describes them."""
        metadata, entries, start = _read_header(file)
        data = np.asarray(np.memmap(file, np.uint8, "r"))
        self.splits = json.loads(metadata["splits"])
        self.arrays = {split: {} for split in self.splits}
        for key, entry in entries.items():
            split, _, name = key.partition(".")
            first, end = (start + offset for offset in entry["data_offsets"])
            array = data[first:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            self.arrays[split][name] = array
            self._places[split, name] = first
        name = _FORMATS[metadata["format"]]
        array = next(iter(self.arrays.values()))[name]
        if name == "images":
            self.content = Content.crops(side=array.shape[2], in_chans=array.shape[1])
        else:
            facts = json.loads(metadata["facts"])
            self.content = Content(name, array.dtype.type, array.shape[1:], facts)

    def _check_split(self, split: str) -> None:
        """Raise ValueError or LookupError when parts of a split do not fit together."""
        arrays, facts = self.arrays[split], self.splits[split]
        count = len(arrays["bad"])
        shapes = {
            "bad": (count,),
            "labels": (count,),
            "ends": (count + 1,),
            "checksums": (math.ceil(count / BLOCK),),
            "names": (arrays["names"].size,),
            self.content.array: (count, *self.content.shape),
        }
        if {name: array.shape for name, array in arrays.items()} != shapes:
            raise ValueError(f"the arrays of {split} have other shapes")
        if not all(isinstance(facts[name], str) for name in ("spec", "fingerprint")):
            raise ValueError(f"the facts of {split} are no texts")
        if not isinstance(facts["index"], int):
            raise ValueError(f"the checksum of {split} is no number")
        if not all(isinstance(name, str) for name in [*(facts["classes"] or ())]):
            raise ValueError(f"the classes of {split} are no texts")

    def __reduce__(self) -> tuple:
        return open_cache, (self.path,)

    def whole_blocks(self, split: str) -> Iterator[bool]:
        """Yield for each block whether it is written and has its checksum, on all cores."""
        arrays = self.arrays[split]

        def is_whole(block: int) -> bool:
            rows, checksum = slice(block * BLOCK, (block + 1) * BLOCK), arrays["checksums"][block]
            bad, contents = arrays["bad"][rows], arrays[self.content.array][rows]
            return checksum != _UNWRITTEN and checksum == _checksum(bad, contents)

        with ThreadPoolExecutor() as pool:
            yield from pool.map(is_whole, range(len(arrays["checksums"])))

    def index_is_whole(self, split: str) -> bool:
        """Return whether labels and names of a split have their checksum."""
        arrays = self.arrays[split]
        found = _checksum(*(arrays[name] for name in ("labels", "ends", "names")))
        return found == self.splits[split]["index"]

    def write_block(
        self, file: BinaryIO, split: str, first: int, bad: np.ndarray, contents: np.ndarray
    ) -> None:
        """Write a block that begins at image ``first`` to ``file``, which is open for writing.

        Raises: OSError when it cannot be written. (A full disk would kill a process that writes to
            mapped memory.)
        """
        checksum = np.array([_checksum(bad, contents)])
        rows = {"bad": (first, bad), self.content.array: (first, contents)}
        for name, (row, values) in (rows | {"checksums": (first // BLOCK, checksum)}).items():
            file.seek(self._places[split, name] + row * self.arrays[split][name][0].nbytes)
            file.write(values)
        file.flush()


def open_cache(path: Path) -> CacheFile:
    """Open the cache at ``path``. Raises: InputError when it cannot be opened or is no cache."""
    try:
        with open(path, "rb") as file:
            return CacheFile(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def write_index(file: BinaryIO, sources: dict[str, Source], content: Content) -> None:
    """Write a cache whose blocks are not written yet: names, labels and room for the content.

    ``file`` is empty and open for writing. The room takes no space on the disk before it is filled.
    """
    splits, index, rooms = {}, {}, {}
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
        index[f"{split}.labels"] = labels
        index[f"{split}.ends"] = ends
        index[f"{split}.checksums"] = np.full(math.ceil(len(source) / BLOCK), _UNWRITTEN)
        index[f"{split}.names"] = joined
        rooms[f"{split}.bad"] = np.broadcast_to(np.uint8(0), len(source))
        shape = (len(source), *content.shape)
        rooms[f"{split}.{content.array}"] = np.broadcast_to(content.dtype(0), shape)
    (kind,) = (kind for kind, array in _FORMATS.items() if array == content.array)
    metadata = {"format": kind, "version": _VERSION, "splits": json.dumps(splits)}
    if content.array != "images":  # their shape is all that there is to say
        metadata["facts"] = json.dumps(content.facts)
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header, end = {"__metadata__": metadata}, 0
    arrays = index | rooms
    for name in sorted(arrays, key=lambda name: -arrays[name].itemsize):  # so that all are aligned
        array, places = arrays[name], (end, end := end + arrays[name].nbytes)
        header[name] = {"dtype": codes[array.dtype], "shape": array.shape, "data_offsets": places}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.truncate(8 + len(text) + end)
    file.seek(8)
    file.write(text)
    for name, array in index.items():
        file.seek(8 + len(text) + header[name]["data_offsets"][0])
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

    Raises: InputError when ``file`` is another file, truncated, or of another version; LookupError,
        TypeError or ValueError when the header is damaged.
    """
    file.seek(0)
    length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    try:
        entries = json.loads(file.read(length if length <= _MAX_HEADER else 0))
        metadata = entries.pop("__metadata__")
        is_cache = metadata["format"] in _FORMATS
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
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
