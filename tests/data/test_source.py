"""The fingerprint of a source changes with its images, and with nothing else."""

import os
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from ldae.data import containers
from ldae.data.label_maps import open_map_splits
from ldae.data.open import open_source, open_splits

FILES = ["train/cat/1.png", "train/cat/2.png", "train/dog/3.png", "val/cat/4.png"]


def fingerprint(path) -> str:
    return open_source(str(path), "train").fingerprint()


def overwrite(path) -> None:
    """Write other bytes of the same length, at another time."""
    status = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 2 * 10**9))


CHANGES = {
    "added": lambda train: shutil.copy2(train / "cat/1.png", train / "cat/5.png"),
    "removed": lambda train: (train / "cat/1.png").unlink(),
    "renamed": lambda train: (train / "cat/1.png").rename(train / "cat/0.png"),
    "moved": lambda train: (train / "cat/1.png").rename(train / "dog/1.png"),
    "longer": lambda train: (train / "cat/1.png").write_bytes(b"longer" * 100),
    "replaced": lambda train: overwrite(train / "cat/1.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_image_changes_the_fingerprint(change, make_tree, pack):
    root = make_tree("tree", FILES)
    before = fingerprint(pack(root))
    CHANGES[change](root / "train")
    assert fingerprint(pack(root)) != before


def test_it_does_not_depend_on_the_place_or_on_other_files(make_tree, pack, tmp_path):
    """Files of another split, or that are no images, do not count."""
    root = make_tree("tree", FILES)
    path = pack(root)
    source = open_source(str(path), "train")
    before = source.fingerprint()
    assert len(before) == 64 and int(before, 16)
    assert pickle.loads(pickle.dumps(source)).fingerprint() == before
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / f"copy{path.suffix}"
    (shutil.copytree if path.is_dir() else shutil.copy2)(path, copy)
    code = (
        "from ldae.data.open import open_source; "
        f"print(open_source({str(copy)!r}, 'train').fingerprint())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == before
    (root / "train/cat/notes.txt").write_text("none of the images")
    (root / "val/cat/5.png").write_bytes(b"of another split")
    assert fingerprint(pack(root)) == before


def test_many_files_are_not_examined_one_by_one(make_tree, monkeypatch):
    """Then the times of their folders show what is added, removed or renamed over another."""
    root, other = make_tree("tree", FILES), make_tree("other", ["new.png"])
    monkeypatch.setattr(containers, "_MAX_EXAMINED", 2)
    before = fingerprint(root)
    (root / "train/cat/1.png").write_bytes(b"in place")
    assert fingerprint(root) == before
    time.sleep(0.02)  # file systems count the time in ticks
    os.replace(other / "new.png", root / "train/cat/1.png")
    assert fingerprint(root) != before


def test_a_broken_link_has_a_fingerprint(make_tree):
    root = make_tree("tree", FILES)
    before = fingerprint(root)
    (root / "train/dog/lost.png").symlink_to("nowhere")
    assert fingerprint(root) != before


def test_another_order_of_the_classes_is_the_same_data(make_tree):
    """Evaluation images are numbered by the classes of the train images."""
    train = make_tree("train-set", ["ant/1.png", "cat/1.png", "dog/1.png"])
    tests = make_tree("eval-set", ["cat/1.png", "dog/2.png"])
    _, evaluation = open_splits(str(train), str(tests))
    assert evaluation.labels.tolist() == [1, 2]
    assert evaluation.fingerprint() == fingerprint(tests)


def test_label_maps_count(make_tree, pack):
    files = ["images/train/1.png", "labels/train/1.png", "images/val/2.png", "labels/val/2.png"]
    root = make_tree("tree", files)

    def prints() -> list[str]:
        return [source.fingerprint() for source in open_map_splits(str(pack(root)), None)]

    before = prints()
    overwrite(root / "labels/val/2.png")
    after = prints()
    assert before[0] == after[0] and before[1] != after[1]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_count_by_their_content(save, tmp_path):
    path, pixels = tmp_path / "a.npz", np.zeros((4, 8, 8, 3), np.uint8)
    found = {}
    for name, change in {"same": (0, 0), "again": (0, 0), "pixel": (9, 0), "label": (0, 1)}.items():
        pixels[2, 3, 3, 1], labels = change[0], np.array([0, 1, 1, change[1]])
        save(path, pixels, labels)
        found[name] = fingerprint(path)
    assert found.pop("again") == found["same"] and len(set(found.values())) == 3


def test_built_in_images_count_by_their_content():
    specs = ["digits", "scattered-digits:50", "scattered-digits:51", "scattered-digits:50:1"]
    found = [open_source(s, split).fingerprint() for s in specs for split in ("train", "eval")]
    # The number of train images does not change the evaluation images.
    assert len(set(found)) == 7 and found[3] == found[5]
    assert open_source("digits", "train").fingerprint() == found[0]
