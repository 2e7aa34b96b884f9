"""Files of features in parquet hold what the .npy files and their tables hold."""

import csv
import io
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from ldae.commands.embed import embed
from ldae.commands.knn import knn
from ldae.errors import InputError
from ldae.evals.embedded_file import open_embedded
from ldae.evals.embedding import Rows
from ldae.evals.evaluation import EncoderSetup, Setup
from ldae.evals.neighbours import KNNProtocol
from ldae.train.interrupt import Interrupted

SETUP = EncoderSetup(random_init=True, img_size=32, workers=0, device="cpu", batch_size=32)
DATA = "scattered-digits:70"
FILE = Path("a.parquet")


@pytest.fixture(autouse=True)
def few_images(monkeypatch, tmp_path):
    monkeypatch.setattr("ldae.data.digits._EVAL_IMAGES", 50)
    monkeypatch.setattr("ldae.evals.embedding._BYTES_AT_ONCE", 4 * 64 * 33)  # several row groups
    monkeypatch.setattr("ldae.evals.embedded_file._ROWS_AT_ONCE", 13)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("options", [{}, {"tokens": True}, {"whiten": True}])
def test_the_columns_are_those_of_npy_and_csv(options):
    for out in (FILE, Path("a.npy")):
        embed("test_vit", DATA, out=out, setup=SETUP, **options)
    table, rows = pyarrow.parquet.read_table(FILE), np.load("a.npy")
    found = np.stack(table["features"].to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(found, rows.reshape(120, -1), atol=1e-5 * ("whiten" in options))
    with open("a.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for name in ("name", "split", "label", "class"):
        assert [str(value) for value in table[name].to_pylist()] == [line[name] for line in lines]
    one, other = (open_embedded(out).record for out in (FILE, Path("a.npy")))
    assert {**one, "checksums": 0, "table": 0} == {**other, "checksums": 0, "table": 0}


def test_a_stopped_command_ends_with_the_same_bytes(monkeypatch):
    embed("test_vit", DATA, out="whole.parquet", setup=SETUP)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        original = Rows.append
        patch.setattr(Rows, "append", lambda *args: (os.kill(os.getpid(), 2), original(*args)))
        embed("test_vit", DATA, out=FILE, setup=SETUP)
    assert not FILE.exists()
    embed("test_vit", DATA, out=FILE, setup=SETUP)
    assert FILE.read_bytes() == Path("whole.parquet").read_bytes()
    assert not Path("a.parquet.parts").exists()


def test_it_is_graded_as_its_backbone(on_ranks):
    """Also on two ranks."""
    protocol = KNNProtocol(k=(1, 5), shots=(2,), draws=2)
    wanted = knn("test_vit", DATA, protocol=protocol, setup=Setup(**vars(SETUP), out=Path("own")))
    embed("test_vit", DATA, out=FILE, setup=SETUP)

    def grade(*data: str) -> None:
        how = Setup(device="cpu", out=Path("file"))
        record = knn(str(FILE), *data, protocol=protocol, setup=how)
        assert record["results"] == wanted["results"]
        assert record["data"]["fingerprint"] == wanted["data"]["fingerprint"]

    grade()
    grade(DATA)
    assert on_ranks(grade) == ["", ""]


def flip(place: int) -> None:
    content = bytearray(FILE.read_bytes())
    content[place] ^= 1
    FILE.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: flip(9000), "a.parquet is damaged and must be written again"),
        (lambda: os.truncate(FILE, 9000), "a.parquet is truncated or damaged"),
        (lambda: FILE.write_bytes(b""), "a.parquet is truncated or damaged"),
        (
            lambda: pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), FILE),
            "a.parquet is no file of `ldae embed`: its metadata has no record",
        ),
    ],
)
def test_damage_is_one_sentence(damage, message):
    embed("test_vit", DATA, out=FILE, setup=SETUP)
    damage()
    with pytest.raises(InputError, match=message):
        knn(str(FILE), setup=Setup(device="cpu", out=Path("o")))


def test_a_parquet_file_of_images_is_a_source_of_images(tmp_path):
    images = []
    for pixels in np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8):
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        images.append({"bytes": content.getvalue()})
    table = pyarrow.table({"image": images, "label": [n // 10 for n in range(20)]})
    for name in ("train", "val"):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    setup = Setup(device="cpu", workers=0, out=tmp_path / "out")
    splits = (tmp_path / f"{name}.parquet" for name in ("train", "val"))
    record = knn("pixels:8", *splits, protocol=KNNProtocol(k=(1,)), setup=setup)
    assert record["results"]["top1_k1"] == 100
