"""The file has the rows of k-NN bit for bit, survives kills, and grades as the backbone does."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldae.backbones.open import load_backbone
from ldae.commands import embed as embed_module
from ldae.commands.embed import embed
from ldae.commands.evaluate import evaluate
from ldae.commands.knn import knn
from ldae.commands.linear import CachedProtocol, MAEProtocol, linear
from ldae.commands.logreg import LogregProtocol, logreg
from ldae.commands.retrieve import RetrievalProtocol, retrieve
from ldae.data.open import open_all, open_source
from ldae.distributed import process_group, rank, world_size
from ldae.errors import InputError
from ldae.evals.embedded_file import open_embedded
from ldae.evals.embedding import Rows
from ldae.evals.evaluation import EncoderSetup, Setup
from ldae.evals.features import Encoder, encode_share, extract_share
from ldae.evals.neighbours import KNNProtocol
from ldae.evals.taps import Tap, TapReader, TokenMapReader
from ldae.evals.whitening import WhiteningProtocol, whitening_of
from ldae.files import state_hash
from ldae.train.interrupt import Interrupted

CPU = torch.device("cpu")
SETUP = EncoderSetup(random_init=True, img_size=16, workers=0, device="cpu", batch_size=32)
DATA = "scattered-digits:70"


@pytest.fixture(autouse=True)
def few_images(monkeypatch, tmp_path):
    """Seventy images to learn from and fifty to grade on; results go below a temporary folder."""
    monkeypatch.setattr("ldae.data.digits._EVAL_IMAGES", 50)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def vit():
    return load_backbone("test_vit", random_init=True, img_size=16)


def contents(out: Path) -> dict[str, bytes]:
    """Return the bytes of all files that have the stem of ``out``."""
    files = filter(Path.is_file, out.parent.glob(f"{out.stem}.*"))
    return {path.suffix: path.read_bytes() for path in files}


@pytest.mark.parametrize("batch_size", [1, 7, 32, 256])
def test_rows_are_those_of_the_graders_bit_for_bit(vit, batch_size):
    setup = replace(SETUP, batch_size=batch_size)
    out = embed("test_vit", DATA, out=Path("a.npy"), setup=setup)
    rows, first = np.load(out, mmap_mode="r"), 0
    for source in open_all(DATA).values():
        wanted = extract_share(Encoder(vit, CPU, batch_size=batch_size), source).features.numpy()
        assert rows[first : first + len(source)].tobytes() == wanted.tobytes()
        first += len(source)
    assert first == len(rows) and rows.dtype == np.float32


def test_the_table_has_name_split_label_and_class_of_each_row():
    embed(
        "pixels:4", DATA, out=Path("a.npy"), setup=replace(SETUP, random_init=False, img_size=None)
    )
    with open("a.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for source in open_all(DATA).values():
        for i in range(len(source)):
            label = source.labels[i]
            name, split = source.name(i), source.split
            wanted = {"name": name, "split": split, "label": str(label), "class": str(label)}
            assert lines.pop(0) == wanted
    assert not lines


def test_labels_count_the_classes_of_all_splits(tmp_path):
    """The evaluation split has a class that train lacks."""
    source = open_source("digits", "train")
    for i, place in enumerate(("train/b", "train/d", "val/d", "val/a")):
        (tmp_path / "data" / place).mkdir(parents=True)
        source.image(i).save(tmp_path / "data" / place / f"{i},\n.png")
    embed("pixels:4", str(tmp_path / "data"), out=Path("a.npy"), setup=EncoderSetup(workers=0))
    with open("a.csv", newline="") as file:
        lines = [tuple(line.values()) for line in csv.DictReader(file)]
    assert [line[1:] for line in lines] == [
        ("train", "0", "b"), ("train", "1", "d"), ("eval", "2", "a"), ("eval", "1", "d"),
    ]  # fmt: skip
    assert lines[0][0].endswith("0,\n.png")
    with pytest.raises(InputError, match="class 'a' of a.npy .eval. is not among the classes"):
        knn("a.npy")


def test_the_record_names_weights_and_images(vit):
    embed("test_vit", DATA, out=Path("a.npy"), split="train", setup=SETUP)
    record = json.loads(Path("a.json").read_text())
    assert record["backbone"]["sha256"] == state_hash(vit.state_dict())
    source = open_source(DATA, "train")
    (held,) = record["data"]["splits"].values()
    assert held["fingerprint"] == source.fingerprint() and held["images"] == 70
    assert record["extraction"] == {
        "precision": "fp32", "batch_size": 32, "ranks": 1, "device": "cpu"
    }  # fmt: skip


def test_two_ranks_write_the_rows_of_two_ranks(vit, on_ranks, monkeypatch):
    """Also the sign of a zero, and where a rank has no image in the last batch."""

    class Signed(torch.nn.Module):
        pretrained_cfg = vit.pretrained_cfg

        def forward(self, images):
            return -vit(images).relu()

    monkeypatch.setattr("ldae.commands.embed.open_backbone", lambda *_: Signed())
    monkeypatch.setattr("ldae.evals.embedding._BYTES_AT_ONCE", 4 * 64 * 6)  # several pieces
    setup = replace(SETUP, batch_size=3)

    def both() -> None:
        with process_group(CPU):
            embed("test_vit", "scattered-digits:61", out=Path("a.npy"), split="train", setup=setup)
            rows = np.load("a.npy")
            share = encode_share(
                Encoder(Signed(), CPU, batch_size=3), open_source("scattered-digits:61", "train")
            )
            assert rows[rank() :: world_size()].tobytes() == share.numpy().tobytes()
            assert np.signbit(rows[rows == 0]).all() and (rows == 0).any()

    assert on_ranks(both) == ["", ""]


def stops_after(monkeypatch, blocks: int) -> None:
    """Send Ctrl-C while block number ``blocks`` is written; 0 is the first."""
    original = Rows.append

    def append(self, pieces):
        if len(self.checksums) == blocks:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, pieces)

    monkeypatch.setattr(Rows, "append", append)


WAYS = [{}, {"tokens": True}, {"whiten": True}, {"blocks": (0, -1), "pools": ("cls+avg",)}]


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("stops", [(0,), (3,), (0, 2)])
def test_ctrl_c_saves_and_the_same_command_ends_with_the_same_bytes(options, stops, monkeypatch):
    how = {"setup": SETUP, **options}
    embed("test_vit", DATA, out=Path("whole/a.npy"), **how)
    for blocks in stops:
        with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
            stops_after(patch, blocks)
            embed("test_vit", DATA, out=Path("parts/a.npy"), **how)
    assert "all progress is saved, and the same command resumes" in str(stopped.value)
    assert stopped.value.exit_status == 128 + signal.SIGINT
    written, original = [], Rows.append
    monkeypatch.setattr(Rows, "append", lambda *args: written.append(original(*args)))
    embed("test_vit", DATA, out=Path("parts/a.npy"), **how)
    assert len(written) == 5 - (blocks + 1)  # three blocks of train and two of eval
    assert contents(Path("parts/a.npy")) == contents(Path("whole/a.npy"))
    assert sorted(path.name for path in Path("parts").iterdir()) == ["a.csv", "a.json", "a.npy"]


def test_a_signal_to_one_rank_stops_all_and_costs_nothing(on_ranks, monkeypatch):
    setup = replace(SETUP, batch_size=8)

    def both(out: str) -> None:
        with process_group(CPU):
            embed("test_vit", DATA, out=Path(out), setup=setup)

    def stopped() -> None:
        shares = embed_module._shares

        def interrupted(*args):
            for number, rows in enumerate(shares(*args)):
                if number == 1 and rank() == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield rows

        monkeypatch.setattr(embed_module, "_shares", interrupted)
        both("parts/a.npy")

    for error in on_ranks(stopped):
        assert error.startswith("Interrupted: stopped at image 32 of 120; all progress is saved")
    assert not Path("parts/a.npy").exists()
    for out in ("parts/a.npy", "whole/a.npy"):
        assert on_ranks(lambda out=out: both(out)) == ["", ""]
    assert contents(Path("parts/a.npy")) == contents(Path("whole/a.npy"))


KILLED = """
import os, signal, sys
from ldae import cli
from ldae.data import digits
from ldae.evals.embedding import Rows
digits._EVAL_IMAGES, original = 50, Rows._write

def write(self, content, offset):
    if len(self.checksums) == 2 and offset:
        original(self, content[: len(content) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, content, offset)

Rows._write = write
cli.main(sys.argv[1:])
"""


def test_a_killed_command_resumes_and_ends_with_the_same_bytes():
    """It is killed while half of a block is written."""
    options = ["--random-init", "--img-size", "16", "--workers", "1", "--device", "cpu"]
    argv = ["embed", "test_vit", DATA, "--out", "parts/a.npy", *options, "--batch-size", "32"]
    # Without pipes, which the workers would hold open for some seconds.
    done = subprocess.run([sys.executable, "-c", KILLED, *argv], stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL and not Path("parts/a.npy").exists()
    for out in ("parts/a.npy", "whole/a.npy"):
        embed("test_vit", DATA, out=Path(out), setup=SETUP)
    assert contents(Path("parts/a.npy")) == contents(Path("whole/a.npy"))


@pytest.mark.parametrize("damage", ["rows", "log", "no log"])
def test_what_the_disk_has_lost_is_written_again(damage, monkeypatch):
    embed("test_vit", DATA, out=Path("whole/a.npy"), setup=SETUP)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stops_after(patch, 3)
        embed("test_vit", DATA, out=Path("parts/a.npy"), setup=SETUP)
    rows, log = (Path("parts/a.npy.parts", name) for name in ("rows.partial", "progress.jsonl"))
    if damage == "rows":
        content = bytearray(rows.read_bytes())
        content[128 + 4 * 64 * 40] ^= 1  # in the second block
        rows.write_bytes(content)
    else:
        log.write_bytes(log.read_bytes()[:-4] + b"\0\n" if damage == "log" else b"")
    embed("test_vit", DATA, out=Path("parts/a.npy"), setup=SETUP)
    assert contents(Path("parts/a.npy")) == contents(Path("whole/a.npy"))


def test_a_kill_before_the_folder_of_the_parts_is_removed_costs_nothing(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ldae.evals.embedding.shutil.rmtree", stop)
        embed("test_vit", DATA, out=Path("a.npy"), setup=SETUP)
    before = contents(Path("a.npy"))
    assert Path("a.npy.parts").exists()
    embed("test_vit", DATA, out=Path("a.npy"), setup=SETUP)
    assert "a.npy: done before" in capsys.readouterr().out
    assert not Path("a.npy.parts").exists() and contents(Path("a.npy")) == before


def test_a_full_disk_is_one_sentence_and_loses_nothing(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InputError, match="a.npy needs .* more"):
        patch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
        embed("test_vit", DATA, out=Path("a.npy"), setup=SETUP)
    original = Rows._write

    def write(self, content, offset):
        if len(self.checksums) == 2 and offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, content, offset)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="a.npy cannot be written"):
        patch.setattr(Rows, "_write", write)
        embed("test_vit", DATA, out=Path("a.npy"), setup=SETUP)
    embed("test_vit", DATA, out=Path("a.npy"), setup=SETUP)
    embed("test_vit", DATA, out=Path("b.npy"), setup=SETUP)
    assert Path("a.npy").read_bytes() == Path("b.npy").read_bytes()


def test_token_maps_are_those_of_the_last_block(vit):
    embed("test_vit", DATA, out=Path("a.npy"), tokens=True, setup=replace(SETUP, img_size=32))
    vit = load_backbone("test_vit", random_init=True, img_size=32)
    reader = TokenMapReader(vit, 4)
    encoder = Encoder(vit, CPU, reader=reader, batch_size=32)
    wanted = encode_share(encoder, open_source(DATA, "train"))
    found = np.load("a.npy")
    assert found.shape == (120, 2, 2, 64)
    assert found[:70].tobytes() == wanted.numpy().tobytes()
    with pytest.raises(InputError, match="a.npy holds token maps of 2 x 2 x 64, not a vector"):
        knn("a.npy")


def test_blocks_come_side_by_side(vit):
    taps = tuple(Tap(block, pool) for block in (0, -1) for pool in ("avg", "cls"))
    embed(
        "test_vit", DATA, out=Path("a.npy"), blocks=(0, -1), pools=("avg", "cls"), setup=SETUP
    )  # fmt: skip
    encoder = Encoder(vit, CPU, reader=TapReader(vit, taps), batch_size=32)
    wanted = extract_share(encoder, open_source(DATA, "train"))
    assert np.load("a.npy")[:70].tobytes() == wanted.features.numpy().tobytes()
    held = json.loads(Path("a.json").read_text())["features"]
    assert [(part["block"], part["pool"], part["columns"]) for part in held["taps"]] == [
        (tap.block % held["depth"], tap.pool, [columns.start, columns.stop])
        for tap, columns in wanted.columns.items()
    ]


def test_whitened_rows_are_whitened_by_the_train_split(vit):
    embed("test_vit", DATA, out=Path("a.npy"), whiten=True, whiten_shrinkage=0.1, setup=SETUP)
    encoder = Encoder(vit, CPU, batch_size=32)
    train, test = (extract_share(encoder, source) for source in open_all(DATA).values())
    layer = whitening_of(train, WhiteningProtocol(True, 0.1), CPU)
    wanted = torch.cat([layer(part.features) for part in (train, test)])
    torch.testing.assert_close(torch.from_numpy(np.load("a.npy")), wanted)
    record = json.loads(Path("a.json").read_text())["features"]["whitening"]
    assert (record["split"], record["images"], record["shrinkage"]) == ("train", 70, 0.1)


GRADERS = [
    (knn, KNNProtocol(k=(1, 5), shots=(2,), draws=2)),
    (knn, KNNProtocol(k=(5,), leave_one_out=True)),
    (knn, KNNProtocol(k=(5,), whiten=True, whiten_shrinkage=0.1)),
    (linear, CachedProtocol(epochs=2, total_batch=32, learning_rates=(0.1, 1.0))),
    (linear, CachedProtocol(epochs=2, total_batch=32, blocks=(0, -1), learning_rates=(1.0,))),
    (logreg, LogregProtocol(C=(0.1, 1.0))),
    (retrieve, RetrievalProtocol()),
]


@pytest.mark.parametrize(("grader", "protocol"), GRADERS)
def test_a_file_is_graded_as_its_backbone(grader, protocol, vit):
    """Alone, beside its images, and split into two files."""
    own = Setup(**vars(SETUP), out=Path("own"))
    grader("test_vit", DATA, protocol=protocol, setup=own)
    wanted = json.loads(Path("own/results.json").read_text())
    blocks = getattr(protocol, "blocks", ())
    for out, split in (("a.npy", None), ("train.npy", "train"), ("eval.npy", "eval")):
        embed("test_vit", DATA, out=Path(out), split=split, blocks=blocks, setup=SETUP)
    ways = [("a.npy",), ("a.npy", DATA)]
    if not getattr(protocol, "leave_one_out", False):
        ways += [("train.npy", None, "eval.npy"), ("a.npy", "train.npy", "eval.npy")]
    for way in ways:
        grader(*way, protocol=protocol, setup=Setup(device="cpu", out=Path("file")))
        found = json.loads(Path("file/results.json").read_text())
        assert found["results"] == wanted["results"]
        assert found["protocol"] == wanted["protocol"]
        origin = found["backbone"].pop("embedded")
        assert found["backbone"] == wanted["backbone"] and origin["file"] == way[0]
        for name in ("fingerprint", "eval_fingerprint", "train_images", "classes"):
            assert found["data"][name] == wanted["data"][name]


def test_two_ranks_grade_a_file_as_one(on_ranks):
    embed("test_vit", DATA, out=Path("a.npy"), setup=replace(SETUP, batch_size=7))
    how = {"protocol": KNNProtocol(k=(5,), shots=(2,)), "setup": Setup(device="cpu", out=Path("o"))}
    wanted = knn("a.npy", **how)["results"]

    def grade() -> None:
        assert knn("a.npy", **how)["results"] == wanted

    assert on_ranks(grade) == ["", ""]


def test_a_suite_takes_files(tmp_path):
    embed("test_vit", DATA, out=Path("a.npy"), setup=SETUP)
    suite = tmp_path / "suite.toml"
    suite.write_text(f"[data.d]\ntrain='{DATA}'\n[data.f]\ntrain='a.npy'\n[protocols.knn]\nk=[5]")
    table = evaluate(("a.npy",), suite=suite, setup=Setup(device="cpu", out=tmp_path / "out"))
    one, two = table["cells"]
    assert one["results"] == two["results"]


def test_features_without_labels_are_embedded_and_not_graded(tmp_path):
    source = open_source(DATA, "train")
    (tmp_path / "flat").mkdir()
    for i in range(20):
        source.image(i).save(tmp_path / "flat" / f"{i}.png")
    embed("test_vit", str(tmp_path / "flat"), out=Path("a.npy"), setup=SETUP)
    assert open_embedded(Path("a.npy")).table.names[0] == "0.png"
    assert Path("a.csv").read_text().splitlines()[1] == "0.png,all,,"
    with pytest.raises(InputError, match=r"a.npy \(all\) has no labels"):
        knn("a.npy", "a.npy", "a.npy")


def changed(**changes) -> EncoderSetup:
    return replace(SETUP, **changes)


@pytest.mark.parametrize(
    ("backbone", "data", "options", "message"),
    [
        ("test_vit", "scattered-digits:71", {}, r"data\.spec is scattered-digits:70 there"),
        ("test_vit", DATA, {"split": "train"}, r"data\.splits\.eval is .* there, None here"),
        ("test_vit", DATA, {"setup": changed(seed=1)}, r"backbone\.seed is 0 there, 1 here"),
        ("test_vit2", DATA, {}, r"backbone\.spec is test_vit there, test_vit2 here"),
        ("test_vit", DATA, {"setup": changed(batch_size=31)}, r"extraction\.batch_size is 32"),
        ("test_vit", DATA, {"blocks": (0,)}, r"features\.taps is "),
        ("test_vit", DATA, {"tokens": True}, r"features\.shape is \[64\] there, \[1, 1, 64\] here"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_other_features_are_refused_by_what_differs(
    backbone, data, options, message, is_finished, monkeypatch
):
    with monkeypatch.context() as patch:
        if not is_finished:
            stops_after(patch, 1)
        try:
            embed("test_vit", DATA, out=Path("a.npy"), setup=SETUP)
        except Interrupted:
            assert not is_finished
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"a.npy.* other features: {message}.* name another file"):
        embed(backbone, data, out=Path("a.npy"), **{"setup": SETUP} | options)
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("backbone", "out", "options", "message"),
    [
        ("test_vit", "a.npz", {}, "--out a.npz must end in .npy or .parquet"),
        ("test_vit", "text/a.npy", {}, "text cannot be written: .* is not a writable folder"),
        ("test_vit", "text.npy", {}, "text.json exists and would be overwritten"),
        ("text.npy", "a.npy", {}, "text.npy holds features already"),
        ("pixels:6", "a.npy", {"tokens": True}, "pixels:6 cannot be cut"),
        ("test_vit", "a.npy", {"tokens": True, "whiten": True}, "--tokens are those of the last"),
        ("test_vit", "a.npy", {"blocks": (9,)}, "test_vit has blocks 0 to 5"),
        ("test_vit", "a.npy", {"whiten_shrinkage": 0.5}, "--whiten-shrinkage needs --whiten"),
        ("test_vit", "a.npy", {"whiten": True, "whiten_shrinkage": 0.0}, "vary in"),
    ],
)
def test_wrong_requests_are_refused(backbone, out, options, message):
    Path("text").touch()
    Path("text.json").touch()
    if backbone.startswith("pixels"):
        options = options | {"setup": EncoderSetup(workers=0)}
    with pytest.raises(InputError, match=message):
        embed(backbone, "scattered-digits:30", out=Path(out), **{"setup": SETUP} | options)
    assert not Path(out).exists()


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_file_among_the_images_is_refused(suffix, monkeypatch):
    """The features would be an image themselves when the same command resumes."""
    Path("images").mkdir()
    Image.new("RGB", (20, 20)).save("images/1.png")
    monkeypatch.chdir("images")
    with pytest.raises(InputError, match=f"^--out a{suffix} lies among the images .: name a place"):
        embed("test_vit", ".", out=Path(f"a{suffix}"), setup=SETUP)
    assert [path.name for path in Path().iterdir()] == ["1.png"]


def test_after_a_shrinkage_too_small_the_rows_are_not_lost(monkeypatch):
    """They go on with another one."""
    with pytest.raises(InputError, match="vary in .* of 64 dimensions"):
        embed(
            "test_vit",
            "scattered-digits:30",
            out=Path("a.npy"),
            whiten=True,
            whiten_shrinkage=0.0,
            setup=SETUP,
        )
    monkeypatch.setattr(Rows, "append", None)
    embed("test_vit", "scattered-digits:30", out=Path("a.npy"), whiten=True, setup=SETUP)


def test_a_file_of_an_older_ldae_may_say_less(capsys):
    out = Path("a.npy")
    embed("test_vit", DATA, out=out, setup=SETUP)
    record = json.loads(out.with_suffix(".json").read_text())
    del record["backbone"]["global_pool"]
    out.with_suffix(".json").write_text(json.dumps(record))
    embed("test_vit", DATA, out=out, setup=SETUP)
    assert "a.npy: done before" in capsys.readouterr().out


def test_a_file_in_use_is_refused(monkeypatch):
    monkeypatch.setattr("ldae.runs.lock.try_lock", lambda fd: False)
    with pytest.raises(InputError, match="is being written by another process"):
        embed("test_vit", DATA, out=Path("a.npy"), setup=SETUP)


def test_graders_refuse_files_that_do_not_match(vit):
    embed("test_vit", DATA, out=Path("a.npy"), setup=SETUP)
    embed("test_vit", DATA, out=Path("seed.npy"), setup=changed(seed=1))
    embed("test_vit", DATA, out=Path("white.npy"), whiten=True, setup=SETUP)
    for grade, message in (
        (lambda: knn("a.npy", "scattered-digits:71"), "a.npy holds features of other images than"),
        (lambda: knn("a.npy", None, "seed.npy"), "seed.npy holds other features than a.npy: seed"),
        (lambda: knn("a.npy", None, "white.npy"), "white.npy holds other .*: whitening is"),
        (lambda: knn("pixels", "a.npy"), "a.npy holds features, not images: name it in the place"),
        (lambda: knn("pixels"), "no images: name their source with --data SOURCE"),
        (lambda: knn("b.npy"), "there is no file b.npy"),
        (lambda: knn("a.npy", setup=Setup(precision="bf16")), "--precision is a setting of"),
        (lambda: knn("a.npy", setup=Setup(random_init=True)), "--random-init is a setting of"),
        (lambda: linear("a.npy", protocol=CachedProtocol(blocks=(1,))), "no features of block 1"),
        (lambda: linear("a.npy", protocol=MAEProtocol()), "holds features, and linear-mae needs"),
        (lambda: linear("a.npy", save=Path("saved")), "save needs a backbone that is a timm model"),
        (lambda: load_backbone("a.npy"), "a.npy holds no backbone"),
    ):
        with pytest.raises(InputError, match=message):
            grade()


def flip(path: str, place: int) -> None:
    content = bytearray(Path(path).read_bytes())
    content[place] ^= 1
    Path(path).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: flip("a.npy", -1), "a.npy is damaged .* rows 102 to 119"),
        (lambda: os.truncate("a.npy", 9000), "a.npy is truncated, damaged or another file"),
        (lambda: Path("a.npy").write_bytes(b""), "a.npy is truncated, damaged or another file"),
        (
            lambda: np.save("a.npy", np.zeros((120, 63), np.float32)),
            "truncated, damaged or another",
        ),
        (lambda: np.save("a.npy", np.array([{}])), "a.npy is truncated, damaged or another file"),
        (lambda: flip("a.csv", -9), "a.csv has changed since it was written"),
        (lambda: os.remove("a.csv"), "a.csv cannot be read"),
        (lambda: os.remove("a.json"), "a.npy is no file of `ldae embed`: there is no a.json"),
        (lambda: os.truncate("a.json", 300), "a.npy is no file of `ldae embed`: a.json has no rec"),
        (lambda: Path("a.json").write_text('{"format": "ldae embed"}'), "a.npy is of version None"),
        (
            lambda: Path("a.json").write_text(
                re.sub(r'"checksums": \[\s*\d+,', '"checksums": [', Path("a.json").read_text())
            ),
            "the record of a.npy is damaged",
        ),
        (
            lambda: Path("a.json").write_text('{"format": "ldae embed", "version": 1}'),
            "the record of a.npy is damaged",
        ),
    ],
)
def test_damage_is_one_sentence(damage, message):
    embed("test_vit", DATA, out=Path("a.npy"), setup=SETUP)
    damage()
    with pytest.raises(InputError, match=message):
        knn("a.npy", protocol=KNNProtocol(k=(1,)), setup=Setup(device="cpu", out=Path("o")))


def test_a_missing_pyarrow_is_named_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"a.parquet needs .* pip install 'ldae\[parquet\]'"):
        embed("no-such-backbone", DATA, out=Path("a.parquet"))
