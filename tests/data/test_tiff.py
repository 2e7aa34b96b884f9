"""TIFF files of any number of bands are read as they are: none dropped, none rounded twice."""

import io
import logging
import pickle
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from ldae.data.image import BadImage, decode, image_size, to_planes
from ldae.data.loader import train_batches
from ldae.data.open import open_source
from ldae.data.transforms import CropTransform
from ldae.errors import InputError

RANDOM = np.random.default_rng(0)


def bands(count: int, dtype=np.uint16, size=(6, 9)) -> np.ndarray:
    high = np.iinfo(dtype).max
    return RANDOM.integers(0, high, (*size, count), dtype, endpoint=True)


def tiff(values: np.ndarray, planar="contig", **options) -> io.BytesIO:
    """Return a file with the bands (H, W, C), each pixel's together or one band after another."""
    options = {"photometric": "minisblack", "planarconfig": planar} | options
    stored = values if planar == "contig" else np.moveaxis(values, 2, 0)
    file = io.BytesIO()
    tifffile.imwrite(file, stored, **options)
    file.seek(0)
    return file


def pixels(file: io.BytesIO, in_chans: int) -> np.ndarray:
    file.seek(0)
    return np.dstack(to_planes(decode(file, "x"), in_chans))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 13])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib", "predictor": True},
        {"tile": (16, 16)},
        {"bigtiff": True},
        {"byteorder": ">"},
    ],
    ids=["raw", "zlib", "tiles", "bigtiff", "big-endian"],
)
def test_bands_of_8_and_16_bits_are_read_exactly(count, planar, options):
    eight, sixteen = bands(count, np.uint8), bands(count)
    assert np.array_equal(pixels(tiff(eight, planar, **options), count), eight)
    expected = np.rint(sixteen / 257).astype(np.uint8)
    assert np.array_equal(pixels(tiff(sixteen, planar, **options), count), expected)


def test_colours_of_16_bits_are_rounded_not_cut():
    """Pillow would keep the upper byte: 255 of 256 steps darker at most."""
    values = np.array([[[0, 128, 129], [65535, 65407, 65406]]], np.uint16)
    file = tiff(values, photometric="rgb")
    assert pixels(file, 3).tolist() == [[[0, 0, 1], [255, 255, 254]]]


def test_a_fourth_band_is_transparency_only_if_the_file_says_so():
    values = bands(4)
    expected = np.rint(values / 257).astype(np.uint8)
    infrared = tiff(values, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(pixels(infrared, 4), expected)
    with pytest.raises(InputError, match="an array of 4 channels where in_chans is 3"):
        pixels(infrared, 3)
    transparent = tiff(values, photometric="rgb", extrasamples=["unassalpha"])
    assert decode(transparent, "x").mode == "RGBA"
    assert np.array_equal(pixels(transparent, 3), expected[:, :, :3])
    infrared = tiff(values.astype(np.uint8), photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(pixels(infrared, 4), values.astype(np.uint8))


@pytest.mark.parametrize(
    "values, scale",
    [
        (bands(5).astype(np.uint32), 1 / 257),
        (bands(5).astype(np.int16).clip(0), 1 / 257),
        (bands(5).astype(np.float32) / 65535, 255),
        (bands(5).astype(np.float32) / 257, 1),
    ],
)
def test_other_types_are_scaled_as_grey_is(values, scale):
    found = pixels(tiff(values), 5)
    assert np.abs(found - values.astype(np.float64) * scale).max() <= 0.501


def test_signed_bands_of_8_bits_have_the_largest_signed_number_as_white():
    found = pixels(tiff(np.array([[[0, 64, 127, 127, 127]]], np.int8)), 5)
    assert found.tolist() == [[[0, 129, 255, 255, 255]]]
    with pytest.raises(BadImage, match="its values go from -1 to 5; save integers in 0..127"):
        decode(tiff(np.array([[[-1, 5, 5, 5, 5]]], np.int8)), "x")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_that_is_stored_as_0_is_inverted(dtype):
    high = np.iinfo(dtype).max
    grey = np.array([[[0], [high]]], dtype)
    file = io.BytesIO()
    tifffile.imwrite(file, grey[..., 0], photometric="miniswhite")
    assert pixels(file, 1).tolist() == [[[255], [0]]]
    five = np.repeat(grey, 5, axis=2)
    found = pixels(tiff(five, photometric="miniswhite"), 5)
    assert found.tolist() == [[[255] * 5, [0] * 5]]


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_transparency_is_no_band_of_grey(photometric):
    values = np.array([[[0, 65535], [65535, 257]]], np.uint16)
    file = tiff(values, photometric=photometric, extrasamples=["unassalpha"])
    white = np.array([[0, 255]]) if photometric == "minisblack" else np.array([[255, 0]])
    assert np.array_equal(pixels(file, 1)[..., 0], white)
    assert np.array_equal(pixels(file, 4)[..., 3], [[255, 1]])


def test_values_without_a_known_white_are_refused():
    for values in (np.full((2, 2, 5), 70_000, np.int32), np.full((2, 2, 5), np.nan, np.float32)):
        with pytest.raises(BadImage, match="^x cannot be decoded: its values go from"):
            decode(tiff(values), "x")


def test_the_orientation_is_applied(orientation):
    values, (number, upright) = bands(5, np.uint8), orientation
    file = tiff(values, extratags=[(274, "H", 1, number, True)])
    expected = upright(values)
    assert np.array_equal(pixels(file, 5), expected)
    file.seek(0)
    assert image_size(file, "x") == expected.shape[1::-1]


@pytest.mark.parametrize("number", [0, 9])
def test_an_orientation_that_does_not_exist_turns_nothing(number):
    values = bands(5, np.uint8)
    assert np.array_equal(pixels(tiff(values, extratags=[(274, "H", 1, number, True)]), 5), values)


def test_a_fourth_band_of_which_nothing_is_said_is_transparency():
    content = tiff(bands(4, np.uint8), photometric="rgb").getvalue()
    entry, other = (np.array([tag, 3], "<u2").tobytes() for tag in (338, 65000))
    assert content.count(entry) == 1
    assert decode(io.BytesIO(content.replace(entry, other)), "x").mode == "RGBA"


def test_the_bands_of_the_first_page_are_the_image():
    first, second, file = bands(5, np.uint8), bands(5, np.uint8), io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in (first, second):
            writer.write(page, photometric="minisblack", planarconfig="contig")
    assert np.array_equal(pixels(file, 5), first)


def test_grey_of_12_bits_spans_the_8_bit_range():
    """Pillow reads such values as they are, into pixels of 16 bits."""
    values, file = np.array([[0, 2048, 4095, 9]], np.uint16), io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    content = file.getvalue().replace(values.tobytes(), bytes.fromhex("000800fff0090000"))
    depths = [np.array([258, 3, 1, 0, bits], "<u2").tobytes() for bits in (16, 12)]
    file = io.BytesIO(content.replace(*depths))
    assert pixels(file, 1).tolist() == [[[0], [128], [255], [1]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_what_pillow_reads_well_needs_no_tifffile(mode, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    file = io.BytesIO()
    Image.new(mode, (3, 2)).save(file, "TIFF")
    for read in (lambda: image_size(file, "x"), lambda: decode(file, "x").size):
        file.seek(0)
        assert read() == (3, 2)


def test_without_tifffile_its_installation_is_the_remedy(monkeypatch):
    file = tiff(bands(5))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadImage, match=r"need the package tifffile: pip install 'ldae\[tiff\]'"):
        decode(file, "x")


def test_damaged_bands_are_one_sentence(capfd):
    content = tiff(bands(5), compression="zlib").getvalue()
    for damaged in (content[:-40], content[:400], content.replace(b"x\x9c", b"\0\0")):
        with pytest.raises(BadImage, match="^x cannot be decoded: ") as caught:
            decode(io.BytesIO(damaged), "x")
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert logging.getLogger("tifffile").level == logging.NOTSET  # the log of the caller


def test_too_many_pixels_are_refused_before_memory_is_taken():
    content = tiff(bands(5, np.uint8, (40, 50))).getvalue()
    for name, value in ((256, 100_000), (257, 100_000)):  # width and height
        entry = np.array([name, 4], "<u2").tobytes()
        at = content.index(entry) if entry in content else content.index(entry[:2] + b"\3\0")
        content = (
            content[: at + 2] + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") + content[at + 12 :]
        )
    with pytest.raises(BadImage, match=r"an array of \(100000, 100000, 5\) is too large"):
        decode(io.BytesIO(content), "x")


def test_a_folder_of_them_gives_batches(make_tree):
    files = {f"{name}.tif": tiff(bands(5)).getvalue() for name in ("a/1", "a/2", "b/3")}
    source = open_source(str(make_tree("tree", files)), "train")
    source = pickle.loads(pickle.dumps(source))
    options = {"seed": 0, "start": 0, "stop": 3, "batch_size": 3}
    runs = [
        next(iter(train_batches(source, CropTransform(4, in_chans=5), workers=workers, **options)))
        for workers in (0, 1)
    ]
    assert runs[0].images.shape == (3, 5, 4, 4)
    assert np.array_equal(runs[0].images, runs[1].images)
