"""Shards, lists and parquet give what the folder gives whose images they hold."""

import pickle

import numpy as np
import pytest
from doors import write_list, write_parquet, write_shards

from ldae.data.loader import train_batches
from ldae.data.open import open_source
from ldae.data.transforms import CropTransform

FILES = ["ant/1.png", "ant/2.png", "bee/1.png", "cat/1.png", "cat/2.png", "cat/3.png", "cat/4.png"]
DOORS = {
    "shards": lambda root: write_shards(root, root.with_name("shards")),
    "shards with json": lambda root: write_shards(root, root.with_name("shards"), label="json"),
    "one shard": lambda root: write_shards(root, root.with_name("one"), size=9) / "shard-0000.tar",
    "list": lambda root: write_list(root, root.with_name("list.txt")),
    "parquet": lambda root: write_parquet(root, root.with_name("images.parquet")),
}


@pytest.fixture(params=DOORS)
def door(request):
    return DOORS[request.param]


def batches(path, **options):
    """Return images, labels and positions of ten random crops, two more than an epoch's end."""
    source = open_source(str(path), "train")
    transform = CropTransform(4, crop="random", flip=True)
    options = {"seed": 3, "start": 0, "stop": 12, "batch_size": 4} | options
    return [
        (batch.images.numpy().tobytes(), batch.targets.tolist(), batch.positions.tolist())
        for batch in train_batches(source, transform, **options)
    ]


def test_the_batches_are_those_of_the_folder_byte_for_byte(door, make_tree):
    root = make_tree("tree", FILES)
    path = door(root)
    assert batches(path) == batches(root)
    for rank in range(2):
        ranks = {"rank": rank, "world_size": 2}
        assert batches(path, **ranks) == batches(root, **ranks)
    assert batches(path, workers=2) == batches(root)


def test_names_are_unique_and_classes_are_those_of_the_folder(door, make_tree):
    root = make_tree("tree", FILES)
    source, folder = (open_source(str(path), "eval") for path in (door(root), root))
    assert len({source.name(i) for i in range(len(source))}) == len(FILES)
    assert source.classes == folder.classes and source.split == "all"
    assert source.labels.dtype == np.int64 and source.labels.tolist() == folder.labels.tolist()
    for i in range(len(source)):
        assert source.image(i).tobytes() == folder.image(i).tobytes()


def test_it_can_be_pickled_and_has_the_same_fingerprint_anywhere(door, make_tree, fork):
    source = open_source(str(door(make_tree("tree", FILES))), "train")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    expected = [source.image(i).tobytes() for i in range(len(source))]
    assert [copy.image(i).tobytes() for i in range(len(source))] == expected
    with fork.Pool(2) as pool:
        images = pool.map(source.image, [*range(len(source))] * 4)
    assert [image.tobytes() for image in images] == expected * 4


def test_another_image_or_label_is_another_fingerprint(door, make_tree):
    root, prints = make_tree("tree", FILES), []
    (root / "bee/1.png").rename(root / "bee/0.png")
    prints.append(open_source(str(door(root)), "train").fingerprint())
    (root / "bee/0.png").write_bytes((root / "ant/1.png").read_bytes() + b"more")
    prints.append(open_source(str(door(root)), "train").fingerprint())
    (root / "bee").rename(root / "bees")
    prints.append(open_source(str(door(root)), "train").fingerprint())
    assert len(set(prints)) == 3
