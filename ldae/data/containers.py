"""Folders, ZIP and tar archives as one kind of thing: named entries that can be opened in place."""

import io
import os
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, Iterator, Protocol

from ldae.errors import InputError

_COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_MAX_MEMBER = 1 << 30  # bytes: no image needs more, and a forged archive can claim anything
_OUTSIDE = re.compile(r"^/|(^|/)\.\.(/|$)")
_HIDDEN = re.compile(r"(^|/)(\.|__MACOSX(/|$))")
Location = tuple[int, ...]  # where an entry lies in its container, always of the same length


class Container(Protocol):
    """Can be pickled, and read by several processes and threads at once."""

    path: Path

    def entries(self) -> dict[str, Location]:
        """Every entry's name, folders ending in a slash, and location. The order is unspecified.

        Raises: InputError when the container can not be listed or must not be used.
        """

    def open(self, name: bytes, location: Location) -> BinaryIO | bytes:
        """The entry as a file, or as the path of one.

        Raises: OSError, ValueError, struct.error or zlib.error when its bytes can not be had.
        """


def open_container(path: Path) -> Container:
    """The folder or archive at ``path``, which exists.

    Raises: InputError when it is of no kind that can be read in place.
    """
    name = path.name.lower()
    if path.is_dir():
        return Folder(path)
    if name.endswith(".zip"):
        return Zip(path)
    if name.endswith(".tar"):
        return Tar(path)
    if name.endswith(_COMPRESSED_TAR):
        raise InputError(
            f"{path} is a compressed tar archive, which can only be read from its start: "
            "decompress it to a .tar"
        )
    raise InputError(f"{path} is neither a folder nor a .zip or .tar archive")


def visible_entries(container: Container) -> dict[str, Location]:
    """The entries that are not hidden: no part of their name starts with a dot or is __MACOSX.

    Raises: InputError for names that lead outside the container, and as ``entries`` does.
    """
    entries = container.entries()
    for name in entries:
        if _OUTSIDE.search(name):
            raise InputError(f"{container.path} holds {name!r}, a name that leads outside of it")
    return {name: place for name, place in entries.items() if not _HIDDEN.search(name)}


class Folder:
    """A folder of the file system; symbolic links are followed."""

    def __init__(self, path: Path):
        self.path = path

    def entries(self) -> dict[str, Location]:
        return dict.fromkeys(self._walk("", ()), ())

    def _walk(self, inner: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        """Names below the folder ``inner``; ``above`` identifies the folders that lead to it."""
        folder = self.path / inner
        try:
            state = folder.stat()
            identity = (state.st_dev, state.st_ino)
            if identity in above:  # a link back to a folder that contains it: a loop
                return
            with os.scandir(folder) as found:
                for entry in found:
                    name = inner + entry.name
                    if entry.is_dir():
                        yield name + "/"
                        yield from self._walk(name + "/", (*above, identity))
                    elif entry.is_file() or entry.is_symlink():  # a broken link is a bad image
                        yield name
        except OSError as error:
            raise InputError(f"folder {folder} can not be read: {error.strerror}") from error

    def open(self, name: bytes, location: Location) -> bytes:
        return os.path.join(os.fsencode(self.path), name)


class _Archive:
    """Members in one file, read by position, which needs no lock between processes."""

    def __init__(self, path: Path):
        self.path = path
        self._file = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def _read(self, offset: int, size: int) -> bytes:
        if size > _MAX_MEMBER:
            raise ValueError(f"{size} bytes are too many for an image")
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) < size:
            raise ValueError("the archive ends inside it")
        return data


class Zip(_Archive):
    """A ZIP archive. A member's location: header offset, packed size, size, method, checksum."""

    def entries(self) -> dict[str, Location]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise InputError(f"{self.path} is no readable ZIP archive: {error}") from error
        for member in members:
            if member.flag_bits & 1:
                raise InputError(f"{self.path} is encrypted: {member.filename} needs a password")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(
                    f"{self.path} holds {member.filename} in ZIP method {member.compress_type}: "
                    "only stored and deflated members are read"
                )
        # Some Windows programs write backslashes, against the format.
        return {
            m.filename.replace("\\", "/"): (
                *(m.header_offset, m.compress_size, m.file_size, m.compress_type, m.CRC),
            )
            for m in members
        }

    def open(self, name: bytes, location: Location) -> BinaryIO:
        # Not by zipfile, which would read the whole central directory again in each process.
        offset, packed_size, size, method, checksum = location
        name_size, extra_size = struct.unpack("<26x2H", self._read(offset, 30))
        data = self._read(offset + 30 + name_size + extra_size, packed_size)
        if method == zipfile.ZIP_DEFLATED:
            # A limit of 0 would mean none.
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, min(size, _MAX_MEMBER) or 1)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise ValueError("it does not match its size and checksum in the archive")
        return io.BytesIO(data)


class Tar(_Archive):
    """An uncompressed tar archive. A member's location: offset, size."""

    def entries(self) -> dict[str, Location]:
        entries = {}
        try:
            with tarfile.open(self.path, "r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # tarfile would keep every header in memory
                    name = member.name.removeprefix("./")
                    if member.isdir():
                        entries[name + "/"] = (0, 0)
                    elif member.isreg() and not member.issparse():
                        entries[name] = (member.offset_data, member.size)
                    else:
                        raise InputError(
                            f"{self.path} holds {name} as a link, a device or a sparse file: pack "
                            "it again with tar --dereference --hard-dereference"
                        )
        except (OSError, tarfile.TarError) as error:
            raise InputError(f"{self.path} is no readable tar archive: {error}") from error
        return entries

    def open(self, name: bytes, location: Location) -> BinaryIO:
        return io.BytesIO(self._read(*location))
