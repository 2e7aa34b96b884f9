"""Bands of TIFF files that Pillow would drop, round or refuse, read by tifffile."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags
from PIL import TiffImagePlugin as tiff

from ldae.errors import import_extra

_BIG = b"II+\0"  # Pillow does not read the tags of a big-endian BigTIFF
_MAGIC = (b"II*\0", b"MM\0*", _BIG)
_COLOURS = {0: 1, 1: 1, 2: 3}  # PhotometricInterpretation, grey and RGB -> number of colours
_UNKNOWN = 0  # in ExtraSamples, a band such as near infrared; other numbers are transparency
_UNSIGNED, _SIGNED = 1, 2  # in SampleFormat


class Header(NamedTuple):
    """What the first page of a TIFF file says about its bands."""

    shape: tuple[int, int, int]
    """Height, width and number of bands, as stored."""
    orientation: int
    """1 to 8, as in EXIF; from 5 on, height and width are exchanged."""
    white: int
    """The largest integer of this depth, and 65535 of 16 bits and more."""
    white_is_zero: bool
    """Whether the bands are stored inverted."""
    has_alpha: bool
    """Whether the last band is transparency."""


def bands_header(file: BinaryIO) -> Header | None:
    """Return the header of a TIFF file with bands that Pillow would not read as they are.

    Pillow drops bands that are neither colours nor transparency, and rounds colours of 16 bits
    down. It reads all other files, and reports their damage: None is returned for them.
    """
    try:
        return _header(_tags(file))
    except Exception:  # on damaged tags Pillow raises nearly every type
        return None
    finally:
        file.seek(0)


def _tags(file: BinaryIO) -> tiff.ImageFileDirectory_v2:
    """Return the tags of the first page. Raises: an exception of any type for another file."""
    start = file.read(8)
    if start[:4] not in _MAGIC:
        raise ValueError("not a TIFF file")
    if start[:4] == _BIG:
        start += file.read(8)
    tags = tiff.ImageFileDirectory_v2(start)
    file.seek(tags.next)
    tags.load(file)
    return tags


def _header(tags: tiff.ImageFileDirectory_v2) -> Header | None:
    count, bits = tags.get(tiff.SAMPLESPERPIXEL, 1), max(tags[tiff.BITSPERSAMPLE])
    extra = count - _COLOURS[tags[tiff.PHOTOMETRIC_INTERPRETATION]]
    # Pillow takes the fourth of four bands for transparency if the file says nothing about it.
    kind = tags.get(tiff.EXTRASAMPLES, () if count == 4 else (_UNKNOWN,))
    has_alpha = extra == 1 and kind != (_UNKNOWN,)
    if count == 1 or (bits <= 8 and (extra == 0 or has_alpha)):
        return None
    orientation = tags.get(ExifTags.Base.Orientation, 1)
    return Header(
        (tags[tiff.IMAGELENGTH], tags[tiff.IMAGEWIDTH], count),
        orientation if 1 <= orientation <= 8 else 1,
        white(tags),
        white_is_zero(tags),
        has_alpha,
    )


def white(tags: Mapping[int, Any]) -> int:
    """Return the largest integer of the depth of a page, and 65535 of 16 bits and more."""
    bits = max(tags[tiff.BITSPERSAMPLE])
    is_signed = tags.get(tiff.SAMPLEFORMAT, (_UNSIGNED,))[0] == _SIGNED
    return 2 ** (bits - is_signed) - 1 if bits < 16 else 65535


def white_is_zero(tags: Mapping[int, Any]) -> bool:
    """Return whether the tags of a page say that its white is stored as 0."""
    return tags.get(tiff.PHOTOMETRIC_INTERPRETATION) == 0


def read_bands(file: BinaryIO, header: Header) -> np.ndarray:
    """Return the bands of the first page, upright, (H, W, C) in the type of the file.

    Raises: an exception of any type when the file is damaged, or tifffile or a codec is missing.
    """
    tifffile = import_extra("tifffile", "tiff", "its bands need the package tifffile")
    with _silenced(), tifffile.TiffFile(file, name="image") as pages:
        page = pages.pages[0]
        # (separate bands, depth, H, W, bands of a pixel): one of the first and the last is 1.
        bands = page.asarray(maxworkers=1).reshape(page.shaped)[:, 0]
    bands = np.moveaxis(bands, 0, 2).reshape(header.shape)
    turns = header.orientation - 1
    if turns >= 4:
        bands = bands.swapaxes(0, 1)
    if turns % 4 >= 2:
        bands = bands[::-1]
    return bands[:, ::-1] if turns % 4 in (1, 2) else bands


@contextmanager
def _silenced() -> Iterator[None]:
    """Leave out what tifffile logs of damage, in several lines: the image gets one sentence."""
    logger = logging.getLogger("tifffile")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
