import io
import os
import tarfile
import tracemalloc
import zipfile
import zlib

import pytest

from ldae.data.containers import open_container, visible_entries
from ldae.errors import InputError


def read(container, name: str) -> bytes:
    file = container.open(name.encode(), container.entries()[name])
    return open(file, "rb").read() if isinstance(file, bytes) else file.read()


def write_tar(path, *members: tarfile.TarInfo):
    with tarfile.open(path, "w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def refuse(path, message: str):
    with pytest.raises(InputError, match=message) as caught:
        visible_entries(open_container(path))
    assert str(path) in str(caught.value)


def test_entries_are_files_and_folders_with_their_bytes(make_tree, pack):
    files = {"a/b/1.png": b"one", "a/2.png": b"two" * 5000, "ü/日本.png": b"three", "empty": b""}
    root = make_tree("tree", files)
    (root / "void").mkdir()
    container = open_container(pack(root))
    assert set(visible_entries(container)) == {*files, "a/", "a/b/", "ü/", "void/"}
    assert {name: read(container, name) for name in files} == files


def test_hidden_entries_are_ignored(make_tree, pack):
    hidden = [".a.png", "a/._1.png", ".git/1.png", "__MACOSX/a/1.png"]
    hidden += ["a/@eaDir/1.png/SYNOFILE_THUMB_M.png", "#recycle/1.png", "$RECYCLE.BIN/S-1/1.png"]
    root = make_tree("tree", [*hidden, "a/1.png"])
    assert set(visible_entries(open_container(pack(root)))) == {"a/", "a/1.png"}


def test_links_are_followed_but_not_in_circles(make_tree):
    root = make_tree("tree", ["a/1.png"])
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    (root / "b").symlink_to(root / "a")
    (root / "a" / "lost.png").symlink_to("nowhere")
    files = {name for name in open_container(root).entries() if not name.endswith("/")}
    assert files == {"a/1.png", "a/lost.png", "b/1.png", "b/lost.png"}


def test_an_unreadable_folder_is_refused(make_tree, monkeypatch):
    root = make_tree("tree", ["a/1.png"])

    def scandir(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", scandir)
    refuse(root, "cannot be read: Permission denied")


@pytest.mark.parametrize("name", ["/etc/1.png", "../1.png", "a/../../1.png"])
def test_names_that_lead_outside_are_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"")
    refuse(tmp_path / "a.zip", "leads outside")
    refuse(write_tar(tmp_path / "a.tar", tarfile.TarInfo(name)), "leads outside")


def test_compressed_tars_are_refused_with_a_remedy(tmp_path):
    for name in ("a.tar.gz", "a.TGZ", "a.tar.zst"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
        refuse(tmp_path / name, "decompress it")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refuse(tmp_path / "notes.txt", "neither a folder nor a .zip or .tar archive")


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_other_content_in_an_archive_file_is_refused(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"no archive" * 100)
    refuse(path, "is not a readable")


def test_a_truncated_tar_is_refused(tmp_path):
    member = tarfile.TarInfo("a/1.png")
    member.size = 5000
    path = write_tar(tmp_path / "a.tar", member)
    path.write_bytes(path.read_bytes()[:2000])
    refuse(path, "is not a readable tar archive")


def test_a_damaged_header_in_a_tar_is_not_taken_for_its_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", tarfile.TarInfo("a/1.png"), tarfile.TarInfo("a/2.png"))
    path.write_bytes(path.read_bytes().replace(b"2.png", b"3.png"))
    refuse(path, "is not a readable tar archive: the header at byte 512 is damaged")


def test_links_in_a_tar_are_refused(tmp_path):
    link = tarfile.TarInfo("a/1.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    refuse(write_tar(tmp_path / "a.tar", link), "--dereference")


def test_encrypted_and_exotic_zips_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/1.png", b"x" * 100)
    refuse(path, "only stored and deflated")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/1.png", b"x")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag "encrypted" in the central directory
    path.write_bytes(data)
    refuse(path, "is encrypted: a/1.png")


def test_a_damaged_zip_member_cannot_be_opened(tmp_path):
    path = tmp_path / "a.zip"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("a/1.png", b"0123456789" * 10)
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        path.write_bytes(data)
        with pytest.raises((ValueError, zlib.error)):
            read(open_container(path), "a/1.png")


def test_a_zip_bomb_is_unpacked_only_to_its_declared_size(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", b"\0" * 10_000_000)
    container = open_container(path)
    offset, packed, _, method, checksum = container.entries()["a/1.png"]
    tracemalloc.start()
    for size in (0, 1000):
        with pytest.raises(ValueError, match="size or checksum differs"):
            container.open(b"a/1.png", (offset, packed, size, method, checksum))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    with pytest.raises(ValueError, match="too many for an image"):
        container.open(b"a/1.png", (offset, 1 << 40, 1 << 40, zipfile.ZIP_STORED, checksum))


def test_names_in_a_zip_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ä.png", b"x")
    path.write_bytes(path.read_bytes().replace("ä".encode(), b"\xff\xff"))
    refuse(path, "is not a readable ZIP archive: 'utf-8' codec can't decode")


@pytest.mark.parametrize("time", ["nan", "inf"])
def test_a_tar_with_a_time_that_is_no_number_is_refused(time, tmp_path):
    member = tarfile.TarInfo("1.png")
    member.pax_headers = {"mtime": time}
    refuse(write_tar(tmp_path / "a.tar", member), "is not a readable tar archive: cannot convert")


def test_a_dot_before_the_names_of_a_zip_does_not_hide_them(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("./", "./cat/", "./cat/1.png", "./.hidden.png"):
            archive.writestr(name, b"x" if name.endswith("png") else b"")
    container = open_container(tmp_path / "a.zip")
    assert "cat/1.png" in visible_entries(container) and read(container, "cat/1.png") == b"x"
    assert ".hidden.png" not in visible_entries(container)


def test_backslashes_in_windows_zips_become_slashes(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cats\\1.png", b"x")
    assert set(open_container(tmp_path / "a.zip").entries()) == {"cats/1.png"}
