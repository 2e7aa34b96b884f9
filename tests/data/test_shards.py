import io
import os
import tarfile
import time

import numpy as np
import pytest
from doors import png, write_shards, write_tar

from ldae.data import listing, shards
from ldae.data.image import BadImage
from ldae.data.loader import train_batches
from ldae.data.open import open_source, open_splits
from ldae.data.shards import splits_by_name
from ldae.data.transforms import CropTransform
from ldae.errors import InputError

FILES = ["ant/1.png", "ant/2.png", "bee/1.png", "cat/1.png"]


def names(path) -> list[str]:
    source = open_source(str(path), "train")
    return [source.name(i) for i in range(len(source))]


def refuse(path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_source(str(path), "train")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_sample_is_one_image_with_the_label_of_its_key(tmp_path):
    files = {"a.jpg": png(0), "a.cls": b"7", "a.json": b'{"label": 1}', "a.txt": b"a caption"}
    files |= {"b.seg.png": b"map", "b.png": png(1), "b.cls": b"10", "b.npy": b"features"}
    files |= {"deep/c.x.cls": b"9", "deep/c.png": png(2), "deep/c.cls": b"7", "__key__": b""}
    write_tar(tmp_path / "wds/0.tar", files | {".d.png": b"", "e.cls": b"5"})
    source = open_source(str(tmp_path / "wds"), "train")
    assert names(tmp_path / "wds") == ["0.tar/a.jpg", "0.tar/b.png", "0.tar/deep/c.png"]
    # In the order of numbers, not of texts; a label without an image is no class.
    assert source.classes == ["7", "10"] and source.labels.tolist() == [0, 1, 0]
    assert source.image(1).size == (8, 8)


def test_image_files_of_no_sample_are_reported(tmp_path, caplog):
    files = {"plain.jpg": png(0), "plain.png": png(1), "plain.npy": b"features"}
    files |= {"img.1.png": png(2), "img.2.png": png(3), ".x.png": b""}
    write_tar(tmp_path / "wds/0.tar", files)
    assert names(tmp_path / "wds") == ["0.tar/plain.jpg"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/wds: 3 image files in its shards are left out, such as 0.tar/plain.png: names "
        "that agree up to the first dot are one sample, of one image"
    ]


def test_names_of_shards_may_be_in_capitals(tmp_path):
    write_tar(tmp_path / "wds/A.TAR", {"1.png": png(1)})
    source = open_source(str(tmp_path / "wds"), "train")
    assert source.name(0) == "A.TAR/1.png" and source.image(0).size == (8, 8)


def test_shards_and_images_in_them_are_ordered_by_name(tmp_path):
    for name in ("b.tar", "a.tar"):
        write_tar(tmp_path / "wds" / name, {"2.png": png(2), "1.png": png(1)})
    assert names(tmp_path / "wds") == ["a.tar/1.png", "a.tar/2.png", "b.tar/1.png", "b.tar/2.png"]


def test_newer_images_of_the_same_size_are_others(tmp_path):
    stamps = set()
    for time_of_entry in (1, 2):
        path = tmp_path / str(time_of_entry) / "0.tar"
        path.parent.mkdir()
        with tarfile.open(path, "w") as archive:
            for name, content in (("a.png", png(0)), ("a.cls", b"7")):
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(content), time_of_entry
                archive.addfile(member, io.BytesIO(content))
        stamps.add(open_source(str(path.parent), "train").stamp())
    assert len(stamps) == 2


def test_samples_without_labels_are_unlabelled_but_not_half_of_them(tmp_path):
    write_tar(tmp_path / "wds/0.tar", {"a.png": png(0), "a.json": b'{"url": "x"}', "b.png": png(1)})
    source = open_source(str(tmp_path / "wds"), "train")
    assert source.classes is None and source.labels is None
    write_tar(tmp_path / "wds/1.tar", {"c.png": png(0), "c.cls": b"1"})
    refuse(tmp_path / "wds", r"0\.tar/a\.png has no label, and others have$")


@pytest.mark.parametrize("label", [{"cls": b"7"}, {"json": b'{"label": "7"}'}])
def test_an_archive_is_a_shard_if_labels_lie_beside_its_images(label, tmp_path):
    """Whatever its name, and with the names of a plain archive."""
    ((extension, content),) = label.items()
    files = {"x/b.png": png(1), f"x/b.{extension}": content, "a.png": png(0)}
    path = write_tar(tmp_path / "val-0.tar", files | {f"a.{extension}": content})
    source = open_source(str(path), "train")
    assert (source.classes, source.labels.tolist()) == (["7"], [0, 0])
    assert names(path) == ["a.png", "x/b.png"]
    write_tar(path, files)
    refuse(path, r"val-0\.tar/a\.png has no label, and others have$")


@pytest.mark.parametrize(
    "beside",
    [{}, {"1.txt": b"7"}, {"1.json": b'{"url": 7}'}, {"1.json": b"{"}, {"2.cls": b"7"}],
)
def test_an_archive_without_labels_beside_its_images_is_a_plain_one(beside, tmp_path):
    files = {f"{folder}/1.png": png(0) for folder in ("ant", "bee")}
    path = write_tar(tmp_path / "0.tar", files | {f"ant/{name}": beside[name] for name in beside})
    assert open_source(str(path), "train").classes == ["ant", "bee"]


def test_the_names_of_shards_say_their_splits():
    train, evaluation = ["in1k-train-0.tar", "in1k-train-1.tar"], ["in1k-validation-0.tar"]
    assert splits_by_name(train + evaluation) == {"train": train, "eval": evaluation}
    assert splits_by_name(["train/0.tar", "test/0.tar", "val/0.tar"])["eval"] == ["val/0.tar"]
    assert splits_by_name(["test-set/train_0.tar", "x/VAL.tar"])["train"] == [
        "test-set/train_0.tar"
    ]
    assert splits_by_name(["val-0.tar"]) == {"eval": ["val-0.tar"]}
    for files in (train, ["0.tar", "1.tar"], ["trainings.tar", "interval.tar"]):
        assert splits_by_name(files) == {"all": files}


def test_splits_have_their_own_labels(make_tree, tmp_path):
    write_shards(make_tree("a", FILES), tmp_path / "wds/train")
    write_shards(make_tree("b", ["cat/1.png", "bee/2.png"]), tmp_path / "wds/val")
    train, evaluation = open_splits(str(tmp_path / "wds"), None)
    assert [len(train), len(evaluation)] == [4, 2]
    assert train.classes == evaluation.classes == ["ant", "bee", "cat"]
    assert evaluation.labels.tolist() == [1, 2]


def test_images_beside_shards_are_the_images(make_tree):
    root = make_tree("tree", ["a/1.png"])
    write_tar(root / "0.tar", {"2.png": png(0)})
    assert names(root) == ["a/1.png"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.png": png(0), "a.cls": b"\xff"}, r"label of .*0\.tar/a cannot be read: .*utf-8"),
        ({"a.png": png(0), "a.cls": b" \n"}, r"label of .*/a cannot be read: .*neither a text"),
        ({"a.png": png(0), "a.json": b"{"}, r"label of .*0\.tar/a cannot be read: Expecting"),
        ({"a.png": png(0), "a.json": b'{"label": [1]}'}, r"cannot be read: \[1\] is neither"),
        ({"a.png": png(0), "a.json": b"[" * 100_000}, r"label of .*0\.tar/a cannot be read"),
        ({"a.txt": b"no image"}, r"contains no images: its \.tar shards have none$"),
        ({"../a.png": png(0)}, r"0\.tar contains '\.\./a\.png', a name that leads outside$"),
    ],
)
def test_wrong_shards_are_refused_in_one_sentence(files, message, tmp_path):
    write_tar(tmp_path / "wds/0.tar", files)
    refuse(tmp_path / "wds", message)


def test_damaged_and_compressed_shards_are_refused(tmp_path):
    path = write_tar(tmp_path / "wds/0.tar", {"a.png": png(0), "b.png": png(1)})
    path.write_bytes(path.read_bytes()[:700])
    refuse(tmp_path / "wds", r"0\.tar is not a readable tar archive")
    path.rename(path.with_suffix(".tar.gz"))
    refuse(tmp_path / "wds", r"0\.tar\.gz is a compressed tar archive.*decompress it")
    write_tar(tmp_path / "x/0.tar/1.tar", {"a.png": png(0)})
    refuse(tmp_path / "x", r"shard 0\.tar/1\.tar in a folder that is named like a shard$")


def test_a_shard_that_became_shorter_has_bad_images(tmp_path):
    path = write_tar(tmp_path / "wds/0.tar", {"a.png": png(0), "b.png": png(1)})
    source = open_source(str(tmp_path / "wds"), "train")
    path.write_bytes(path.read_bytes()[:1100])
    source.image(0)
    with pytest.raises(BadImage, match=r"0\.tar/b\.png cannot be read: the archive is truncated$"):
        source.image(1)
    options = {"seed": 0, "start": 0, "stop": 2, "batch_size": 2, "bad_images": "skip"}
    (batch,) = train_batches(source, CropTransform(8), **options)
    assert [name for name, _ in batch.bad] == ["0.tar/b.png"]


def test_only_changed_shards_are_listed_again(make_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(listing, "_KEPT_FROM", 1)
    monkeypatch.setattr(listing, "_SETTLED_NS", 0)
    listed, samples = [], shards._samples
    monkeypatch.setattr(
        shards, "_samples", lambda path, *rest: [listed.append(path.name), samples(path, *rest)][1]
    )

    def found():
        listed.clear()
        source = open_source(str(tmp_path / "wds"), "train")
        images = [source.image(i).tobytes() for i in range(len(source))]
        return images, np.array(source.classes)[source.labels].tolist(), source.fingerprint()

    wds = write_shards(make_tree("tree", FILES), tmp_path / "wds")
    before = found()
    assert listed == ["shard-0000.tar", "shard-0001.tar"]
    assert found() == before and listed == []
    time.sleep(0.02)  # the time of a change is counted in steps of up to 10 ms
    write_tar(wds / "shard-0000.tar", {"1.png": png(9), "1.cls": b"new"})
    images, labels, _ = found()
    assert listed == ["shard-0000.tar"] and labels == ["new", "bee", "cat"]
    assert images[1:] == before[0][2:]
    os.remove(wds / "shard-0000.tar")
    assert found()[1] == ["bee", "cat"] and listed == []
