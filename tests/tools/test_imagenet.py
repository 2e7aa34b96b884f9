"""The official files of ImageNet become a cache, an archive or a folder with the same images.

They are made here in the layout of ILSVRC-2012: three classes, whose numbers are in another order
than their names, and a group of classes.
"""

import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from ldae.commands.cache import cache
from ldae.commands.knn import knn
from ldae.commands.pretrain import pretrain
from ldae.data.cache_file import CacheFile, open_cache
from ldae.data.open import open_splits
from ldae.evals.evaluation import Setup
from ldae.evals.neighbours import KNNProtocol
from ldae.runs.checkpoints import Checkpoints

TOOL = Path(__file__).parents[2] / "tools" / "imagenet.py"
_spec = importlib.util.spec_from_file_location("imagenet", TOOL)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)

SYNSETS = [  # number, name, number of classes below it
    (1, "n02000000", 0),
    (2, "n03000000", 0),
    (3, "n01000000", 0),
    (4, "n00000009", 3),
]
TRUTH = [2, 3, 1, 1, 3, 2]
OUTS = ["imagenet.safetensors", "imagenet.tar", "imagenet"]
HOW = ["--side", "16", "--workers", "0"]


def jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*rng.integers(16, 40, 2), 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def tar_of(contents: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for number, (name, content) in enumerate(contents.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1_300_000_000 + number
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def devkit(synsets=SYNSETS, truth=TRUTH) -> bytes:
    fields = ["ILSVRC2012_ID", "WNID", "num_children"]
    table = np.array(synsets, dtype=[(field, object) for field in fields])
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": table[:, None]})
    contents = {
        "meta.mat": meta.getvalue(),
        "ILSVRC2012_validation_ground_truth.txt": "".join(f"{n}\n" for n in truth).encode(),
    }
    folder = "ILSVRC2012_devkit_t12/data/"
    return tar_of({folder + name: content for name, content in contents.items()}, "w:gz")


def class_tar(name: str, count: int = 4) -> bytes:
    seed = int(name[1:3])
    return tar_of({f"{name}_{n}.JPEG": jpeg(100 * seed + n) for n in range(count)})


def train_tar(**changed: bytes) -> bytes:
    names = [name for _, name, below in SYNSETS if not below]
    return tar_of({f"{name}.tar": changed.get(name, class_tar(name)) for name in names})


def val_tar(count: int = len(TRUTH)) -> bytes:
    return tar_of({f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(n) for n in range(1, count + 1)})


@pytest.fixture
def downloads(tmp_path) -> Path:
    folder = tmp_path / "downloads"
    folder.mkdir()
    (folder / tool.TRAIN).write_bytes(train_tar())
    (folder / tool.VAL).write_bytes(val_tar())
    (folder / tool.DEVKIT).write_bytes(devkit())
    return folder


def prepare(downloads: Path, out: Path) -> int:
    return tool.main([str(downloads), str(out), *HOW])


def contents(path: Path) -> dict[str, bytes]:
    """Return the files of a folder or an archive by name."""
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(path)): file.read_bytes() for file in found}
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def test_the_images_are_those_of_the_official_files(downloads, tmp_path, capsys):
    names = {number: name for number, name, _ in SYNSETS}
    expected = {
        f"val/{names[label]}/ILSVRC2012_val_{n:08d}.JPEG": jpeg(n)
        for n, label in enumerate(TRUTH, start=1)
    } | {
        f"train/{name}/{name}_{n}.JPEG": jpeg(100 * int(name[1:3]) + n)
        for name in ("n01000000", "n02000000", "n03000000")
        for n in range(4)
    }
    for out in ("imagenet.tar", "imagenet"):
        assert prepare(downloads, tmp_path / out) == 0
        assert contents(tmp_path / out) == expected
    assert "and the official file 147,897,477,120: its MD5 sum is not" in capsys.readouterr().out


def test_the_three_are_the_same_source(downloads, tmp_path):
    """The cache has the crops that `ldae cache` writes from the folder, byte for byte."""
    for out in OUTS:
        prepare(downloads, tmp_path / out)
    cache(str(tmp_path / "imagenet"), tmp_path / "folder.safetensors", side=16, workers=0)
    ours, theirs = (open_cache(tmp_path / f"{name}.safetensors") for name in ("imagenet", "folder"))
    for split in ("train", "eval"):
        for name, array in ours.arrays[split].items():
            assert np.array_equal(array, theirs.arrays[split][name]), (split, name)
    sources = [open_splits(str(tmp_path / out), None) for out in OUTS]
    for train, evaluation in sources:
        assert train.classes == evaluation.classes == ["n01000000", "n02000000", "n03000000"]
        assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert evaluation.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert sources[0][0].fingerprint() == sources[1][0].fingerprint()


def test_a_run_and_a_grading_take_the_cache(downloads, tmp_path, tiny):
    out = tmp_path / "imagenet.safetensors"
    assert tool.main([str(downloads), str(out), "--side", "32", "--workers", "0"]) == 0
    run = tmp_path / "run"
    pretrain(tiny(data__source=str(out), tokenizer__fit_images=12), run, "l_dae")
    assert Checkpoints(run).load()["images_seen"] == 16  # two steps, of more than twelve images
    record = knn(
        str(run),
        str(out),
        protocol=KNNProtocol(k=(1,)),
        setup=Setup(device="cpu", workers=0, out=tmp_path / "knn"),
    )
    assert record["data"]["fingerprint"] == open_cache(out).splits["train"]["fingerprint"]


KILLED = """
import importlib.util, os, signal, sys
from ldae.data.cache_file import CacheFile
spec = importlib.util.spec_from_file_location("imagenet", sys.argv.pop(1))
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
count, limit = 0, int(sys.argv.pop(1))

def counted(original):
    def call(*args):
        global count
        count += 1
        if count > limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    return call

tool.OfficialFiles.content = counted(tool.OfficialFiles.content)
CacheFile.write_block = counted(CacheFile.write_block)
tool.main()
"""


@pytest.mark.parametrize("out, limit", [(OUTS[0], 1), (OUTS[1], 10), (OUTS[2], 10)])
def test_a_killed_start_is_resumed(out, limit, downloads, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole" / out, tmp_path / "parts" / out
    prepare(downloads, whole)
    argv = [sys.executable, "-c", KILLED, TOOL, str(limit), downloads, parts, *HOW]
    done = subprocess.run(argv, capture_output=True)
    assert done.returncode == -signal.SIGKILL and not parts.exists()
    written = []
    for kind, name in ((tool.OfficialFiles, "content"), (CacheFile, "write_block")):
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *a, o=original: [written.append(a[1:]), o(*a)][1])
    assert prepare(downloads, parts) == 0
    # One of two blocks, all images but those of the first class, and all but ten.
    assert len(written) == {".safetensors": 1, ".tar": 14, "": 8}[parts.suffix]
    if parts.is_dir():
        assert contents(parts) == contents(whole)
    else:
        assert parts.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in parts.parent.iterdir()) == [out]
    assert prepare(downloads, parts) == 0
    assert "done before" in capsys.readouterr().out


@pytest.mark.parametrize("length", range(0, 40_000, 512 * 7 + 100))
def test_an_archive_goes_on_from_any_length(length, downloads, tmp_path):
    whole, parts = tmp_path / "whole.tar", tmp_path / "parts.tar"
    prepare(downloads, whole)
    content = whole.read_bytes()[:length]
    parts.with_name("parts.tar.partial").write_bytes(content[:-600] + b"x" * len(content[-600:]))
    assert prepare(downloads, parts) == 0
    assert parts.read_bytes() == whole.read_bytes()


def refuse(downloads: Path, out: Path, capsys, *sentences: str) -> None:
    assert prepare(downloads, out) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("ldae: "))
    assert all(sentence in line for sentence in sentences), line
    assert not out.exists()


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        (tool.TRAIN, None, "No such file"),
        (tool.TRAIN, b"", "is not a readable tar archive"),
        (tool.TRAIN, train_tar()[:9000], "is not a readable tar archive: unexpected end of data"),
        (tool.TRAIN, tar_of({"n01000000.tar": class_tar("n01000000")}), "lacks n02000000.tar"),
        (tool.TRAIN, train_tar(n01000000=tar_of({"../1.JPEG": b""})), "'../1.JPEG' follows n0100"),
        (tool.TRAIN, train_tar(n01000000=class_tar("n02000000")), "'n02000000_0.JPEG' follows n01"),
        (tool.TRAIN, train_tar(n02000000=class_tar("n02000000")[:-10240]), "n02000000.tar"),
        (tool.TRAIN, train_tar().replace(b"0_1.JPEG\0", b"0_1.JPEG\1"), "the header at byte"),
        (tool.VAL, None, "No such file"),
        (tool.VAL, val_tar(5), "lacks ILSVRC2012_val_00000006.JPEG"),
        (tool.VAL, val_tar(7), "contains ILSVRC2012_val_00000007.JPEG"),
        (tool.DEVKIT, None, "cannot be read: No such file"),
        (tool.DEVKIT, devkit()[:200], "is damaged or no devkit"),
        (tool.DEVKIT, b"no archive", "is damaged or no devkit: not a gzip file"),
        (tool.DEVKIT, tar_of({"a": b""}, "w:gz"), "meta.mat"),
        (tool.DEVKIT, devkit(truth=[5]), "is damaged or no devkit: there is no 5"),
        (tool.DEVKIT, devkit([(1, "../out", 0), *SYNSETS[1:]]), "'../out' is no WordNet id"),
    ],
    ids=lambda part: part if isinstance(part, str) else "content",  # gzip's content has the time
)
def test_a_wrong_file_is_named(name, content, sentence, downloads, tmp_path, capsys):
    (downloads / name).unlink()
    if content is not None:
        (downloads / name).write_bytes(content)
    refuse(downloads, tmp_path / "out", capsys, name, sentence)
    assert {path.name for path in tmp_path.iterdir()} == {"downloads"}


def test_a_damaged_file_of_the_official_size_is_found_by_its_md5(
    downloads, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(tool.OFFICIAL, tool.VAL, (len(val_tar()), "0" * 32))
    refuse(downloads, tmp_path / "out.tar", capsys, f"{tool.VAL} is damaged: its MD5 sum is ")


def test_a_full_disk_is_found_before_anything_is_written(downloads, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    for out in OUTS:
        refuse(downloads, tmp_path / out, capsys, f"{out} needs ", "its disk has 0 MB left")
    assert {path.name for path in tmp_path.iterdir()} == {"downloads"}


def test_something_else_at_the_place_is_kept(downloads, tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(b"mine" * 20_000)
    (tmp_path / "b.tar.partial").write_bytes(b"mine" * 20_000)
    (tmp_path / "folder").mkdir()
    for out, sentence in (
        ("a.tar", "a.tar is another file"),
        ("b.tar", "b.tar.partial was begun with other images"),
        ("folder", "folder lacks val/n03000000/ILSVRC2012_val_00000001.JPEG"),
        ("a.zip", "must end in .safetensors or .tar"),
    ):
        assert prepare(downloads, tmp_path / out) == 2
        assert sentence in capsys.readouterr().err
    assert (tmp_path / "a.tar").read_bytes() == b"mine" * 20_000
    assert (tmp_path / "b.tar.partial").read_bytes() == b"mine" * 20_000
    assert os.listdir(tmp_path / "folder") == []
