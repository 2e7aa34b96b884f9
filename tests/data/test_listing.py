"""A kept listing is that of the files as they are, after any change, and never needed."""

import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from ldae import cli
from ldae.data import listing
from ldae.data.containers import Folder, Tar, open_container
from ldae.data.listing import list_images, relisting
from ldae.data.open import open_source

FILES = ["a-b/1.png", "a/1.png", "a/b-1.png", "a/b/1.png", "a/b/c/1.png", "a/b/c/2.png", "a/c.png"]
FILES += ["z.png", "ä/1.png", "日/1.png"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The user's cache folder. All listings are kept, also of few files that have just changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(listing, "_KEPT_FROM", 1)
    monkeypatch.setattr(listing, "_SETTLED_NS", 0)
    return tmp_path / "home"


@pytest.fixture
def scanned(monkeypatch) -> list[str]:
    """The folders that were read; of an archive its name."""
    names, scan, entries = [], Folder.scan, Tar.entries
    monkeypatch.setattr(
        Folder, "scan", lambda self, name: [names.append(name), scan(self, name)][1]
    )
    monkeypatch.setattr(
        Tar, "entries", lambda self: [names.append(self.path.name), entries(self)][1]
    )
    return names


def kept(home: Path) -> list[Path]:
    return sorted(home.rglob("*.npz"))


def names(path: Path) -> list[str]:
    source = open_source(str(path), "train")
    return [source.name(i) for i in range(len(source))]


def expected(root: Path) -> list[str]:
    """Return the images in a folder, found in another way."""
    found = (Path(folder, name) for folder, _, files in os.walk(root) for name in files)
    return sorted(str(path.relative_to(root)) for path in found if path.suffix == ".png")


def same(one, other) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("names", "ends")
    )


def test_a_kept_listing_reads_no_folder_and_is_the_same_source(make_tree, pack, home, scanned):
    root = pack(make_tree("tree", {**dict.fromkeys(FILES), "a/notes.txt": b"", ".git/1.png": None}))
    first = open_source(str(root), "train")
    assert len(kept(home)) == 1 and [first.name(i) for i in range(len(first))] == sorted(FILES)
    del scanned[:]
    again = open_source(str(root), "train")
    assert scanned == []
    assert again.fingerprint() == first.fingerprint() and again.classes == first.classes
    assert [again.image(i).tobytes() for i in range(len(again))] == [
        first.image(i).tobytes() for i in range(len(first))
    ]


def test_the_files_below_each_folder_are_found_in_one_pass(make_tree):
    whole = list_images(open_container(make_tree("tree", FILES)))
    below = whole.below_each({"a/", "a-b/", "none/", "日/"})
    found = {
        root: [path.tobytes().decode() for path in np.split(part.names, part.ends[1:-1])]
        for root, part in below.items()
    }
    assert found == {
        root: [name for name in sorted(FILES) if name.startswith(root)]
        for root in ("a-b/", "a/", "日/")
    }
    assert whole.below("none/").count == 0 and same(whole.below(""), whole)


def add(root: Path) -> None:
    shutil.copy(root / "a/1.png", root / "a/b/new.png")


def remove(root: Path) -> None:
    (root / "a/b-1.png").unlink()


def rename(root: Path) -> None:
    (root / "a/b/c/2.png").rename(root / "a/b/c/0.png")


def new_folder(root: Path) -> None:
    (root / "new/deep").mkdir(parents=True)
    shutil.copy(root / "a/1.png", root / "new/deep/1.png")


def remove_folder(root: Path) -> None:
    shutil.rmtree(root / "a/b/c")


def rename_folder(root: Path) -> None:
    (root / "a-b").rename(root / "x")


def replace_folder(root: Path) -> None:
    """Put a folder of the same times in its place."""
    status = (root / "ä").stat()
    (root / "ä").rename(root.parent / "old")
    (root / "ä").mkdir()
    shutil.copy(root / "a/1.png", root / "ä/other.png")
    os.utime(root / "ä", ns=(status.st_mtime_ns, status.st_mtime_ns))


def set_time_back(root: Path) -> None:
    """Add a file as rsync does."""
    status = (root / "a").stat()
    shutil.copy(root / "a/1.png", root / "a/new.png")
    os.utime(root / "a", ns=(status.st_mtime_ns, status.st_mtime_ns))


CHANGES = {
    add: {"a/b/"},
    remove: {"a/"},
    rename: {"a/b/c/"},
    new_folder: {"", "new/", "new/deep/"},
    remove_folder: {"a/b/"},
    rename_folder: {"", "x/"},
    replace_folder: {"", "ä/"},
    set_time_back: {"a/"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_changed_folders_are_read_again(change, make_tree, home, scanned):
    root = make_tree("tree", FILES)
    names(root)
    time.sleep(0.02)  # the time of a change is counted in steps of up to 10 ms
    change(root)
    del scanned[:]
    assert names(root) == expected(root)
    assert set(scanned) == CHANGES[change]
    del scanned[:]
    assert names(root) == expected(root) and scanned == []


def test_a_changed_archive_is_listed_anew(make_tree, home, scanned):
    root = make_tree("tree", FILES)
    for change in (lambda root: None, remove):
        change(root)
        with tarfile.open(root.with_suffix(".tar"), "w") as archive:
            archive.add(root, ".")
        assert names(root.with_suffix(".tar")) == expected(root)
    assert scanned == ["tree.tar"] * 2


def test_a_folder_that_has_just_changed_is_listed_again(make_tree, home, scanned, monkeypatch):
    """A change within the same step of a coarse clock would go unseen."""
    monkeypatch.setattr(listing, "_SETTLED_NS", 2_000_000_000)
    root = make_tree("tree", FILES)
    names(root)
    del scanned[:]
    names(root)
    assert set(scanned) == {"", "a-b/", "a/", "a/b/", "a/b/c/", "ä/", "日/"}


def test_a_link_to_nowhere_may_become_a_folder(make_tree, home):
    root = make_tree("tree", ["a/1.png", "b/1.png"])
    (root / "c").symlink_to(root.parent / "later")
    assert names(root) == ["a/1.png", "b/1.png"]
    time.sleep(0.02)
    shutil.copytree(root / "a", root.parent / "later")
    assert names(root) == ["a/1.png", "b/1.png", "c/1.png"]


def test_links_in_a_circle_end_also_with_a_kept_listing(make_tree, home, scanned):
    root = make_tree("tree", FILES)
    (root / "a/b/up").symlink_to(root)
    assert names(root) == names(root) == sorted(FILES)


def test_other_formats_of_images_are_listed_anew(make_tree, home, monkeypatch):
    root = make_tree("tree", {"a/1.png": None, "a/2.new": b""})
    assert names(root) == ["a/1.png"]
    monkeypatch.setattr(listing, "image_extensions", lambda: {".png", ".new"})
    assert names(root) == ["a/1.png", "a/2.new"]


def test_a_listing_is_relisted_on_demand(make_tree, home, scanned):
    root = make_tree("tree", FILES)
    names(root)
    del scanned[:]
    with relisting():
        names(root)
    assert len(scanned) == 7
    assert cli.main(["cache", str(root), str(root.parent / "a.safetensors"), "--side", "8"]) == 0
    assert len(scanned) == 7
    assert cli.main(["cache", str(root), str(root.parent / "a.safetensors"), "--relist"]) == 2
    assert len(scanned) == 14  # another side is refused after the images were listed


def test_few_files_are_not_kept(make_tree, home, monkeypatch):
    root = make_tree("tree", FILES)
    monkeypatch.setattr(listing, "_KEPT_FROM", len(FILES) + 1)
    names(root)
    assert kept(home) == []


def test_a_damaged_listing_is_never_used(make_tree, home):
    root = make_tree("tree", FILES)
    true = list_images(open_container(root))
    (path,) = kept(home)
    whole = path.read_bytes()
    for content in (b"", b"x" * 100, whole[:-30], whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert same(list_images(open_container(root)), true)
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        assert same(list_images(open_container(root)), true), place


@pytest.mark.parametrize("cache_home", ["{}/file", "relative", "{}/read-only"])
def test_a_cache_folder_that_cannot_be_used_breaks_nothing(
    cache_home, make_tree, home, monkeypatch, tmp_path, capfd
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "read-only").mkdir(mode=0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home.format(tmp_path))
    monkeypatch.chdir(tmp_path)
    root = make_tree("tree", FILES)
    assert names(root) == names(root) == sorted(FILES)
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "relative").exists()
    assert capfd.readouterr().err == ""


def test_listings_that_are_not_used_any_more_are_deleted(make_tree, home):
    for folder in ("old", "used", "new"):
        root = make_tree(folder, FILES)
        if folder == "new":
            month = time.time() - 31 * 24 * 3600
            for path in kept(home):
                os.utime(path, (month, month))
            names(root.parent / "used")
        names(root)
    assert len(kept(home)) == 2
