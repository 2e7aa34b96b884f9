import errno
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from ldae.data.image import BadImage, decode, image_extensions, image_size, to_planes
from ldae.errors import InputError

GREY16 = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def to_array(image, in_chans: int) -> np.ndarray:
    return np.dstack(to_planes(image, in_chans))


def encoded(image, format: str, **options) -> bytes:
    file = io.BytesIO()
    if format == "npy":
        np.save(file, image)
    else:
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image.save(file, format, **options)
    return file.getvalue()


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        length, checksum = len(data), zlib.crc32(kind + data)
        return struct.pack(">I", length) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def npy_header(shape: str, dtype: str = "|u1") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "TGA", "npy"])
def test_lossless_formats_return_the_pixels(format, tmp_path):
    (tmp_path / "file").write_bytes(encoded(RGB, format))
    for file in (tmp_path / "file", str(tmp_path / "file"), io.BytesIO(encoded(RGB, format))):
        assert np.array_equal(to_array(decode(file, "x"), 3), RGB)


def test_other_numbers_of_channels_come_from_arrays_only():
    array = np.random.default_rng(0).integers(0, 256, (4, 5, 6), np.uint8)
    for stored in (array, np.asfortranarray(array)):
        image = decode(io.BytesIO(encoded(stored, "npy")), "x")
        assert np.array_equal(to_array(image, 6), array)
    with pytest.raises(InputError, match="6 channels where in_chans is 3"):
        to_array(image, 3)
    with pytest.raises(InputError, match="a RGB image where in_chans is 6"):
        to_array(decode(io.BytesIO(encoded(RGB, "PNG")), "x"), 6)


def test_the_fourth_channel_of_an_array_is_not_transparency():
    array = np.random.default_rng(0).integers(0, 256, (4, 5, 4), np.uint8)
    image = decode(io.BytesIO(encoded(array, "npy")), "x")
    assert np.array_equal(to_array(image, 4), array)
    with pytest.raises(InputError, match="4 channels where in_chans is 3"):
        to_array(image, 3)


def test_grey_arrays_are_grey_images():
    for array in (RGB[:, :, 0], RGB[:, :, :1]):
        image = decode(io.BytesIO(encoded(array, "npy")), "x")
        assert np.array_equal(to_array(image, 3), RGB[:, :, [0, 0, 0]])
        assert np.array_equal(to_array(image, 1), RGB[:, :, :1])


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PGM"])
def test_16_bits_span_the_8_bit_range(format):
    if format == "PGM":  # which older Pillow versions read but do not write
        content = b"P5 8 8 65535\n" + GREY16.astype(">u2").tobytes()
    else:
        content = encoded(GREY16, format)
    pixels = to_array(decode(io.BytesIO(content), "x"), 1)[:, :, 0]
    assert np.abs(pixels - GREY16 / 257).max() <= 0.5
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize(
    "values, expected",
    [
        (GREY16.astype(np.int32), GREY16 / 257),
        (GREY16.astype(np.float32) / 65535, GREY16 / 257),
        (GREY16.astype(np.float32) / 257, GREY16 / 257),
    ],
)
def test_wide_grey_values_become_8_bit(values, expected):
    pixels = to_array(decode(io.BytesIO(encoded(values, "TIFF")), "x"), 1)[:, :, 0]
    assert np.abs(pixels - expected).max() <= 0.501


@pytest.mark.parametrize(
    "values",
    [
        np.full((2, 2), 70_000, np.int32),
        np.full((2, 2), -1.0, np.float32),
        np.full((2, 2), 300.0, np.float32),
        np.full((2, 2), np.nan, np.float32),
    ],
)
def test_grey_values_without_a_known_white_are_refused(values):
    with pytest.raises(BadImage, match="^x cannot be decoded: its values go from"):
        decode(io.BytesIO(encoded(values, "TIFF")), "x")


def test_every_mode_is_converted_to_1_3_and_4_channels():
    base = Image.fromarray(RGB)
    transparent = base.quantize(16)
    transparent.info["transparency"] = 0
    files = [encoded(base.convert(mode), "PNG") for mode in ("1", "L", "LA", "RGB", "RGBA", "P")]
    files += [encoded(base.convert(mode), "TIFF") for mode in ("CMYK", "LAB")]
    # Pillow before 13 reports an uncompressed YCbCr file, which it can write, as truncated.
    files += [encoded(base.convert("YCbCr"), "TIFF", compression="tiff_lzw")]
    files += [encoded(transparent, "PNG"), encoded(base.convert("CMYK"), "JPEG", quality=95)]
    for file in files:
        image = decode(io.BytesIO(file), "x")
        for in_chans in (1, 3, 4):
            assert to_array(image, in_chans).shape == (6, 9, in_chans)
    assert np.abs(to_array(decode(io.BytesIO(files[6]), "x"), 3).astype(int) - RGB).max() <= 1


def test_transparency_is_dropped_as_torchvision_and_timm_do():
    rgba = np.dstack([RGB, np.zeros((6, 9), np.uint8)])
    image = decode(io.BytesIO(encoded(rgba, "PNG")), "x")
    assert np.array_equal(to_array(image, 3), RGB)
    assert np.array_equal(to_array(image, 4), rgba)


def test_exif_orientation_is_applied(orientation):
    number, upright = orientation
    exif = Image.Exif()
    exif[0x0112] = number
    image = decode(io.BytesIO(encoded(RGB, "PNG", exif=exif)), "x")
    assert np.array_equal(to_array(image, 3), upright(RGB))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_an_image_is_turned_as_pillow_turns_it(mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation[0]
    image = Image.fromarray(GREY16) if mode == "I;16" else Image.fromarray(RGB).convert(mode)
    file = io.BytesIO(encoded(image, "PNG", exif=exif))
    ImageOps.exif_transpose(image := Image.open(file), in_place=True)
    image.info.pop("exif", None)
    upright = io.BytesIO(encoded(image, "PNG"))
    assert np.array_equal(to_array(decode(file, "x"), 4), to_array(decode(upright, "x"), 4))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_the_size_is_that_of_the_upright_image(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation[0]
    content = encoded(RGB, format, exif=exif)
    assert image_size(io.BytesIO(content), "x") == decode(io.BytesIO(content), "x").size


@pytest.mark.parametrize(
    "good, bad, size",
    [
        (b"\x01\x31\x00\x02", b"\x01\x00\x00\x02", (6, 9)),  # a text is the width; still turned
        (b"MM\x00*", b"MM\xff*", (9, 6)),
    ],
)
def test_damaged_exif_beside_good_pixels_is_no_bad_image(good, bad, size):
    exif = Image.Exif()
    exif[0x0112], exif[0x0131] = 6, "the name of a program"
    content = encoded(RGB, "JPEG", exif=exif)
    assert content.count(good) == 1
    damaged = content.replace(good, bad)
    assert decode(io.BytesIO(damaged), "x").size == size
    assert image_size(io.BytesIO(damaged), "x") == size


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_loaded(format, tmp_path):
    frames = [Image.new("RGB", (5, 4), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a", format, save_all=True, append_images=frames[1:])
    pixels = to_array(decode(tmp_path / "a", "x"), 3)
    assert pixels.shape == (4, 5, 3)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"this is a text, not a picture",
        encoded(RGB, "PNG")[:-40],
        encoded(np.tile(RGB, (20, 20, 1)), "JPEG")[:900],
        encoded(RGB, "BMP")[:-30],
        encoded(RGB, "WEBP")[:-10],
        encoded(RGB, "GIF")[:12],
        npy_header("(4, 4, 3)") + b"0" * 10,
        npy_header("(2, 2)", "<f4") + b"0" * 16,
        npy_header("(2, 2)", "|O") + b"0" * 32,
        npy_header("(0, 2, 3)"),
        npy_header("(4,)") + b"0000",
        b"\x93NUMPY\x01",
        b"\x93NUMPY\x09\x00\x00\x00",
    ],
)
def test_bad_bytes_are_reported_in_one_sentence_with_the_image(content):
    with pytest.raises(BadImage) as caught:
        decode(io.BytesIO(content), "cats/tom.jpg")
    message = str(caught.value)
    assert message.startswith("cats/tom.jpg cannot be decoded: ")
    assert "\n" not in message and "<" not in message


@pytest.mark.parametrize(
    "content", [huge_png(10_000, 10_000), huge_png(50_000, 50_000), npy_header("(20000, 20000, 3)")]
)
def test_too_many_pixels_are_refused_before_decoding(content):
    with pytest.raises(BadImage, match="^x cannot be decoded: .*(exceeds limit|too large)"):
        decode(io.BytesIO(content), "x")


def test_an_eps_file_is_not_passed_to_ghostscript():
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    with pytest.raises(BadImage, match="its content is not an image format that is read here"):
        decode(io.BytesIO(content), "a.jpg")


def test_a_missing_file_is_a_bad_image(tmp_path):
    with pytest.raises(BadImage, match="^a.png cannot be decoded: No such file or directory$"):
        decode(tmp_path / "a.png", "a.png")


class Away(io.BytesIO):
    """A file on a drive that gives its first bytes and no more."""

    def read(self, size=-1):
        if self.tell() > 100:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(min(size, 64) if size > 0 else 64)


def test_a_failing_drive_is_told_from_a_damaged_file(tmp_path):
    content = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(content, "PNG")
    with pytest.raises(BadImage, match="x cannot be decoded: Input/output error") as caught:
        decode(Away(content.getvalue()), "x")
    assert caught.value.is_of_drive
    for file in (tmp_path / "missing.png", io.BytesIO(content.getvalue()[:200])):
        with pytest.raises(BadImage) as caught:
            decode(file, "x")
        assert not caught.value.is_of_drive


def test_damaged_bytes_raise_only_bad_image():
    rng = np.random.default_rng(0)
    outcomes = set()
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "npy"):
        valid = np.frombuffer(encoded(RGB, format), np.uint8)
        for _ in range(60):
            damaged = valid.copy()
            damaged[rng.integers(len(valid), size=3)] = rng.integers(256, size=3)
            try:
                outcomes.add(type(decode(io.BytesIO(damaged.tobytes()), "x")))
            except BadImage:
                outcomes.add(BadImage)
    assert BadImage in outcomes and Image.Image in {c for o in outcomes for c in o.__mro__}


def test_extensions_are_those_of_decodable_formats():
    extensions = image_extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".gif", ".bmp", ".npy"} <= extensions
    assert extensions.isdisjoint({".txt", ".pdf", ".h5", ".mpg", ".eps", ".json"})
