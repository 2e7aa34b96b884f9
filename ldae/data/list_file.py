"""Images that a list file names: a line for each, its path and its label."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ldae.data.classes import classes_of
from ldae.data.containers import Folder
from ldae.data.image_files import FileSource
from ldae.data.listing import is_image, listing_of
from ldae.errors import InputError, first_line, quoted

SUFFIXES = (".txt", ".csv", ".tsv")
_PATH_COLUMNS = ("path", "file_name", "filename", "file", "image")
_LABEL_COLUMNS = ("label", "class")


class _Line(NamedTuple):
    number: int
    path: str
    label: str


class ListedFiles(FileSource):
    """The images of a list file, in its order; a path is relative to the folder of the file.

    - ``.txt``: a path, or a path, white space and a label, as Caffe and mmpretrain have it. A last
      word that ends like an image file is no label but a part of the path.
    - ``.csv`` and ``.tsv``: a path, and perhaps a label. With a first line of names, the columns
      are path (or file_name, filename, file, image) and label (or class).

    Raises: InputError when the file cannot be read, a line has another form, an image is named
        twice, only some images have a label, or the first image does not exist. Of the others this
        is known when they are read.
    """

    def __init__(self, spec: str, path: Path):
        lines: dict[str, _Line] = {}
        for line in _lines(spec, path):
            if not is_image(line.path):
                shown = quoted(line.path)
                raise InputError(f"line {line.number} of {spec} names no image: {shown}")
            if before := lines.get(line.path):
                raise InputError(
                    f"lines {before.number} and {line.number} of {spec} both name "
                    f"{quoted(line.path)}"
                )
            lines[line.path] = line
        if not lines:
            raise InputError(f"{spec} contains no images")
        labels = [line.label for line in lines.values()]
        if any(labels) and not all(labels):
            number = next(line.number for line in lines.values() if not line.label)
            raise InputError(f"line {number} of {spec} has no label, and others have")
        first = next(iter(lines.values()))
        if not os.path.exists(path.parent / first.path):
            raise InputError(
                f"line {first.number} of {spec} names {quoted(first.path)}, which does not exist "
                f"in {path.parent}"
            )
        classes = classes_of(labels) if any(labels) else (None, None)
        listing = listing_of(dict.fromkeys(lines, ()))
        super().__init__(spec, "all", Folder(path.parent), listing, *classes)
        self.unlabelled = "labels are the second column of a list, or that named label or class"

    def where(self, i: int) -> str:
        return str(self._storage.path / self.name(i))


def _lines(spec: str, path: Path) -> Iterator[_Line]:
    try:
        text = path.read_text("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise InputError(f"{spec} cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise InputError(f"{spec} is no text in UTF-8")
    if path.suffix.lower() == ".txt":
        return _words(text)
    return _table(spec, text, "," if path.suffix.lower() == ".csv" else "\t")


def _words(text: str) -> Iterator[_Line]:
    for number, line in enumerate(text.split("\n"), 1):
        path, *label = line.strip().rsplit(None, 1) or [""]
        if label and is_image(label[0]):
            path, label = line.strip(), []
        if path:
            yield _Line(number, path, *label or [""])


def _table(spec: str, text: str, delimiter: str) -> Iterator[_Line]:
    rows = csv.reader(text.split("\n"), delimiter=delimiter, strict=True)
    columns: list[str] = []
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not columns:
                columns = [cell.casefold() for cell in cells]
                is_header = not any(map(is_image, cells))
                at = _columns(spec, columns, is_header)
                if is_header:
                    continue
            if len(cells) != len(columns):
                raise InputError(
                    f"line {rows.line_num} of {spec} has another number of columns than line 1"
                )
            path, label = (cells[column] if column is not None else "" for column in at)
            yield _Line(rows.line_num, path, label)
    except csv.Error as error:
        raise InputError(
            f"line {rows.line_num} of {spec} cannot be read: {first_line(error)}"
        ) from error


def _columns(spec: str, names: list[str], is_header: bool) -> tuple[int, int | None]:
    """Return the columns of the path and of the label, if there is one."""
    if not is_header:
        if len(names) > 2:
            raise InputError(
                f"{spec} has {len(names)} columns: name them in its first line, as path and label"
            )
        return 0, 1 if len(names) == 2 else None
    path, label = (
        next((names.index(name) for name in known if name in names), None)
        for known in (_PATH_COLUMNS, _LABEL_COLUMNS)
    )
    if path is None:
        shown = quoted(", ".join(names))
        raise InputError(f"{spec} has no column path; the columns of its first line are {shown}")
    return path, label
