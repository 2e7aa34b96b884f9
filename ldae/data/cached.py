"""Crops of images, or their latents, in one mapped file: its format, and sources that read it."""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from ldae.data.image import BadImage
from ldae.data.source import Source, Splits
from ldae.data.transforms import CropTransform
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
        name = _FORMATS[metadata["format"]]
        array = next(iter(self.arrays.values()))[name]
        if name == "images":
            self.content = Content.crops(side=array.shape[2], in_chans=array.shape[1])
        else:
            facts = json.loads(metadata["facts"])
            self.content = Content(name, array.dtype.type, array.shape[1:], facts)

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

    Raises: InputError when ``file`` is another file, truncated, or of another version.
    """
    file.seek(0)
    length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    try:
        entries = json.loads(file.read(length if length <= _MAX_HEADER else 0))
        metadata = entries.pop("__metadata__")
        is_cache = metadata["format"] in _FORMATS
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
        return len(self._arrays["bad"])

    def name(self, i: int) -> str:
        first, end = self._arrays["ends"][i : i + 2]
        return self._arrays["names"][first:end].tobytes().decode()

    def image(self, i: int) -> np.ndarray:
        return self._content(i).transpose(1, 2, 0)

    def _content(self, i: int) -> np.ndarray:
        if self._arrays["bad"][i]:
            raise BadImage(f"{self.where(i)} could not be decoded when the cache was written")
        return self._arrays[self._file.content.array][i]

    def fingerprint(self) -> str:
        return self._file.splits[self.split]["fingerprint"]

    def resizes_twice(self, transform: Callable) -> bool:
        side = self._arrays["images"].shape[1:]
        return not (
            isinstance(transform, CropTransform)
            and transform.crop == "center"
            and (transform.in_chans, transform.img_size, transform.img_size) == side
        )


class CachedLatents(CachedSource):
    """Latents of the images of another source, with its names, classes and fingerprint.

    An image is an array, float16 (1 or 2, N, dim), the mean and the log-variance of its posterior.

    Raises: InputError when the file holds crops.
    """

    def __init__(self, spec: str, split: str, file: CacheFile):
        if file.content.array != "latents":
            raise InputError(
                f"{file.path} holds images, not latents, which `ldae cache --latents` writes"
            )
        super().__init__(spec, split, file)

    @property
    def facts(self) -> dict[str, Any]:
        """How the latents were made, see ``Content``."""
        return self._file.content.facts

    @property
    def latents_of(self) -> str:
        return self.facts["tokenizer"]

    def image(self, i: int) -> np.ndarray:
        return self._content(i)

    def resizes_twice(self, transform: Callable) -> bool:
        return self.facts["resized_twice"]


def copy_latents(latents: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Return latents in memory of their own; the transform of ``CachedLatents``."""
    return torch.from_numpy(np.array(latents))


def cached_splits(spec: str, path: Path) -> Splits:
    """Return functions that open the splits of the cache of crops at ``path``.

    Raises: InputError as ``open_cache`` does, and when it is a cache of latents.
    """
    file = open_cache(path)
    if file.content.array != "images":
        raise InputError(
            f"{path} holds latents, not images: name it by data.latents, beside the images"
        )
    return {split: partial(CachedSource, spec, split, file) for split in file.splits}
