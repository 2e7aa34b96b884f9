"""Files of ``ldae embed``: features of images, with names, labels and a record of their origin."""

import csv
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldae.errors import InputError, first_line, import_extra

FORMAT = "ldae embed"
VERSION = 1
COLUMNS = ("name", "split", "label", "class")
"""The columns of the table of names; the last two are empty without labels."""
IDENTITY = ("backbone", "data", "features", "extraction")
"""The parts of a record that decide the rows."""
_ROWS_AT_ONCE = 4096  # of a file of parquet


class Table(NamedTuple):
    """The columns of the table of names that graders read, a value for each row of features."""

    names: list[str]
    classes: list[str]
    """Names of the classes; without labels they say nothing."""


class EmbeddedFile:
    """A file of features: rows of float32, one for each image, split by split.

    ``record`` says what the rows are: ``backbone``, its weights and preprocessing; ``data``, the
    images and their fingerprints; ``features``, the shape of a row, its taps and whitening; and
    ``extraction``, what decides the last bits.
    """

    def __init__(self, path: Path, record: dict) -> None:
        self.path, self.record = path, record
        self.splits: dict[str, dict] = record["data"]["splits"]
        self.shape = tuple(record["features"]["shape"])
        self.count = sum(split["images"] for split in self.splits.values())

    def rows_of(self, split: str) -> range:
        """Return the numbers of the rows of a split."""
        first = 0
        for name, held in self.splits.items():
            if name == split:
                break
            first += held["images"]
        return range(first, first + self.splits[split]["images"])

    def blocks(self, split: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the rows of a split in blocks: the number of the first image, and float32 (n, D).

        Raises: InputError when a block is damaged.
        """
        raise NotImplementedError

    @cached_property
    def table(self) -> Table:
        """Names and classes of all rows. Raises: InputError when they are damaged."""
        raise NotImplementedError


class NpyFile(EmbeddedFile):
    """An array (N, ...) that ``numpy.load`` opens, with a .csv of names and a .json beside it."""

    def __init__(self, path: Path) -> None:
        beside = path.with_suffix(".json")
        try:
            record = json.loads(beside.read_text(encoding="utf-8"))
        except OSError:
            raise InputError(
                f"{path} is no file of `ldae embed`: there is no {beside.name} beside it"
            ) from None
        except ValueError:
            record = None
        super().__init__(path, check_record(record, path, str(beside)))
        step = self.record["extraction"]["batch_size"] * self.record["extraction"]["ranks"]
        blocks = blocks_of([held["images"] for held in self.splits.values()], step)
        self._checksums = list(zip(blocks, self.record["checksums"], strict=True))
        found = None
        with suppress(ValueError, EOFError, OSError, AttributeError):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            found, self._start = (array.dtype, array.shape), array.offset
        if found != (np.dtype("<f4"), shape := (self.count, *self.shape)):
            raise InputError(
                f"{path} is truncated, damaged or another file: it is no array of float32 of shape "
                f"{shape}, as {beside.name} describes"
            )

    def blocks(self, split: str) -> Iterator[tuple[int, np.ndarray]]:
        wanted, size = self.rows_of(split), math.prod(self.shape)
        for block, checksum in self._checksums:
            if block.start not in wanted:
                continue
            offset = self._start + 4 * size * block.start
            rows = np.fromfile(self.path, "<f4", size * len(block), offset=offset)
            if zlib.crc32(rows) != checksum:
                raise InputError(
                    f"{self.path} is damaged and must be written again: the checksum differs for "
                    f"rows {block[0]} to {block[-1]}"
                )
            yield block.start - wanted.start, rows.reshape(-1, size)

    @cached_property
    def table(self) -> Table:
        path = self.path.with_suffix(".csv")
        try:
            if file_checksum(path) != self.record["table"]:
                raise InputError(f"{path} has changed since it was written beside {self.path}")
            with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
                lines = [(line["name"], line["class"]) for line in csv.DictReader(file)]
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        return Table(*map(list, zip(*lines)))


class ParquetFile(EmbeddedFile):
    """A parquet file with the columns of the table and ``features``; its metadata is the record."""

    def __init__(self, path: Path) -> None:
        parquet = import_parquet(path)
        try:
            self._file = parquet.ParquetFile(path, page_checksum_verification=True)
            text = (self._file.schema_arrow.metadata or {}).get(FORMAT.encode(), b"null")
            record = json.loads(text)
        except (OSError, ValueError) as error:  # the bases of pyarrow's
            raise InputError(
                f"{path} is truncated or damaged: {first_line(error).partition('. ')[0]}"
            ) from None
        super().__init__(path, check_record(record, path, "its metadata"))

    def blocks(self, split: str) -> Iterator[tuple[int, np.ndarray]]:
        wanted, first = self.rows_of(split), 0
        for batch in self._batches(["features"]):
            rows = batch.column(0).flatten().to_numpy().reshape(batch.num_rows, -1)
            last = first + len(rows)
            inside = range(max(first, wanted.start), min(last, wanted.stop))
            if inside:
                yield inside.start - wanted.start, rows[inside.start - first : inside.stop - first]
            first = last

    @cached_property
    def table(self) -> Table:
        table = Table([], [])
        for batch in self._batches(["name", "class"]):
            for column, values in zip(table, batch.columns, strict=True):
                column += values.to_pylist()
        return table

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        try:
            yield from self._file.iter_batches(_ROWS_AT_ONCE, columns=columns)
        except OSError as error:
            raise InputError(
                f"{self.path} is damaged and must be written again: {first_line(error)}"
            ) from None


FILES: dict[str, Callable[[Path], EmbeddedFile]] = {".npy": NpyFile, ".parquet": ParquetFile}


def is_embedded(spec: str | Path) -> bool:
    """Return whether a spec names a file of features, not a backbone or a source of images."""
    path = Path(spec).expanduser()
    return path.suffix in FILES and not path.is_dir()


def is_of_others(path: Path) -> bool:
    """Return whether a parquet file, which can be read, is none of ``ldae embed``."""
    path = path.expanduser()
    if path.suffix != ".parquet" or not path.is_file():
        return False
    parquet = import_parquet(path)
    with suppress(OSError, ValueError):  # the bases of pyarrow's; a damaged file is neither
        return FORMAT.encode() not in (parquet.read_schema(path).metadata or {})
    return False


def open_embedded(path: Path) -> EmbeddedFile:
    """Open a file of ``ldae embed``.

    Raises: InputError when there is none, or it is truncated, damaged or another file.
    """
    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        return FILES[path.suffix](path)
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(
            f"the record of {path} is damaged: write it again by `ldae embed`"
        ) from None


def check_record(record: object, path: Path, where: str) -> dict:
    """Return ``record``. Raises: InputError when it is no record of a file of features."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{path} is no file of `ldae embed`: {where} has no record of features")
    if record.get("version") != VERSION:
        raise InputError(
            f"{path} is of version {record.get('version')}, and this ldae reads version {VERSION}: "
            "write it again by `ldae embed`"
        )
    return record


def check_same(one: EmbeddedFile, other: EmbeddedFile) -> None:
    """Check that two files hold features of the same kind.

    Raises: InputError with the difference.
    """

    def kind(file: EmbeddedFile) -> dict:
        backbone = {key: value for key, value in file.record["backbone"].items() if key != "spec"}
        precision = file.record["extraction"]["precision"]
        return backbone | file.record["features"] | {"precision": precision}

    if found := first_difference(kind(other), kind(one)):
        raise InputError(
            "{} holds other features than {}: {} is {} there, {} here".format(
                other.path, one.path, *found
            )
        )


def first_difference(
    there: dict, here: dict, prefix: str = ""
) -> tuple[str, object, object] | None:
    """Return the dotted name of the first leaf that differs between two trees, and both values.

    A leaf that one of them lacks is no difference: older files have fewer.
    """
    for key in [*here, *(key for key in there if key not in here)]:
        one, other, name = there.get(key), here.get(key), f"{prefix}{key}"
        if isinstance(one, dict) and isinstance(other, dict):
            if found := first_difference(one, other, f"{name}."):
                return found
        elif one != other and (key in there and key in here or isinstance(one or other, dict)):
            return name, one, other
    return None


def blocks_of(images: Sequence[int], step: int) -> list[range]:
    """Cut the rows of splits with so many images into blocks of ``step``, each of one split."""
    blocks, first = [], 0
    for count in images:
        rows = range(first, first + count)
        blocks += [rows[n : n + step] for n in range(0, count, step)]
        first += count
    return blocks


def file_checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    checksum = 0
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def import_parquet(path: Path) -> Any:
    """Import pyarrow.parquet. Raises: InputError, naming ``path``, when it is not installed."""
    return import_extra("pyarrow.parquet", "parquet", f"{path} needs the package pyarrow")
