"""Label maps are found for their images in folders and archives; errors are reported."""

import io

import numpy as np
import pytest
from PIL import Image

from ldae.data.label_maps import open_map_splits
from ldae.errors import InputError


def encoded(image: Image.Image | np.ndarray, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, format, **options)
    return file.getvalue()


def label_png(seed: int, size=(8, 8), mode="L", highest=4) -> bytes:
    labels = np.random.default_rng(seed).integers(0, highest, (size[1], size[0]), np.uint8)
    image = Image.fromarray(labels)
    if mode == "P":
        image.putpalette(list(range(255, -1, -1)) * 3)  # colours unrelated to the numbers
    return encoded(image if mode in "LP" else image.convert(mode))


def values(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)))


LAYOUTS = [
    ("train/images/a/x", "train/labels/a/x", "val/images/y", "val/labels/y"),
    ("images/train/a/x", "labels/train/a/x", "images/val/y", "labels/val/y"),
    ("out/images/train/x", "out/labels/train/x", "out/images/test/y", "out/labels/test/y"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["L", "P"])
def test_layouts_of_folders_and_archives_are_read(layout, mode, make_tree, pack):
    first, first_map, second, second_map = layout
    maps = [label_png(1, mode=mode), label_png(2, mode=mode)]
    files = {f"{first}.PNG": None, f"{second}.png": None}
    root = make_tree("set", files | {f"{first_map}.png": maps[0], f"{second_map}.png": maps[1]})
    train, evaluation = open_map_splits(str(pack(root)), None)
    assert (train.name(0), evaluation.name(0)) == (f"{first}.PNG", f"{second}.png")
    for source, content in ((train, maps[0]), (evaluation, maps[1])):
        assert len(source) == 1 and source.labels is None
        assert np.array_equal(source.label_map(0), values(content))


def test_each_image_has_its_own_label_map(make_tree, pack):
    maps = {name: label_png(seed) for seed, name in enumerate(("b", "a-1", "a", "a.1"))}
    files = {f"images/{name}.png": None for name in reversed(maps)}
    root = make_tree("set", files | {f"labels/{name}.png": maps[name] for name in maps})
    source, _ = open_map_splits(*2 * [str(pack(root))])
    assert len(source) == 4
    for i in range(4):
        stem = source.name(i).removeprefix("images/").removesuffix(".png")
        assert np.array_equal(source.label_map(i), values(maps[stem]))


def test_16_bit_labels_are_not_scaled(make_tree):
    wide = encoded(np.array([[0, 7], [254, 255]], np.uint16))
    root = make_tree("set", {"images/a.png": encoded(Image.new("L", (2, 2))), "labels/a.png": wide})
    source, _ = open_map_splits(str(root), str(root))
    assert source.label_map(0).tolist() == [[0, 7], [254, 255]]


def test_a_label_map_matches_the_upright_image(make_tree):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif)
    root = make_tree("set", {"images/a.jpg": image, "labels/a.png": label_png(0, (4, 6))})
    source, _ = open_map_splits(str(root), str(root))
    assert source.image(0).size == (4, 6) and source.label_map(0).shape == (6, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (label_png(0, (8, 9)), "images/a.png is 8 x 8 pixels, but its label map .* is 8 x 9"),
        (label_png(0, mode="RGB"), r"labels/a.png cannot .* colours \(RGB\), not class numbers"),
        (
            encoded(np.full((8, 8), 300, np.uint16)),
            "labels/a.png cannot be decoded: its labels go from 300 to 300",
        ),
        (b"", "labels/a.png cannot be decoded: the file is empty|its content"),
    ],
)
def test_bad_label_maps_are_refused(content, message, make_tree):
    root = make_tree("set", {"images/a.png": None, "labels/a.png": content})
    source, _ = open_map_splits(str(root), str(root))
    with pytest.raises(InputError, match=message):
        source.label_map(0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["images/a.png", "images/b.png", "labels/a.png"], "images/b.png has no label map b.png"),
        (["images/a.png", "labels/a.jpg"], "no folder labels/ with .png label maps"),
        (["cats/a.png"], "no folder images/ with images"),
        (
            ["images/a.png", "images/a.jpg", "labels/a.png"],
            "images/a.png of the same stem",
        ),
    ],
)
def test_incomplete_folders_are_refused(names, message, make_tree):
    root = str(make_tree("set", names))
    with pytest.raises(InputError, match=message):
        open_map_splits(root, root)


def test_sources_without_label_maps_are_refused(tmp_path):
    with pytest.raises(InputError, match="digits has no label maps"):
        open_map_splits("digits", None)
    with pytest.raises(InputError, match="no folder, archive or built-in data set"):
        open_map_splits(str(tmp_path / "absent"), None)
    assert open_map_splits("scattered-digits:10", None)[0].label_map(3).shape == (32, 32)
