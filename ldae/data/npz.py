"""Images in one .npz file, as guided-diffusion (ADM), DiT and EDM write their samples."""

import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from ldae.data.image import BadImage, from_array, read_npy_header
from ldae.data.source import Source
from ldae.errors import InputError


class NpzSource(Source):
    """The images ``arr_0``, uint8 (N, H, W, C), and their labels ``arr_1``, (N,), if present.

    A file from ``numpy.savez`` is read in place; a compressed file is unpacked into memory.

    Raises: InputError when the file has no such arrays.
    """

    def __init__(self, spec: str, path: Path):
        self._path = path
        self._images = None
        try:
            with np.load(path, allow_pickle=False) as file:
                if "arr_0" not in file:
                    raise InputError(f"{spec} contains no images: it has no array arr_0")
                # NumPy gives a damaged array as bytes.
                labels = np.asarray(file["arr_1"]) if "arr_1" in file else None
                members = file.zip.infolist()
            images = self._open()
        except InputError:
            raise
        except Exception as error:  # on damaged files NumPy and zipfile raise nearly every type
            raise InputError(f"{spec} is not a readable .npz file") from error
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            raise InputError(
                f"arr_0 of {spec} is {images.dtype} {images.shape}, not uint8 (N, H, W, C)"
            )
        self._checksums = [(m.filename, m.file_size, m.CRC) for m in members]
        classes = None
        if labels is not None:
            if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
                raise InputError(f"arr_1 of {spec} is not one label for each of its images")
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
        except Exception as error:  # as in the constructor
            raise BadImage(f"{self.where(i)} cannot be read: {error}") from error

    def stamp(self) -> bytes:
        return repr(self._checksums).encode()

    def _open(self) -> np.ndarray:
        if self._images is None:
            self._images = _open_array(self._path)
        return self._images


def _open_array(path: Path) -> np.ndarray:
    """Return the array arr_0, mapped from the file unless it is compressed or contains objects."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("arr_0.npy")
        with archive.open(member) as content:
            shape, fortran_order, dtype = read_npy_header(content)
            header_size = content.tell()
    if member.compress_type != zipfile.ZIP_STORED or dtype.hasobject:
        with np.load(path, allow_pickle=False) as file:
            return np.asarray(file["arr_0"])
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        name_size, extra_size = struct.unpack("<26x2H", file.read(30))  # a ZIP member's header
    start = member.header_offset + 30 + name_size + extra_size + header_size
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran_order else "C")
