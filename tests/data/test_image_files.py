import logging
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from ldae.data.image import BadImage
from ldae.data.loader import train_batches
from ldae.data.open import open_source, open_splits
from ldae.data.transforms import CropTransform
from ldae.errors import InputError


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_folder_zip_and_tar_are_the_same_source(make_tree, pack):
    files = ["dog/b.png", "cat/deep/er/z.png", "cat/a.PNG", "ärger/1.png", "dog/a.png"]
    root = make_tree("tree", {**dict.fromkeys(files), "cat/notes.txt": b"no image", "x.csv": b""})
    source = open_source(str(pack(root)), "train")
    assert names(source) == sorted(files)
    assert source.classes == ["cat", "dog", "ärger"] and source.split == "all"
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [0, 0, 1, 1, 2]
    for i, name in enumerate(names(source)):
        with Image.open(root / name) as expected:
            assert np.array_equal(np.asarray(source.image(i)), np.asarray(expected))


def test_images_directly_inside_make_a_source_unlabelled(make_tree, pack):
    root = make_tree("tree", ["1.png", "cat/2.png", "cat/deep/3.png"])
    source = open_source(str(pack(root)), "eval")
    assert names(source) == ["1.png", "cat/2.png", "cat/deep/3.png"]
    assert source.classes is None and source.labels is None
    assert source.unlabelled == "its sub-folders are no classes, since 1.png lies beside them"


def test_a_source_says_which_image_lies_beside_its_folders(make_tree):
    stray = open_source(str(make_tree("stray", ["cat/1.png", "dog/2.png", "kit.png"])), "train")
    assert "since kit.png lies beside" in stray.unlabelled
    assert not open_source(str(make_tree("plain", ["1.png", "2.png"])), "train").unlabelled


@pytest.mark.parametrize("outer", ["", "tree/"])
def test_images_beside_the_splits_are_left_out_with_a_warning(outer, make_tree, pack, caplog):
    files = ["train/x/1.png", "test/x/5.png", "more/2.png", "more/a/3.png", "val/x/4.png"]
    source = open_source(str(pack(make_tree("t", [outer + name for name in files]))), "train")
    assert names(source) == [f"{outer}train/x/1.png"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{source.spec}: its splits are {outer}train/ and {outer}val/, and 3 images beside "
        f"them are left out, in {outer}more, {outer}test"
    ]


@pytest.mark.parametrize("outer", ["", "tree/", "a/b/"])
@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test"])
def test_splits_are_found_below_single_outer_folders(outer, held_out, make_tree, pack):
    root = make_tree("t", [f"{outer}train/x/1.png", f"{outer}{held_out}/x/2.png"])
    train, evaluation = open_splits(str(pack(root)), None)
    assert names(train) == [f"{outer}train/x/1.png"] and train.split == "train"
    assert names(evaluation) == [f"{outer}{held_out}/x/2.png"] and evaluation.split == "eval"
    assert train.classes == evaluation.classes == ["x"]


@pytest.mark.parametrize("train, held_out", [("Train", "Test"), ("TRAIN", "val")])
def test_splits_may_be_in_capitals(train, held_out, make_tree, pack):
    root = make_tree("t", [f"{train}/x/1.png", f"{held_out}/x/2.png"])
    sources = open_splits(str(pack(root)), None)
    assert [names(source) for source in sources] == [[f"{train}/x/1.png"], [f"{held_out}/x/2.png"]]


def test_classes_that_are_named_like_splits_are_reported(make_tree, pack, caplog):
    source = open_source(str(pack(make_tree("t", ["training/1.png", "testing/2.png"]))), "train")
    assert source.split == "all" and source.classes == ["testing", "training"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{source.spec}: testing/ and training/ count as classes; as splits they must be named "
        "train/ and val/"
    ]
    open_source(str(pack(make_tree("other", ["bus/1.png", "train/2.png"]))), "train")
    assert len(caplog.records) == 1


def test_val_is_preferred_to_test(make_tree):
    root = make_tree("t", ["train/x/1.png", "test/x/2.png", "val/x/3.png"])
    assert names(open_source(str(root), "eval")) == ["val/x/3.png"]


def test_a_single_outer_folder_is_not_a_class(make_tree, pack):
    root = make_tree("t", ["flowers/rose/1.png", "flowers/tulip/2.png"])
    source = open_source(str(pack(root)), "train")
    assert source.classes == ["rose", "tulip"]


def test_a_single_folder_of_images_is_a_class(make_tree, pack):
    source = open_source(str(pack(make_tree("t", ["rose/1.png", "rose/deep/2.png"]))), "train")
    assert source.classes == ["rose"] and len(source) == 2


def test_folders_without_images_are_ignored_with_a_warning(make_tree, pack, caplog):
    root = make_tree("t", ["a/1.png", "b/2.png"])
    (root / "void").mkdir()
    with caplog.at_level(logging.WARNING):
        source = open_source(str(pack(root)), "train")
    assert source.classes == ["a", "b"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{source.spec}: ignored folders without images: void"
    ]


def test_a_source_without_images_is_refused(make_tree, pack):
    root = make_tree("t", {"a/notes.txt": b"x"})
    with pytest.raises(InputError, match="t.* contains no images"):
        open_source(str(pack(root)), "train")


def test_a_bad_image_is_named(make_tree, pack):
    root = make_tree("t", {"a/1.png": None, "a/2.jpg": b"no image"})
    source = open_source(str(pack(root)), "train")
    source.image(0)
    with pytest.raises(BadImage, match=r"a/2\.jpg cannot be decoded"):
        source.image(1)


def test_a_link_to_itself_is_a_bad_image_like_any_other(make_tree):
    root = make_tree("t", ["a/1.png", "a/2.png", "b/3.png"])
    (root / "a/loop.jpg").symlink_to("loop.jpg")
    (root / "b/there.png").symlink_to("back.png")
    (root / "b/back.png").symlink_to("there.png")
    (root / "b/folder").symlink_to("folder")  # without the extension of an image
    source = open_source(str(root), "train")
    loops = {"a/loop.jpg", "b/back.png", "b/there.png"}
    assert names(source) == sorted({"a/1.png", "a/2.png", "b/3.png"} | loops)
    with pytest.raises(BadImage, match=r"a/loop\.jpg cannot be decoded: Too many levels of symb"):
        source.image(names(source).index("a/loop.jpg"))
    options = {"seed": 0, "start": 0, "stop": 6, "batch_size": 6}
    (batch,) = train_batches(source, CropTransform(8), bad_images="skip", **options)
    assert {name for name, _ in batch.bad} == loops and len(batch.images) == 6
    with pytest.raises(BadImage, match="Too many levels of symbolic links"):
        list(train_batches(source, CropTransform(8), bad_images="stop", **options))


def test_images_of_a_truncated_or_missing_file_are_bad(make_tree, pack):
    path = pack(make_tree("t", ["a/1.png"]))
    source = open_source(str(path), "train")
    if path.is_dir():
        (path / "a/1.png").unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadImage, match=r"a/1\.png cannot be"):
        source.image(0)


def test_a_source_can_be_pickled_and_forked(make_tree, pack, fork):
    source = open_source(str(pack(make_tree("t", ["a/1.png", "b/2.png"]))), "train")
    expected = [source.image(i).tobytes() for i in range(2)]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.image(i).tobytes() for i in range(2)] == expected
    assert names(copy) == names(source)
    with fork.Pool(2) as pool:
        images = pool.map(source.image, [0, 1] * 20)
    assert [image.tobytes() for image in images] == expected * 20


def test_names_that_are_not_utf8_can_be_read_and_printed(make_tree):
    root = make_tree("t", ["a/1.png"])
    os.rename(os.fsencode(root / "a/1.png"), os.fsencode(root / "a") + b"/\xff.png")
    source = open_source(str(root), "train")
    assert source.name(0).encode() == rb"a/\xff.png"
    assert source.image(0).size == (8, 8)
