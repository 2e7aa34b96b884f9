"""Files of features while they are written: block by block, to go on after a kill."""

import csv
import io
import itertools
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import nn

from ldae import files
from ldae.backbones.whitening import whitening
from ldae.data.source import Source
from ldae.errors import InputError
from ldae.evals.embedded_file import (
    COLUMNS,
    FORMAT,
    file_checksum,
    first_difference,
    import_parquet,
)
from ldae.moments import Moments
from ldae.runs import layout
from ldae.runs.lock import open_partial

_BYTES_AT_ONCE = 2**24  # of rows in memory
_ROWS = "rows"


class Rows:
    """An array (N, ...) of float32 in a file, written in blocks in their order.

    The file is a .npy file. A log beside it has a record of what the rows are, and the CRC-32 of
    each block that is written. A kill loses the block that was being written.

    ``checksums`` are those of the blocks that are whole; the next block comes behind them.

    Raises: InputError when the rows were begun for another record.
    """

    def __init__(
        self, file: BinaryIO, record: dict, blocks: list[range], shape: tuple[int, ...]
    ) -> None:
        self.file, self.blocks, self.shape = file, blocks, shape
        self._log = Path(file.name).with_name(layout.EMBEDDED)
        self._row_size = 4 * math.prod(shape)
        header = npy_header(blocks[-1].stop, shape)
        self._start = len(header)
        self.size = self._start + blocks[-1].stop * self._row_size
        self.checksums = self._whole_blocks(record)
        self._write(header, 0)
        file.truncate(self.size)
        log = "".join(f"{json.dumps(line)}\n" for line in (record, *self.checksums))
        files.write(self._log, log.encode())

    def _whole_blocks(self, record: dict) -> list[int]:
        """Return the checksums of the blocks that an earlier start has written."""
        lines: list = []
        with suppress(FileNotFoundError, ValueError):  # a power cut may have damaged a line
            with open(self._log, encoding="utf-8") as log:
                lines += (json.loads(line) for line in log if line.endswith("\n"))
        if not lines:
            return []
        begun, *checksums = lines
        if found := first_difference(begun, record):
            raise InputError(
                "{} was begun for other features: {} is {} there, {} here; delete it or name "
                "another file".format(self._log.parent, *found)
            )
        pairs = zip(self.blocks, checksums)
        whole = itertools.takewhile(lambda pair: self._checksum(pair[0]) == pair[1], pairs)
        return [checksum for _, checksum in whole]

    def append(self, pieces: Iterable[np.ndarray]) -> None:
        """Write the next block, in pieces (n, ...). Raises: OSError when the disk is full."""
        checksum, offset = 0, self._start + self.blocks[len(self.checksums)].start * self._row_size
        for piece in pieces:
            content = np.ascontiguousarray(piece, "<f4").tobytes()
            self._write(content, offset)
            checksum, offset = zlib.crc32(content, checksum), offset + len(content)
        self.checksums.append(checksum)
        with open(self._log, "a", encoding="utf-8") as log:
            log.write(f"{checksum}\n")

    def pieces(self, rows: range) -> Iterator[np.ndarray]:
        """Yield some rows in pieces (n, ...) that memory holds."""
        step = rows_at_once(self.shape)
        for piece in (rows[n : n + step] for n in range(0, len(rows), step)):
            # Not by another descriptor, whose closing would release the lock of the file.
            self.file.seek(self._start + piece.start * self._row_size)
            content = self.file.read(len(piece) * self._row_size)
            yield np.frombuffer(content, "<f4").reshape(-1, *self.shape)

    def _checksum(self, block: range) -> int:
        checksum = 0
        for piece in self.pieces(block):
            checksum = zlib.crc32(piece, checksum)
        return checksum

    def _write(self, content: bytes, offset: int) -> None:
        self.file.seek(offset)
        self.file.write(content)
        self.file.flush()


def rows_at_once(shape: tuple[int, ...]) -> int:
    """Return the number of rows of a shape that memory holds at a time."""
    return max(_BYTES_AT_ONCE // (4 * math.prod(shape)), 1)


def npy_header(count: int, shape: tuple[int, ...]) -> bytes:
    """Return the first bytes of a .npy file of float32 (count, ...)."""
    header = io.BytesIO()
    array = {"descr": "<f4", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(header, array)
    return header.getvalue()


@contextmanager
def open_rows(
    out: Path, record: dict, blocks: list[range], shape: tuple[int, ...], is_copied: bool = False
) -> Iterator[Rows]:
    """Open or begin the rows that become ``out``, and keep other processes out.

    They lie in a folder beside it, which is removed at the end. ``is_copied`` tells that ``out``
    takes as much room again.

    Raises: InputError when they were begun for another record, or the disk has no room.
    """
    with open_partial(parts_of(out) / _ROWS) as file:
        rows = Rows(file, record, blocks, shape)
        held = 512 * os.fstat(file.fileno()).st_blocks
        files.check_room(out, (1 + is_copied) * rows.size - held)
        yield rows
        shutil.rmtree(parts_of(out))


def parts_of(out: Path) -> Path:
    """Return the folder of the rows that become ``out``."""
    return out.with_name(out.name + files.PARTS)


def whitening_of_rows(rows: Rows, some: range, shrinkage: float) -> nn.Linear:
    """Return the whitening by the covariance of some rows.

    Raises: InputError when they are too few for the shrinkage.
    """
    moments = Moments(rows.shape[0])
    for piece in rows.pieces(some):
        moments.update(torch.from_numpy(piece.copy()).double())
    return whitening(moments, shrinkage)


def write_npy(
    out: Path, rows: Rows, layer: nn.Linear | None, record: dict, sources: Mapping[str, Source]
) -> None:
    """Write the rows to ``out``, whitened by ``layer``, names to a .csv and the record to a .json.

    ``out`` comes last, so all is written when it exists.
    """
    table = out.with_suffix(".csv")
    with files.open_atomic(table) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(COLUMNS)
        lines.writerows(table_of(sources))
        text.flush()
        text.detach()
    record |= {"table": file_checksum(table)}
    if layer is None:
        files.write_json(out.with_suffix(".json"), record | {"checksums": rows.checksums})
        files.publish(rows.file, out)
        return
    with files.open_atomic(out) as file:
        checksums = []
        file.write(npy_header(rows.blocks[-1].stop, rows.shape))
        for block in rows.blocks:
            checksum = 0
            for piece in whitened(rows.pieces(block), layer):
                checksum = zlib.crc32(piece, checksum)
                file.write(piece)
            checksums.append(checksum)
        files.write_json(out.with_suffix(".json"), record | {"checksums": checksums})


def write_parquet(
    out: Path, rows: Rows, layer: nn.Linear | None, record: dict, sources: Mapping[str, Source]
) -> None:
    """Write the rows to ``out``, whitened by ``layer``, beside names; the metadata is the record.

    Each piece of rows is a row group. Pages have checksums.
    """
    parquet = import_parquet(out)
    import pyarrow as arrow

    size = math.prod(rows.shape)
    types = (arrow.string(), arrow.string(), arrow.int64(), arrow.string())
    fields = [*zip(COLUMNS, types), ("features", arrow.list_(arrow.float32(), size))]
    schema = arrow.schema(fields, {FORMAT: json.dumps(record, ensure_ascii=False)})
    options = {"use_dictionary": ["split", "class"], "write_page_checksum": True}
    table = table_of(sources)
    with files.open_atomic(out) as file, parquet.ParquetWriter(file, schema, **options) as writer:
        for piece in whitened(rows.pieces(range(rows.blocks[-1].stop)), layer):
            columns = zip(*itertools.islice(table, len(piece)))
            arrays = [arrow.array(column, kind) for column, kind in zip(columns, types)]
            flat = arrow.array(piece.reshape(-1))
            arrays.append(arrow.FixedSizeListArray.from_arrays(flat, size))
            writer.write_batch(arrow.record_batch(arrays, schema=schema))


def table_of(sources: Mapping[str, Source]) -> Iterator[tuple[str, str, int | None, str | None]]:
    """Yield name, split, label and class of all images; labels count the classes of all splits."""
    classes = itertools.chain.from_iterable(source.classes or () for source in sources.values())
    number = {name: i for i, name in enumerate(dict.fromkeys(classes))}
    for split, source in sources.items():
        for i in range(len(source)):
            if source.classes is None or source.labels is None:
                yield source.name(i), split, None, None
            else:
                name = source.classes[source.labels[i]]
                yield source.name(i), split, number[name], name


@torch.inference_mode()
def whitened(pieces: Iterable[np.ndarray], layer: nn.Linear | None) -> Iterator[np.ndarray]:
    """Yield pieces of rows (n, D) behind ``layer``, or as they are."""
    for piece in pieces:
        yield piece if layer is None else layer(torch.from_numpy(piece.copy())).numpy()
