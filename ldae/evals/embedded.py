"""Files of ``ldae embed``: features of images, with names, labels and a record of their origin."""

import csv
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ldae.data.open import source_splits
from ldae.data.source import Source, Splits
from ldae.distributed import rank, world_size
from ldae.errors import InputError, first_line, import_extra
from ldae.evals.features import Features, Precision, allocate_rows, known_labels
from ldae.evals.taps import Tap

FORMAT = "ldae embed"
VERSION = 1
COLUMNS = ("name", "split", "label", "class")
"""The columns of the table of names; the last two are empty without labels."""
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
    path = Path(spec)
    return path.suffix in FILES and not path.is_dir()


def open_embedded(path: Path) -> EmbeddedFile:
    """Open a file of ``ldae embed``.

    Raises: InputError when there is none, or it is truncated, damaged or another file.
    """
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


def import_parquet(path: Path) -> Any:
    """Import pyarrow.parquet. Raises: InputError, naming ``path``, when it is not installed."""
    return import_extra("pyarrow.parquet", "parquet", f"{path} needs the package pyarrow")


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


class EmbeddedSource(Source):
    """The names, labels and fingerprint of the images of a file of features, without images."""

    def __init__(self, spec: str, split: str, file: EmbeddedFile) -> None:
        self.file, self._rows = file, file.rows_of(split)
        classes = file.splits[split]["classes"]
        labels = None
        if classes is not None:
            number = {name: i for i, name in enumerate(classes)}
            names = file.table.classes[self._rows.start : self._rows.stop]
            labels = np.array([number[name] for name in names], np.int64)
        super().__init__(spec, split, classes, labels)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> str:
        return self.file.table.names[self._rows[i]]

    def image(self, i: int) -> np.ndarray:
        raise InputError(f"{self.spec} holds features, not images")

    def fingerprint(self) -> str:
        return self.file.splits[self.split]["fingerprint"]

    def resizes_twice(self, transform: Callable) -> bool:
        return self.file.splits[self.split]["resized_twice"]


def images_or_embedded(spec: str) -> Splits:
    """Return functions that open the splits of a source of images, or of a file of features.

    Raises: InputError as ``source_splits`` and ``open_embedded`` do.
    """
    if not is_embedded(spec):
        return source_splits(spec)
    file = open_embedded(Path(spec))
    return {split: partial(EmbeddedSource, spec, split, file) for split in file.splits}


class EmbeddedBackbone(nn.Module):
    """A file of features in the place of the backbone that they are from.

    Raises: InputError as ``open_embedded`` does, and for token maps, which have no row an image.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.file = open_embedded(Path(path))
        if len(self.file.shape) > 1:
            shape = " x ".join(map(str, self.file.shape))
            raise InputError(
                f"{path} holds token maps of {shape}, not a vector for each image: embed without "
                "--tokens"
            )
        record = self.file.record
        self.random_init: bool = record["backbone"]["random_init"]
        self.precision: Precision = record["extraction"]["precision"]
        self.pretrained_cfg = {"architecture": str(path)}
        self.pretrained_cfg |= record["backbone"]["preprocessing"]
        # The hash of the state is that of all that decides the features.
        text = json.dumps({key: record[key] for key in IDENTITY}, sort_keys=True).encode()
        self.register_buffer("record", torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def describe(self) -> dict:
        """Return what a record says about the backbone, and about this file."""
        record = self.file.record
        origin = {"file": str(self.file.path), **{key: record[key] for key in IDENTITY[1:]}}
        return record["backbone"] | {"embedded": origin}

    def share(self, source: Source, taps: tuple[Tap, ...] = (Tap(),)) -> Features:
        """Return this rank's share of the features of ``source``: rows rank, rank + world size, ...

        The model's own output stands for all columns of the file.

        Raises: InputError when the file has no such taps or images, or is damaged.
        """
        columns = {tap: self._columns(tap) for tap in taps}
        file, split = self.place(source)
        count = len(range(rank(), len(source), world_size()))
        features = allocate_rows(count, self.file.shape[0])
        for first, rows in file.blocks(split):
            skipped = (rank() - first) % world_size()
            mine = torch.tensor(rows[skipped :: world_size()])
            into = (first + skipped) // world_size()
            features[into : into + len(mine)] = mine
        return Features(features, known_labels(source)[rank() :: world_size()], columns)

    def place(self, source: Source) -> tuple[EmbeddedFile, str]:
        """Return the file and the split in which the features of a source are.

        Raises: InputError when these are not of the same images, or of another backbone.
        """
        if isinstance(source, EmbeddedSource):
            check_same(self.file, source.file)
            return source.file, source.split
        fingerprint = source.fingerprint()
        for split, held in self.file.splits.items():
            if held["fingerprint"] == fingerprint:
                return self.file, split
        raise InputError(
            f"{self.file.path} holds features of other images than {source.spec} ({source.split}) "
            f"has now: it was embedded from {self.file.record['data']['spec']}"
        )

    def _columns(self, tap: Tap) -> slice:
        if tap == Tap():
            return slice(None)
        held = self.file.record["features"]
        depth = held["depth"]
        wanted = Tap(tap.block % depth if tap.block is not None and depth else tap.block, tap.pool)
        known = {Tap(part["block"], part["pool"]): part["columns"] for part in held["taps"]}
        if wanted not in known:
            raise InputError(
                f"{self.file.path} has no features of {tap}: it holds {'; '.join(map(str, known))}"
            )
        return slice(*known[wanted])


IDENTITY = ("backbone", "data", "features", "extraction")
"""The parts of a record that decide the rows."""


def check_rows(model: nn.Module, *sources: Source | None) -> None:
    """Check that the features of all sources are at hand if they are not to be extracted.

    Raises: InputError when a file of features has other images, is of another backbone, or is given
        as a source of images to a backbone that needs them.
    """
    for source in sources:
        if source and isinstance(model, EmbeddedBackbone):
            model.place(source)
        elif isinstance(source, EmbeddedSource):
            raise InputError(
                f"{source.spec} holds features, not images: name it in the place of the backbone"
            )


def check_same(one: EmbeddedFile, other: EmbeddedFile) -> None:
    """Check that two files hold features of the same kind.

    Raises: InputError with the difference.
    """

    def kind(file: EmbeddedFile) -> dict:
        backbone = {key: value for key, value in file.record["backbone"].items() if key != "spec"}
        precision = file.record["extraction"]["precision"]
        return backbone | file.record["features"] | {"precision": precision}

    if found := difference(kind(other), kind(one)):
        raise InputError(
            "{} holds other features than {}: {} is {} there, {} here".format(
                other.path, one.path, *found
            )
        )


def difference(there: dict, here: dict, prefix: str = "") -> tuple[str, object, object] | None:
    """Return the dotted name of the first leaf that differs between two trees, and both values."""
    for key in [*here, *(key for key in there if key not in here)]:
        one, other, name = there.get(key), here.get(key), f"{prefix}{key}"
        if isinstance(one, dict) and isinstance(other, dict):
            if found := difference(one, other, f"{name}."):
                return found
        elif one != other:
            return name, one, other
    return None
