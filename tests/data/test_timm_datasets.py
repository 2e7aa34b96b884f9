import os
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ldae.data import timm_datasets
from ldae.data.image import BadImage
from ldae.data.open import open_source, open_splits
from ldae.errors import InputError


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


def test_torchvision_data_sets_are_opened_by_timm(cifar10):
    root, pixels = cifar10
    train, evaluation = open_splits(f"torch/cifar10@{root}", None)
    assert (train.labels.tolist(), evaluation.labels.tolist()) == ([1, 0, 1, 1], [0, 1])
    assert train.classes == evaluation.classes == ["plane", "car"]
    assert [evaluation.name(i) for i in range(2)] == ["eval/000000", "eval/000001"]
    assert np.array_equal(np.asarray(train.image(3)), pixels[3].transpose(1, 2, 0))
    assert np.array_equal(np.asarray(evaluation.image(0)), pixels[4].transpose(1, 2, 0))


def test_hidden_test_labels_make_a_source_unlabelled(cifar10):
    root, _ = cifar10
    content = {"data": np.zeros((2, 3072), np.uint8), "labels": [-1, -1]}
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(content))
    assert open_source(f"torch/cifar10@{root}", "eval").labels is None


def test_hfds_without_its_package_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"hfds/some/data needs the package datasets: pip install"):
        open_source("hfds/some/data", "train")


def test_pixels_in_memory_have_a_fingerprint(cifar10):
    root, pixels = cifar10

    def prints() -> list[str]:
        return [source.fingerprint() for source in open_splits(f"torch/cifar10@{root}", None)]

    before = prints()
    pixels[5] += 1
    content = {"data": pixels[4:].reshape(2, -1), "labels": [0, 1]}
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(content))
    after = prints()
    assert before[0] == after[0] and before[1] != after[1]


def test_files_of_torchvision_have_a_fingerprint(make_tree, tmp_path):
    root = make_tree("tree", ["cat/1.png", "dog/2.png"])
    found = [open_source(f"torch/image_folder@{root}", "train").fingerprint()]
    root = root.rename(tmp_path / "elsewhere")
    found += [open_source(f"torch/image_folder@{root}", "train").fingerprint()]
    os.utime(root / "cat/1.png", (1, 1))
    found += [open_source(f"torch/image_folder@{root}", "train").fingerprint()]
    assert found[0] == found[1] != found[2]


def test_image_files_of_torchvision_are_decoded_as_others(make_tree, tmp_path):
    root = make_tree("tree", ["cat/1.png", "dog/2.png"])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 6)).save(root / "cat/1.png", exif=exif)
    (root / "dog/2.png").write_bytes(b"no image")
    source = pickle.loads(pickle.dumps(open_source(f"torch/image_folder@{root}", "train")))
    assert source.image(0).size == (6, 9)
    with pytest.raises(BadImage, match="dog/2.png cannot be decoded: its content is not an image"):
        source.image(1)


@pytest.mark.parametrize(
    "splits, opened",
    [(["train"], {"all": "train"}), (["train", "validation"], {"train": "train", "eval": "eval"})],
)
def test_a_set_of_the_hub_with_a_train_split_alone_has_no_splits(splits, opened, monkeypatch):
    hub = SimpleNamespace(get_dataset_split_names={"some/data": splits}.__getitem__)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr(timm_datasets, "HfdsSource", lambda spec, split: split)
    monkeypatch.setitem(timm_datasets.SOURCES, "hfds", lambda spec, split: split)
    found = timm_datasets.timm_splits("hfds/some/data@cache")
    assert {name: open_split() for name, open_split in found.items()} == opened


def test_a_null_label_and_a_damaged_row_of_the_hub(monkeypatch):
    class Table(dict):
        column_names = ("label",)

    class Reader:
        dataset, label_key, class_to_idx = Table(label=[0, None]), "label", {"cat": 0}

        def __getitem__(self, i):
            raise RuntimeError("Arrow: damaged")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    monkeypatch.setattr(
        timm_datasets, "_create_dataset", lambda *_: SimpleNamespace(reader=Reader())
    )
    source = open_source("hfds/some/data", "train")
    assert source.classes is None and source.labels is None
    with pytest.raises(
        BadImage, match="hfds/some/data/train/000001 cannot be read: Arrow: damaged"
    ):
        source.image(1)


def test_hfds_has_the_fingerprint_of_its_package(monkeypatch):
    class Table:
        column_names = ()

    class Reader:
        dataset, label_key, class_to_idx = Table(), "label", {}

        def __len__(self):
            return 3

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    monkeypatch.setattr(
        timm_datasets, "_create_dataset", lambda *_: SimpleNamespace(reader=Reader())
    )
    found = []
    for name in ("one", "one", "two"):
        Table._fingerprint = name
        found.append(open_source("hfds/some/data", "train").fingerprint())
    assert found[0] == found[1] != found[2]
