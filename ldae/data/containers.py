"""Containers: folders, ZIP and tar archives as named entries that are read in place."""

import errno
import io
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from ldae.errors import InputError

COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_MAX_MEMBER = 1 << 30  # bytes: no image needs more, and a forged archive can claim any size
_MAX_EXAMINED = 100_000  # files; to examine a million takes minutes on a network drive
_OUTSIDE = re.compile(r"^/|(^|/)\.\.(/|$)")
# Folders that systems add: of macOS' archives, thumbnails of a NAS, and deleted files.
_HIDDEN = re.compile(r"(^|/)(\.|(__MACOSX|@eaDir|#recycle|\$RECYCLE\.BIN)(/|$))")
Location = tuple[int, ...]
"""Position of an entry in its container; the length depends only on the kind of container."""


class Storage(Protocol):
    """Files by name and location that can be opened in place.

    It can be pickled, and several processes and threads can read it at once.
    """

    path: Path

    def open(self, name: bytes, location: Location) -> BinaryIO | bytes:
        """Return an entry as an opened file or as a path.

        Raises: OSError, ValueError, struct.error or zlib.error when its bytes cannot be read.
        """

    def stamp(self, names: list[bytes], locations: np.ndarray) -> bytes:
        """Return bytes that change when entries are replaced, see ``Source.stamp``.

        ``locations`` are those of the entries ``names``, int64 (N, length).
        """


class Container(Storage, Protocol):
    """A storage that lists its entries."""

    def entries(self) -> dict[str, Location]:
        """Return the location of every entry by its name; names of folders end in a slash.

        The order is unspecified.

        Raises: InputError when the container cannot be listed or must not be used.
        """


def open_container(path: Path) -> Container:
    """Open the existing folder or archive at ``path``.

    Raises: InputError when its kind cannot be read in place.
    """
    name = path.name.lower()
    if path.is_dir():
        return Folder(path)
    if name.endswith(".zip"):
        return Zip(path)
    if name.endswith(".tar"):
        return Tar(path)
    if name.endswith(COMPRESSED_TAR):
        raise InputError(
            f"{path} is a compressed tar archive, which can only be read from the start: "
            "decompress it to a .tar"
        )
    raise InputError(f"{path} is neither a folder nor a .zip or .tar archive")


def visible_entries(container: Container) -> dict[str, Location]:
    """Return the entries that are not hidden.

    Raises: InputError for a name that leads outside the container, and as ``entries`` does.
    """
    entries = container.entries()
    for name in entries:
        if _OUTSIDE.search(name):
            raise InputError(f"{container.path} contains {name!r}, a name that leads outside")
    return {name: location for name, location in entries.items() if not hidden(name)}


def hidden(name: str) -> bool:
    """Return whether a part of the name starts with a dot or is a folder that a system adds."""
    return _HIDDEN.search(name) is not None


class Folder:
    """A folder of the file system; symbolic links are followed. A location is empty."""

    def __init__(self, path: Path):
        self.path = path

    def entries(self) -> dict[str, Location]:
        return dict.fromkeys(self.walk(lambda folder, _: self.scan(folder)[0]), ())

    def scan(self, folder: str) -> tuple[list[str], bool]:
        """Return the entries directly in ``folder``, sorted, by their names in this container.

        Also return whether a link among them leads nowhere. Its target may become a folder, and the
        times of ``folder`` do not show that.

        Raises: OSError when the folder cannot be read.
        """
        names, has_lost_link = [], False
        with os.scandir(self.path / folder) as entries:
            for entry in entries:
                if _is_folder(entry):
                    names.append(f"{folder}{entry.name}/")
                elif entry.is_symlink() or entry.is_file():  # a broken link is a bad image
                    names.append(folder + entry.name)
                    has_lost_link |= _is_lost_link(entry)
        return sorted(names), has_lost_link

    def walk(
        self,
        contents: Callable[[str, os.stat_result], Iterable[Any]],
        folder: str = "",
        parents: tuple[tuple[int, int], ...] = (),
    ) -> Iterator[Any]:
        """Yield what ``contents`` returns for ``folder``; after each folder in it, its contents.

        ``contents`` is called with a folder and its status. A string that it returns and that ends
        in a slash is a folder. ``parents`` are device and inode of the folders around ``folder``,
        to stop at links in a circle.

        Raises: InputError when a folder cannot be read.
        """
        try:
            status = os.stat(self.path / folder)
            identity = (status.st_dev, status.st_ino)
            parts = () if identity in parents else contents(folder, status)
        except OSError as error:
            raise InputError(
                f"folder {self.path / folder} cannot be read: {error.strerror}"
            ) from error
        for part in parts:
            yield part
            if isinstance(part, str) and part.endswith("/"):
                yield from self.walk(contents, part, (*parents, identity))

    def open(self, name: bytes, location: Location) -> bytes:
        return os.path.join(os.fsencode(self.path), name)

    def stamp(self, names: list[bytes], locations: np.ndarray) -> bytes:
        return stamp_files(self.path, names)


def stamp_files(root: Path, names: list[bytes]) -> bytes:
    """Return the sizes and times of files below ``root``, see ``Source.stamp``."""
    if len(names) > _MAX_EXAMINED:
        names = sorted({os.path.dirname(name) for name in names})
    return repr([_size_and_time(os.path.join(os.fsencode(root), name)) for name in names]).encode()


def _size_and_time(path: bytes) -> tuple[int, int] | None:
    """Return a file's size, 0 for a folder, and its time in nanoseconds; None without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return 0 if stat.S_ISDIR(status.st_mode) else status.st_size, status.st_mtime_ns


def _is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder or a link to one. A link to itself is neither.

    Raises: OSError when the target of a link cannot be examined.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _is_lost_link(entry: os.DirEntry) -> bool:
    try:
        return entry.is_symlink() and not entry.is_file()
    except OSError:  # a circle
        return True


class Archive:
    """An archive file, read by position so that processes need no lock."""

    def __init__(self, path: Path):
        self.path = path
        self._file = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def _read(self, offset: int, size: int) -> bytes:
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)
        return read_at(self._file, offset, size)


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Return bytes of an archive. Raises: OSError or ValueError when it does not have them."""
    if size > _MAX_MEMBER:
        raise ValueError(f"{size} bytes are too many for an image")
    data = os.pread(file.fileno(), size, offset)
    if len(data) < size:
        raise ValueError("the archive is truncated")
    return data


class Zip(Archive):
    """A ZIP archive. A location is header offset, packed size, size, method and checksum."""

    def entries(self) -> dict[str, Location]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            raise InputError(f"{self.path} is not a readable ZIP archive: {error}") from error
        entries = {}
        for member in members:
            if member.flag_bits & 1:
                raise InputError(f"{self.path} is encrypted: {member.filename} needs a password")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(
                    f"{self.path} contains {member.filename} in ZIP method {member.compress_type}: "
                    "only stored and deflated members are read"
                )
            # Some Windows programs write backslashes, which the format forbids.
            name = member.filename.replace("\\", "/").removeprefix("./")
            sizes = (member.compress_size, member.file_size)
            entries[name] = (member.header_offset, *sizes, member.compress_type, member.CRC)
        return entries

    def open(self, name: bytes, location: Location) -> BinaryIO:
        # zipfile would read the whole central directory again in each process.
        offset, packed_size, size, method, checksum = location
        name_size, extra_size = struct.unpack("<26x2H", self._read(offset, 30))
        data = self._read(offset + 30 + name_size + extra_size, packed_size)
        if method == zipfile.ZIP_DEFLATED:
            # max_length 0 would mean unlimited.
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, min(size, _MAX_MEMBER) or 1)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise ValueError("its size or checksum differs from the archive's directory")
        return io.BytesIO(data)

    def stamp(self, names: list[bytes], locations: np.ndarray) -> bytes:
        return locations[:, [2, 4]].tobytes()  # size and checksum


class Tar(Archive):
    """An uncompressed tar archive. A location begins with offset, size and time in seconds."""

    def entries(self) -> dict[str, Location]:
        try:
            with open(self.path, "rb") as file:
                return tar_entries(file)
        except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
            raise InputError(f"{self.path} is not a readable tar archive: {error}") from error

    def open(self, name: bytes, location: Location) -> BinaryIO:
        offset, size, *_ = location
        return io.BytesIO(self._read(offset, size))

    def stamp(self, names: list[bytes], locations: np.ndarray) -> bytes:
        return locations[:, 1:3].tobytes()  # size and time


def tar_entries(file: BinaryIO) -> dict[str, Location]:
    """Return the entries of the tar archive that begins at the position of ``file``.

    Locations are as in ``Tar``; offsets are those in ``file``.

    Raises: InputError for an entry that is neither a file nor a folder. OSError or tarfile.TarError
        when the archive cannot be read.
    """
    entries = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep every header in memory
            name = member.name.removeprefix("./")
            if member.isdir():
                entries[name + "/"] = (0, 0, 0)
            elif member.isreg() and not member.issparse():
                entries[name] = (member.offset_data, member.size, int(member.mtime))
            else:
                raise InputError(
                    f"{file.name} contains {name}, a link, a device or a sparse file: pack "
                    "it again with tar --dereference --hard-dereference"
                )
    file.seek(archive.offset)
    if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
        raise tarfile.ReadError(f"the header at byte {archive.offset} is damaged")
    return entries
