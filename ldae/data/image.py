"""Decoding of image files to 8-bit pixels; a file that cannot be decoded raises BadImage."""

import errno
import functools
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

from ldae.data import tiff
from ldae.errors import InputError

# Pillow recognises these formats but cannot decode them alone. It would pass EPS to Ghostscript,
# and a file of unknown origin must not start an interpreter.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

# Errors of a drive that is away, and no property of an image.
_DRIVE_ERRORS = {
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> how to turn the image upright
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
ImageFile = BinaryIO | str | bytes | os.PathLike


class BadImage(InputError):
    """An image that cannot be decoded; the message names the image."""

    @property
    def is_of_drive(self) -> bool:
        """Whether the drive failed, and the image may be good."""
        return isinstance(self.__cause__, OSError) and self.__cause__.errno in _DRIVE_ERRORS


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the names of Pillow's formats that are decoded here.

    Formats with a signature come first: checking their first bytes is more reliable and faster
    than trying to decode.
    """
    Image.init()
    formats = [name for name in Image.ID if name not in _NOT_DECODED]
    return tuple(sorted(formats, key=lambda name: Image.OPEN[name][1] is None))


@functools.cache
def image_extensions() -> frozenset[str]:
    """Return the lower-case extensions, with their dot, of the files that :func:`decode` reads."""
    known = Image.registered_extensions().items()
    return frozenset(extension for extension, name in known if name in _formats()) | {".npy"}


def decode(file: ImageFile, name: str) -> Image.Image | np.ndarray:
    """Decode the first frame of ``file`` and turn it upright by its EXIF orientation.

    Returns a loaded Pillow image in mode L, RGB or RGBA. For a ``.npy`` file with a number of
    channels other than 1 and 3, and for a TIFF file with such a number of bands, returns the array,
    uint8 (H, W, C). Transparency is not one of these bands.

    - 16-bit and int32 grey: the range 0..65535 is divided by 257. TIFF bands of fewer than 16 bits
      are divided by the largest number of so many bits, and multiplied by 255.
    - Float grey: values within 0..1 are multiplied by 255, values within 0..255 are rounded.
      Values outside these ranges have no known white, so the image is refused.
    - Bands of TIFF files: as grey, by the range of all bands together.
    - TIFF files whose white is 0 are inverted.
    - ``.npy``: uint8 of shape (H, W) or (H, W, C).

    Raises: BadImage, naming ``name``, when the file cannot be decoded. An image with more pixels
        than ``PIL.Image.MAX_IMAGE_PIXELS`` is refused before memory is allocated for the pixels.
    """
    with _opened(file, name) as opened:
        if _is_npy(opened):
            return _decode_npy(opened)
        if header := tiff.bands_header(opened):
            return _decode_bands(opened, header)
        with Image.open(opened, formats=_formats()) as image:
            return _decode_image(image)


def from_pillow(image: Image.Image) -> Image.Image:
    """Convert an image that Pillow opened or made to the form that :func:`decode` returns.

    Raises: BadImage when it cannot be decoded.
    """
    try:
        return _decode_image(image)
    except Exception as error:  # on damaged files Pillow's decoders raise nearly every type
        raise BadImage(f"{image} cannot be decoded: {_reason(error)}") from error


def decode_label_map(file: ImageFile, name: str) -> np.ndarray:
    """Decode a grey or palette image to the class of every pixel, uint8 (H, W).

    The colours of a palette are ignored.

    Raises: BadImage, naming ``name``, when the file cannot be decoded or has colour channels.
    """
    with _opened(file, name) as opened, Image.open(opened, formats=_formats()) as image:
        image = _upright(image)
        if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            raise ValueError(f"its pixels are colours ({image.mode}), not class numbers")
        labels = np.asarray(image)
        low, high = labels.min(), labels.max()
        if low < 0 or high > 255:
            raise ValueError(f"its labels go from {low} to {high}; only 0 to 255 are allowed")
        return labels.astype(np.uint8)


def image_size(file: ImageFile, name: str) -> tuple[int, int]:
    """Return width and height of the image that :func:`decode` returns.

    Only the header is read, except for ``.npy`` files.

    Raises: BadImage, naming ``name``, when the file cannot be read.
    """
    with _opened(file, name) as opened:
        if _is_npy(opened):
            image = _decode_npy(opened)
            return image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        if header := tiff.bands_header(opened):
            height, width, _ = header.shape
            return (height, width) if header.orientation in _TRANSPOSED else (width, height)
        with Image.open(opened, formats=_formats()) as image:
            size = image.size
            if image.format == "TIFF":  # newer versions of Pillow have exchanged the two
                tags = image.tag_v2
                size = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
            return size[::-1] if _orientation(image) in _TRANSPOSED else size


@contextmanager
def _opened(file: ImageFile, name: str) -> Iterator[BinaryIO]:
    """Open ``file`` if it is a path; turn every error within the context into BadImage."""
    try:
        is_path = isinstance(file, (str, bytes, os.PathLike))
        with (
            open(file, "rb") if is_path else nullcontext(file) as opened,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # about damaged metadata beside good pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield opened
    except Exception as error:  # on damaged files Pillow's decoders raise nearly every type
        raise BadImage(f"{name} cannot be decoded: {_reason(error)}") from error


def _is_npy(file: BinaryIO) -> bool:
    magic = file.read(len(_NPY_MAGIC))
    if not magic:
        raise ValueError("the file is empty")
    file.seek(0)
    return magic == _NPY_MAGIC


def from_array(array: np.ndarray) -> Image.Image | np.ndarray:
    """Convert an array, uint8 (H, W) or (H, W, C), to the form that :func:`decode` returns."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 2 or array.shape[2] == 3:
        return Image.fromarray(np.ascontiguousarray(array))
    return array


def to_planes(image: Image.Image | np.ndarray, in_chans: int) -> list[Image.Image]:
    """Convert a decoded image to Pillow images that can be resized one by one.

    Returns one image of mode L, RGB or RGBA, or ``in_chans`` images of mode L for an array.
    Transparency is dropped, not composited, unless ``in_chans`` is 4. torchvision, timm and the
    users of the exported backbone do the same and must see the pixels that training saw.

    Raises: InputError when the image cannot have ``in_chans`` channels.
    """
    image = from_array(image) if isinstance(image, np.ndarray) else image
    if isinstance(image, np.ndarray):
        if image.shape[2] != in_chans:
            raise InputError(f"an array of {image.shape[2]} channels where in_chans is {in_chans}")
        return [Image.fromarray(np.ascontiguousarray(plane)) for plane in image.transpose(2, 0, 1)]
    if in_chans not in _MODES:
        raise InputError(
            f"a {image.mode} image where in_chans is {in_chans}, which only .npy arrays and bands "
            "of TIFF files can have"
        )
    mode = _MODES[in_chans]
    return [image if image.mode == mode else image.convert(mode)]


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read a .npy header; return shape, Fortran order and dtype, with ``file`` at the data.

    Raises: ValueError for other content and other versions of the format.
    """
    version = np.lib.format.read_magic(file)
    if version not in _NPY_HEADERS:
        raise ValueError(f"a .npy file of version {version[0]}.{version[1]}")
    return _NPY_HEADERS[version](file)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if orientation in _TURNS else 1
    except Exception:  # on damaged tags Pillow raises nearly every type, and the pixels are good
        return 1


def _upright(image: Image.Image) -> Image.Image:
    """Load an image and turn it by its EXIF orientation, as ImageOps.exif_transpose.

    That function writes all other tags again, and fails when one of them is damaged.
    """
    image.load()  # turns a TIFF file itself, and drops its orientation
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _decode_image(image: Image.Image) -> Image.Image:
    upright, tags = _upright(image), getattr(image, "tag_v2", None)
    if not (tags and image.mode.startswith("I")):
        return _eight_bit(upright)
    # Of a TIFF file, Pillow stretches and inverts only pixels of at most 8 bits.
    pixels = Image.fromarray(_levels(np.asarray(upright), tiff.white(tags)))
    return ImageChops.invert(pixels) if tiff.white_is_zero(tags) else pixels


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode in _MODES.values():
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_levels(np.asarray(image)))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _levels(values: np.ndarray, white: int = 65535) -> np.ndarray:
    """Convert integers up to ``white``, or floats, to uint8 by the rules of :func:`decode`."""
    low, high = values.min(), values.max()
    if values.dtype.kind in "iu" and low >= 0 and high <= white:
        scale = 255 / white
    elif values.dtype.kind == "f" and low >= 0 and high <= 255:
        scale = 255 if high <= 1 else 1
    else:
        raise ValueError(
            f"its values go from {low} to {high}; save integers in 0..{white} or floats in 0..1"
        )
    return np.rint(values * scale).astype(np.uint8)


def _decode_npy(file: BinaryIO) -> Image.Image | np.ndarray:
    shape, fortran_order, dtype = read_npy_header(file)
    if dtype != np.uint8 or len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"an array of {dtype} {shape}, not uint8 (H, W) or (H, W, C)")
    _check_size(shape)
    size = math.prod(shape)
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"the array is truncated at {len(data)} of {size} bytes")
    array = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran_order else "C")
    return from_array(array)


def _decode_bands(file: BinaryIO, header: tiff.Header) -> Image.Image | np.ndarray:
    _check_size(header.shape)
    bands = tiff.read_bands(file, header)
    if bands.dtype != np.uint8 or header.white != 255:
        bands = _levels(bands, header.white)
    if header.white_is_zero:
        bands[..., : header.shape[2] - header.has_alpha] ^= 255
    return _eight_bit(Image.fromarray(bands)) if header.has_alpha else from_array(bands)


def _check_size(shape: tuple[int, ...]) -> None:
    """Refuse an array that needs more memory than the largest image of four channels."""
    if Image.MAX_IMAGE_PIXELS and math.prod(shape) > 4 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"an array of {shape} is too large")


def _reason(error: Exception) -> str:
    """Return the reason of ``error`` on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "its content is not an image format that is read here"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
