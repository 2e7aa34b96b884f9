import logging
import multiprocessing
import os
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from ldae.data.image import BadImage
from ldae.data.open import open_source, open_splits
from ldae.errors import InputError


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def class_of(source, i: int) -> str:
    return source.classes[source.labels[i]]


def test_a_folder_a_zip_and_a_tar_are_the_same_source(make_tree, pack):
    files = ["dog/b.png", "cat/deep/er/z.png", "cat/a.PNG", "ärger/1.png", "dog/a.png"]
    root = make_tree("tree", {**dict.fromkeys(files), "cat/notes.txt": b"no image", "x.csv": b""})
    source = open_source(str(pack(root)), "train")
    assert names(source) == sorted(files)
    assert source.classes == ["cat", "dog", "ärger"] and source.split == "all"
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [0, 0, 1, 1, 2]
    for i, name in enumerate(names(source)):
        with Image.open(root / name) as expected:
            assert np.array_equal(np.asarray(source.image(i)), np.asarray(expected))


def test_images_directly_inside_make_it_unlabelled(make_tree, pack):
    root = make_tree("tree", ["1.png", "cat/2.png", "cat/deep/3.png"])
    source = open_source(str(pack(root)), "eval")
    assert names(source) == ["1.png", "cat/2.png", "cat/deep/3.png"]
    assert source.classes is None and source.labels is None


@pytest.mark.parametrize("outer", ["", "tree/", "a/b/"])
@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test"])
def test_splits_are_found_below_lone_outer_folders(outer, held_out, make_tree, pack):
    root = make_tree("t", [f"{outer}train/x/1.png", f"{outer}{held_out}/x/2.png"])
    train, evaluation = open_splits(str(pack(root)), None)
    assert names(train) == [f"{outer}train/x/1.png"] and train.split == "train"
    assert names(evaluation) == [f"{outer}{held_out}/x/2.png"] and evaluation.split == "eval"
    assert train.classes == evaluation.classes == ["x"]


def test_val_comes_before_test(make_tree):
    root = make_tree("t", ["train/x/1.png", "test/x/2.png", "val/x/3.png"])
    assert names(open_source(str(root), "eval")) == ["val/x/3.png"]


def test_a_lone_outer_folder_is_no_class(make_tree, pack):
    root = make_tree("t", ["flowers/rose/1.png", "flowers/tulip/2.png"])
    source = open_source(str(pack(root)), "train")
    assert source.classes == ["rose", "tulip"]


def test_a_lone_folder_of_images_is_a_class(make_tree, pack):
    source = open_source(str(pack(make_tree("t", ["rose/1.png", "rose/deep/2.png"]))), "train")
    assert source.classes == ["rose"] and len(source) == 2


def test_empty_class_folders_are_left_out_with_a_warning(make_tree, pack, caplog):
    root = make_tree("t", ["a/1.png", "b/2.png"])
    (root / "void").mkdir()
    with caplog.at_level(logging.WARNING):
        source = open_source(str(pack(root)), "train")
    assert source.classes == ["a", "b"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{source.spec}: left out, for they hold no images: void"
    ]


def test_eval_labels_follow_the_train_classes_by_name(make_tree):
    train_root = make_tree("train_data", ["ant/1.png", "bee/1.png", "cat/1.png"])
    eval_root = make_tree("eval_data", ["bee/1.png", "cat/1.png"])
    train, evaluation = open_splits(str(train_root), str(eval_root))
    assert evaluation.classes == train.classes
    assert [class_of(evaluation, i) for i in range(2)] == ["bee", "cat"]


def test_an_eval_class_unknown_in_training_is_named(make_tree):
    roots = [str(make_tree("a", ["ant/1.png"])), str(make_tree("b", ["ant/1.png", "wasp/1.png"]))]
    with pytest.raises(InputError, match="class 'wasp' of .*b is not among the classes of .*a$"):
        open_splits(*roots)
    both = make_tree("both", ["train/ant/1.png", "val/ant/1.png", "val/wasp/1.png"])
    told = r"class 'wasp' of .*both \(eval\) is not among the classes of .*both \(train\)$"
    with pytest.raises(InputError, match=told):
        open_splits(str(both), None)


def test_eval_data_stands_in_for_the_eval_split(make_tree):
    split = str(make_tree("split", ["train/x/1.png", "val/x/2.png"]))
    whole = str(make_tree("whole", ["x/3.png"]))
    assert names(open_splits(split, whole)[1]) == ["x/3.png"]
    train, evaluation = open_splits(whole, split)
    assert (names(train), names(evaluation)) == (["x/3.png"], ["val/x/2.png"])
    with pytest.raises(InputError, match="--eval-data"):
        open_splits(whole, None)


def test_an_unlabelled_side_stays_unlabelled(make_tree):
    labelled, plain = str(make_tree("l", ["x/1.png"])), str(make_tree("p", ["1.png"]))
    assert open_splits(labelled, plain)[1].labels is None
    assert open_splits(plain, labelled)[0].labels is None


def test_bad_members_name_themselves(make_tree, pack):
    root = make_tree("t", {"a/1.png": None, "a/2.jpg": b"no image"})
    source = open_source(str(pack(root)), "train")
    source.image(0)
    with pytest.raises(BadImage, match=r"a/2\.jpg can not be decoded"):
        source.image(1)


def test_an_archive_that_shrinks_or_vanishes_gives_bad_images(make_tree, pack):
    path = pack(make_tree("t", ["a/1.png"]))
    source = open_source(str(path), "train")
    if path.is_dir():
        (path / "a/1.png").unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadImage, match=r"a/1\.png can not be"):
        source.image(0)


def test_sources_survive_pickling_and_forking(make_tree, pack):
    source = open_source(str(pack(make_tree("t", ["a/1.png", "b/2.png"]))), "train")
    expected = [source.image(i).tobytes() for i in range(2)]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.image(i).tobytes() for i in range(2)] == expected
    assert names(copy) == names(source)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        images = pool.map(source.image, [0, 1] * 20)
    assert [image.tobytes() for image in images] == expected * 20


def test_names_that_are_not_utf8_can_be_read_and_printed(make_tree):
    root = make_tree("t", ["a/1.png"])
    os.rename(os.fsencode(root / "a/1.png"), os.fsencode(root / "a") + b"/\xff.png")
    source = open_source(str(root), "train")
    assert source.name(0).encode() == rb"a/\xff.png"
    assert source.image(0).size == (8, 8)


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ("", "is named ''"),
        ("/no/such/place", "is named '/no/such/place'$"),
        ("scatered-digits:100", "did you mean scattered-digits"),
        ("digits:5", "neither digits nor"),
        ("scattered-digits:", "N >= 1"),
        ("scattered-digits:0", "N >= 1"),
        ("scattered-digits:ten", "N >= 1"),
        ("scattered-digits:1:2:3", "N >= 1"),
        ("scattered-digits:1:-2", "N >= 1"),
        ("torch/cifar10", "torch/cifar10@ROOT"),
        ("torch/cifar99@/tmp", "can not be opened: Unknown torchvision dataset cifar99"),
    ],
)
def test_wrong_specs_are_told_in_one_sentence(spec, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        open_source(spec, "train")
    assert "\n" not in str(caught.value)


def test_a_source_without_images_is_refused(make_tree, pack):
    root = make_tree("t", {"a/notes.txt": b"x"})
    with pytest.raises(InputError, match="t.* holds no images"):
        open_source(str(pack(root)), "train")


def test_scattered_digits_take_count_and_seed():
    assert len(open_source("scattered-digits", "train")) == 20_000
    assert len(open_source("scattered-digits:30", "eval")) == 5_000
    one, same, other = (open_source(f"scattered-digits:30{s}", "train") for s in ("", ":0", ":1"))
    assert len(one) == 30
    assert np.array_equal(one.labels, same.labels) and not np.array_equal(one.labels, other.labels)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A torchvision CIFAR-10 of 4 + 2 images in its own file format."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8)
    flat = pixels.reshape(6, -1)
    train = {"data": flat[:4], "labels": [1, 0, 1, 1]}
    (folder / "data_batch_1").write_bytes(pickle.dumps(train))
    (folder / "test_batch").write_bytes(pickle.dumps({"data": flat[4:], "labels": [0, 1]}))
    (folder / "meta").write_bytes(pickle.dumps({"label_names": ["plane", "car"]}))
    return tmp_path, pixels


def test_torch_data_sets_are_opened_by_timm(cifar10):
    root, pixels = cifar10
    train, evaluation = open_splits(f"torch/cifar10@{root}", None)
    assert (train.labels.tolist(), evaluation.labels.tolist()) == ([1, 0, 1, 1], [0, 1])
    assert train.classes == evaluation.classes == ["plane", "car"]
    assert names(evaluation) == ["eval/000000", "eval/000001"]
    assert np.array_equal(np.asarray(train.image(3)), pixels[3].transpose(1, 2, 0))
    assert np.array_equal(np.asarray(evaluation.image(0)), pixels[4].transpose(1, 2, 0))


def test_hidden_test_labels_are_no_labels(cifar10):
    root, _ = cifar10
    content = {"data": np.zeros((2, 3072), np.uint8), "labels": [-1, -1]}
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(content))
    assert open_source(f"torch/cifar10@{root}", "eval").labels is None


def test_hfds_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"hfds/some/data needs the package datasets: pip install"):
        open_source("hfds/some/data", "train")


def test_only_an_evaluation_split_is_nothing_to_train_on(tmp_path):
    folder = tmp_path / "data" / "val" / "cat"
    folder.mkdir(parents=True)
    (tmp_path / "data" / "train").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "1.png")
    assert len(open_source(str(tmp_path / "data"), "eval")) == 1
    with pytest.raises(InputError, match="holds only an evaluation split"):
        open_source(str(tmp_path / "data"), "train")
