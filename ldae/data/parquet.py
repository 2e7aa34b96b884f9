"""Parquet files with the bytes of images, in the layout of Hugging Face's data sets."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldae.data.classes import classes_of
from ldae.data.containers import stamp_files
from ldae.data.image import BadImage, decode
from ldae.data.shards import splits_by_name
from ldae.data.source import Source, Splits
from ldae.errors import InputError, first_line, import_extra

SUFFIX = ".parquet"
_MAX_GROUP = 1 << 29  # bytes: a row group is unpacked to read an image of it
_NO_LABEL = -1  # in data sets without labels, such as most test splits


def parquet_splits(spec: str, folder: Path, files: list[str]) -> Splits:
    """Return functions that open the splits of the parquet files in a folder.

    The names of the files say their splits, see ``ldae.data.shards.splits_by_name``.
    """
    return {
        split: partial(ParquetSource, spec, split, folder, names)
        for split, names in splits_by_name(files).items()
    }


class ParquetSource(Source):
    """The images in the rows of parquet files, which are unpacked row group by row group.

    - The images are in the column ``image``, or else in the only one that can hold images: their
      bytes, or a struct with ``bytes``.
    - The labels, if any, are in the column ``label``, or else in the only one of the type
      ClassLabel: numbers or texts. The package datasets writes the names of the classes into the
      metadata. If a label is null or -1, the images are unlabelled.

    Raises: InputError naming the file when it cannot be read, has no column of images, or has row
        groups too large to be unpacked for one image.
    """

    def __init__(self, spec: str, split: str, folder: Path, files: list[str]):
        self._folder, self._files = folder, files
        self._unpacked: tuple[int, Any] | None = None  # a row group, and the bytes of its images
        groups, group_sizes, file_sizes, labels = [], [], [], []
        for number, name in enumerate(files):
            path = folder / name
            with _opened(path) as file:
                columns = _columns(path, file.schema_arrow)
                if number == 0:
                    self._columns = columns
                elif columns != self._columns:
                    first = folder / files[0]
                    raise InputError(f"{path} has other columns or classes than {first}")
                for group in range(file.num_row_groups):
                    groups.append((number, group))
                    group_sizes.append(_size(path, file.metadata.row_group(group), columns.image))
                file_sizes.append(file.metadata.num_rows)
                if columns.label is not None:
                    labels += _labels(path, file, columns.label)
        self._groups = groups
        self._group_starts = np.cumsum([0, *group_sizes])
        self._file_starts = np.cumsum([0, *file_sizes])
        if not len(self):
            raise InputError(f"{spec} contains no images: it has no rows")
        super().__init__(spec, split, *_classes(spec, self._columns.names, labels))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_unpacked": None}

    def __len__(self) -> int:
        return int(self._group_starts[-1])

    def name(self, i: int) -> str:
        file, row = _place(self._file_starts, i)
        name = os.fsencode(self._files[file]).decode("utf-8", "backslashreplace")
        return f"{name}/{row:06d}"

    def image(self, i: int) -> Image.Image | np.ndarray:
        group, row = _place(self._group_starts, i)
        try:
            content = self._contents(group)[row].as_py()
        except (InputError, IndexError) as error:
            raise BadImage(f"{self.where(i)} cannot be read: {error}") from error
        if content is None:
            raise BadImage(f"{self.where(i)} has no bytes")
        return decode(io.BytesIO(content), self.where(i))

    def _contents(self, group: int) -> Any:
        """Return the bytes of the images of a row group, a column of Arrow."""
        unpacked = self._unpacked  # another thread may change it
        if unpacked is None or unpacked[0] != group:
            number, inside = self._groups[group]
            with _opened(self._folder / self._files[number]) as file:
                column = [self._columns.image]
                # Without threads of Arrow, which would not survive the fork of a data worker.
                table = file.read_row_group(inside, column, use_threads=False)
            unpacked = self._unpacked = (group, table.flatten().column(0))
        return unpacked[1]

    def stamp(self) -> bytes:
        return stamp_files(self._folder, [os.fsencode(name) for name in self._files])


def _place(starts: np.ndarray, i: int) -> tuple[int, int]:
    """Return the part in which image ``i`` is, and its number in that part."""
    part = int(np.searchsorted(starts, i, "right")) - 1
    return part, int(i - starts[part])


class _Columns(NamedTuple):
    image: str
    """The column of bytes, such as image or image.bytes."""
    label: str | None
    names: list[str] | None
    """Of the classes, if the metadata has them."""


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a parquet file. Raises: InputError for all errors within the context."""
    parquet = import_extra("pyarrow.parquet", "parquet", f"{path} needs the package pyarrow")
    try:
        # Arrow would encode the path as UTF-8, which not all names of files are.
        with open(path, "rb") as opened, parquet.ParquetFile(opened, pre_buffer=False) as file:
            yield file
    except InputError:
        raise
    except Exception as error:  # on damaged files Arrow raises nearly every type
        raise InputError(f"{path} is not a readable parquet file: {first_line(error)}") from error


def _columns(path: Path, schema: Any) -> _Columns:
    """Find the columns of a schema of Arrow. Raises: InputError when none can hold images."""
    from pyarrow import types

    def bytes_in(field: Any) -> str | None:
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            inner = field.type.field("bytes")
            return f"{field.name}.bytes" if bytes_in(inner) else None
        is_bytes = types.is_binary(field.type) or types.is_large_binary(field.type)
        return field.name if is_bytes else None

    columns = {field.name: bytes_in(field) for field in schema}
    images = [name for name, column in columns.items() if column]
    if "image" not in images and len(images) != 1:
        raise InputError(
            f"{path} has no column image with the bytes of images; its columns are "
            f"{', '.join(columns) or 'none'}"
        )
    features = _features(schema)
    classes = [name for name in columns if features.get(name, {}).get("_type") == "ClassLabel"]
    label = "label" if "label" in columns else classes[0] if len(classes) == 1 else None
    names = features.get(label, {}).get("names")
    return _Columns(columns["image" if "image" in images else images[0]], label, names or None)


def _features(schema: Any) -> dict[str | None, dict]:
    """Return what the package datasets wrote about the columns; nothing for other files."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: part for name, part in features.items() if isinstance(part, dict)}
    except (LookupError, TypeError, ValueError, AttributeError):
        return {}


def _size(path: Path, group: Any, column: str) -> int:
    """Return the number of rows in a row group. Raises: InputError when its images are too many."""
    chunks = (group.column(number) for number in range(group.num_columns))
    size = sum(part.total_uncompressed_size for part in chunks if part.path_in_schema == column)
    if size > _MAX_GROUP:
        raise InputError(
            f"{path} has a row group with {size / 1e9:.1f} GB of images, which would be unpacked "
            "to read one of them: write it again with row_group_size=100"
        )
    return group.num_rows


def _labels(path: Path, file: Any, column: str) -> list[int | str | None]:
    from pyarrow import types

    labels = file.read([column], use_threads=False).column(0)
    if types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    if not (
        types.is_integer(labels.type)
        or types.is_string(labels.type)
        or types.is_large_string(labels.type)
    ):
        raise InputError(
            f"column {column} of {path} is {labels.type}: labels are whole numbers or texts"
        )
    return labels.to_pylist()


def _classes(
    spec: str, names: list[str] | None, labels: list[int | str | None]
) -> tuple[list[str], np.ndarray] | tuple[None, None]:
    if not labels or None in labels or _NO_LABEL in labels:
        return None, None
    if names is None:
        return classes_of([str(label) for label in labels])
    for label in set(labels):
        if not isinstance(label, int) or not 0 <= label < len(names):
            raise InputError(
                f"{spec} has the label {label!r}, which is none of {len(names)} classes"
            )
    return [str(name) for name in names], np.array(labels, np.int64)
