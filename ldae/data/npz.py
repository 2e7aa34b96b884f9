"""Images in one .npz file, as guided-diffusion (ADM), DiT and EDM write their samples."""

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from ldae.data.image import BadImage, from_array
from ldae.data.source import Source
from ldae.errors import InputError

# What NumPy raises for files that are something else, or damaged.
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile)
_HEADER = 30  # bytes of a ZIP member's local header, before its name and its extra field


class NpzSource(Source):
    """The images ``arr_0``, uint8 (N, H, W, C), and, where there are, the labels ``arr_1``, (N,).

    What ``numpy.savez`` writes is read in place; a compressed file is unpacked into memory.

    Raises: InputError when the file holds no such array.
    """

    def __init__(self, spec: str, path: Path):
        self._path = path
        self._images = None
        try:
            with np.load(path, allow_pickle=False) as file:
                if "arr_0" not in file:
                    raise InputError(f"{spec} holds no images: it has no array arr_0")
                labels = file["arr_1"] if "arr_1" in file else None
            images = self._open()
        except InputError:
            raise
        except _UNREADABLE as error:
            raise InputError(f"{spec} is no readable .npz file") from error
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            raise InputError(
                f"arr_0 of {spec} is {images.dtype} {images.shape}, not uint8 (N, H, W, C)"
            )
        if labels is not None and (
            labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"
        ):
            raise InputError(f"arr_1 of {spec} is not one label for each of its images")
        classes = None
        if labels is not None:
            values, labels = np.unique(labels, return_inverse=True)
            classes, labels = [str(value) for value in values], labels.astype(np.int64)
        super().__init__(spec, "all", classes, labels)

    def __len__(self) -> int:
        return len(self._open())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_images": None}

    def image(self, i: int) -> Image.Image | np.ndarray:
        try:
            return from_array(np.array(self._open()[i]))
        except (OSError, ValueError) as error:
            raise BadImage(f"{self.where(i)} can not be read: {error}") from error

    def _open(self) -> np.ndarray:
        if self._images is None:
            self._images = _in_place(self._path)
        return self._images


def _in_place(path: Path) -> np.ndarray:
    """The array arr_0 as a map of the file where it is stored as it is."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("arr_0.npy")
        with archive.open(member) as content:
            shape, fortran_order, dtype = _read_header(content)
            skipped = content.tell()
    if member.compress_type != zipfile.ZIP_STORED or dtype.hasobject:
        with np.load(path, allow_pickle=False) as file:
            return file["arr_0"]
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(_HEADER)
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = member.header_offset + _HEADER + names + skipped
    order = "F" if fortran_order else "C"
    return np.memmap(path, dtype, "r", start, shape, order)


def _read_header(content: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(content)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(content)
    return np.lib.format.read_array_header_2_0(content)
