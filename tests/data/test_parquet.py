import os

import numpy as np
import pyarrow as pa
import pytest
from doors import png, write_parquet
from pyarrow import parquet as pq

from ldae.data import parquet
from ldae.data.image import BadImage
from ldae.data.open import open_source, open_splits
from ldae.errors import InputError

FILES = ["ant/1.png", "ant/2.png", "bee/1.png", "cat/1.png", "cat/2.png"]


def write(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_rows_are_unpacked_group_by_group(make_tree, tmp_path, monkeypatch):
    """Neighbours share an unpacking, and never more than one row group is held."""
    path = write_parquet(make_tree("tree", FILES), tmp_path / "a.parquet", rows=2)
    read, read_row_group = [], pq.ParquetFile.read_row_group

    def counted(self, group, *args, **options):
        read.append(group)
        return read_row_group(self, group, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    source = open_source(str(path), "train")
    images = [source.image(i).tobytes() for i in range(5)]
    assert read == [0, 1, 2]
    assert [source.image(i).tobytes() for i in (4, 0, 3)] == [images[i] for i in (4, 0, 3)]
    assert read == [0, 1, 2, 0, 1]
    assert [source.name(i) for i in (0, 4)] == ["a.parquet/000000", "a.parquet/000004"]


def test_a_folder_of_files_has_their_splits_and_all_named_classes(make_tree, tmp_path):
    root = make_tree("tree", FILES)
    for number in range(2):
        write_parquet(root, tmp_path / f"hf/data/train-0000{number}-of-00002.parquet", rows=3)
    write_parquet(root, tmp_path / "hf/data/validation-00000-of-00001.parquet")
    train, evaluation = open_splits(str(tmp_path / "hf"), None)
    assert (len(train), len(evaluation)) == (10, 5)
    assert train.classes == evaluation.classes == ["ant", "bee", "cat"]
    assert train.name(7) == "data/train-00001-of-00002.parquet/000002"
    assert train.image(7).tobytes() == evaluation.image(2).tobytes()


@pytest.mark.parametrize(
    "labels, classes, indices",
    [
        ([10, 9, 10], ["9", "10"], [1, 0, 1]),
        (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["a", "b"], [1, 0, 1]),
        ([0, -1, 1], None, None),
        ([0, None, 1], None, None),
    ],
)
def test_labels_without_names_are_numbers_or_texts(labels, classes, indices, tmp_path):
    path = write(tmp_path / "a.parquet", image=[png(0), png(1), png(2)], label=labels)
    source = open_source(str(path), "train")
    assert source.classes == classes
    assert (None if source.labels is None else source.labels.tolist()) == indices


@pytest.mark.parametrize("column", ["image", "img"])
def test_images_are_bytes_or_a_struct_with_them(column, tmp_path):
    forms = ([png(3)], pa.array([png(3)], pa.large_binary()), [{"bytes": png(3), "path": None}])
    for form in forms:
        source = open_source(
            str(write(tmp_path / "a.parquet", **{column: form, "n": [1]})), "train"
        )
        assert source.labels is None and source.image(0).size == (8, 8)


def test_the_name_of_a_file_need_not_be_in_utf8(make_tree, tmp_path):
    path = write_parquet(make_tree("tree", FILES), tmp_path / "hf/a.parquet")
    os.rename(path, os.fsencode(path.parent) + b"/caf\xe9.PARQUET")
    source = open_source(str(path.parent), "train")
    assert source.name(0).encode() == rb"caf\xe9.PARQUET/000000"
    assert source.image(0).size == (8, 8) and source.fingerprint()


def test_a_row_without_bytes_is_a_bad_image(tmp_path):
    images = [{"bytes": None, "path": "1.png"}, {"bytes": b"no image", "path": None}, None]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    source = open_source(str(write(tmp_path / "a.parquet", image=pa.array(images, kind))), "eval")
    for i, reason in enumerate(("has no bytes", "cannot be decoded: its content", "has no bytes")):
        with pytest.raises(BadImage, match=f"a.parquet/00000{i} {reason}"):
            source.image(i)


def test_a_file_that_became_shorter_has_bad_images(make_tree, tmp_path):
    path = write_parquet(make_tree("tree", FILES), tmp_path / "a.parquet")
    source = open_source(str(path), "train")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadImage, match=r"000000 cannot be read: .* is not a readable parquet"):
        source.image(0)


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"feature": [1.0], "name": ["x"]},
            "has no column image .* its columns are feature, name$",
        ),
        ({"left": [b""], "right": [b""]}, "has no column image"),
        (
            {"image": [b""], "label": [0.5]},
            "column label of .* is double: labels are whole numbers",
        ),
        ({"image": pa.array([], pa.binary())}, "contains no images: it has no rows"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(columns, message, tmp_path):
    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(InputError, match=message) as caught:
        open_source(str(path), "train")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_content_and_large_row_groups_are_refused(make_tree, tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(InputError, match=f"{path} is not a readable parquet file"):
        open_source(str(path), "train")
    write_parquet(make_tree("tree", FILES), path)
    monkeypatch.setattr(parquet, "_MAX_GROUP", 100)
    with pytest.raises(InputError, match=f"{path} has a row group .* again with row_group_size"):
        open_source(str(path), "train")


def test_files_of_one_split_agree(make_tree, tmp_path):
    for number, files in enumerate((FILES, ["dog/1.png"])):
        write_parquet(make_tree(str(number), files), tmp_path / f"hf/{number}.parquet")
    with pytest.raises(InputError, match=r"1\.parquet has other columns or classes than .*0\.parq"):
        open_source(str(tmp_path / "hf"), "train")


def test_a_label_that_no_class_has_is_refused(make_tree, tmp_path):
    labels = np.arange(5)
    path = write_parquet(make_tree("tree", FILES), tmp_path / "a.parquet", label=labels)
    with pytest.raises(InputError, match="has the label 3, which is none of 3 classes"):
        open_source(str(path), "train")
