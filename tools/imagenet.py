#!/usr/bin/env python3
"""Prepare ILSVRC-2012 (ImageNet-1k) from its official files: as a cache, an archive or a folder.

    python tools/imagenet.py DOWNLOADS imagenet-256.safetensors --side 256
    python tools/imagenet.py DOWNLOADS imagenet.tar
    python tools/imagenet.py DOWNLOADS imagenet

Every ``ldae`` command takes each of the three as its source of images.
"""

import hashlib
import io
import itertools
import os
import re
import sys
import tarfile
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np

from ldae import files
from ldae.commands.cache import write_cache
from ldae.console import progress
from ldae.data.cache_file import SUFFIX, Content
from ldae.data.containers import Location, Tar, tar_entries
from ldae.data.image_files import file_splits
from ldae.data.listing import list_images
from ldae.data.transforms import CropTransform
from ldae.errors import InputError, exit_status, first_line, report
from ldae.runs.lock import open_partial
from ldae.tree import COUNT

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"

# Sizes in bytes and MD5 sums of the official files. Source: torchvision/datasets/imagenet.py.
# The devkit needs none, since gzip has a checksum of its own.
OFFICIAL = {
    TRAIN: (147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e"),
    VAL: (6_744_924_160, "29b22e2961454d5413ddabcf34fc5622"),
}
_BLOCK = 1 << 24  # bytes that are read at once


def imagenet(
    downloads: Path,
    out: Path,
    /,
    *,
    side: Annotated[int, COUNT] = 256,
    workers: int | None = None,
) -> None:
    """Write the images of the official files in DOWNLOADS to OUT, as train/CLASS/ and val/CLASS/.

    OUT is a cache if its name ends in .safetensors, an archive if it ends in .tar, and otherwise a
    folder. The official files are read in place, and stay as they are. The same command resumes.

    Args:
        downloads: the folder of ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
            ILSVRC2012_devkit_t12.tar.gz.
        out: the file or folder to write.
        side: side of the crops of a cache in pixels, see `ldae cache`.
        workers: processes that decode images for a cache; by default one for each core.

    Raises: InputError when an official file is missing, damaged or another file, and when OUT
        cannot be written.
    """
    if out.suffix.lower() not in ("", SUFFIX, ".tar"):
        raise InputError(f"{out} must end in {SUFFIX} or .tar, or be a folder without a suffix")
    images = OfficialFiles(downloads)
    # An image in a folder or an archive takes less than 4096 bytes more than its content.
    size = sum(size + 4096 for _, _, size, _ in images.entries().values())
    if out.suffix.lower() == SUFFIX:
        size = len(images.entries()) * 3 * side**2
    begun = out.with_name(out.name + files.PARTIAL)
    if not out.exists() and not begun.exists():
        with files.report_write_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            files.check_room(out, size)
        for name in OFFICIAL:
            check_md5(downloads / name)
    if out.suffix.lower() == SUFFIX:
        splits = file_splits(str(downloads), images, list_images(images))
        sources = {split: open_split() for split, open_split in splits.items()}
        crop = CropTransform(side)
        content = Content.crops(crop.img_size, crop.in_chans)
        write_cache(sources, out, crop, content, workers)
    elif out.suffix:
        write_archive(images, out)
    else:
        write_folder(images, out)


class OfficialFiles:
    """The images in the official tars, read in place: a container, see ``Container``.

    Names are as in a folder, such as ``train/n01440764/n01440764_18.JPEG``. A location is 0 (train)
    or 1 (val), and the offset in that tar, size and time in seconds.

    Raises: InputError when a file is missing, damaged or another file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._tars = (Tar(path / TRAIN), Tar(path / VAL))
        classes, val_classes = read_devkit(path / DEVKIT)
        self._entries = dict(self._val_entries(val_classes))
        self._entries.update(self._train_entries(classes))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_entries": {}}  # data workers have the locations

    def _train_entries(self, classes: list[str]) -> Iterator[tuple[str, Location]]:
        """Yield names and locations of the training images; each class has a tar in the tar."""
        outer = self._tars[0].entries()
        _check_names(self._tars[0].path, outer, {f"{name}.tar" for name in classes})
        with (
            open(self._tars[0].path, "rb") as file,
            progress(len(classes), "list train") as bar,
        ):
            for name in classes:
                file.seek(outer[f"{name}.tar"][0])
                try:
                    entries = tar_entries(file)
                except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
                    raise InputError(
                        f"{file.name} is damaged: {name}.tar in it cannot be read: {error}"
                    ) from error
                for image, location in entries.items():
                    if not re.fullmatch(rf"{name}_\d+\.JPEG", image):
                        raise InputError(f"{file.name} is damaged: {image!r} follows {name}.tar")
                    yield f"train/{name}/{image}", (0, *location)
                bar.update()

    def _val_entries(self, classes: list[str]) -> Iterator[tuple[str, Location]]:
        """Yield names and locations of the validation images; ``classes`` are theirs in order."""
        entries = self._tars[1].entries()
        names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(classes) + 1)]
        _check_names(self._tars[1].path, entries, set(names))
        for name, class_name in zip(names, classes):
            yield f"val/{class_name}/{name}", (1, *entries[name])

    def entries(self) -> dict[str, Location]:
        return self._entries

    def open(self, name: bytes, location: Location) -> BinaryIO:
        return self._tars[location[0]].open(name, location[1:])

    def stamp(self, names: list[bytes], locations: np.ndarray) -> bytes:
        return self._tars[0].stamp(names, locations[:, 1:])

    def content(self, name: str) -> bytes:
        """Return the bytes of an image. Raises: InputError when they cannot be read."""
        location = self._entries[name]
        try:
            return self.open(name.encode(), location).read()
        except (OSError, ValueError) as error:
            path = self._tars[location[0]].path
            raise InputError(f"{path} cannot be read: {error}") from error


def _check_names(path: Path, found: dict[str, Location], expected: set[str]) -> None:
    """Check that a tar has the expected entries. Raises: InputError that names one that differs."""
    for name in sorted(found.keys() ^ expected):
        verb = "contains" if name in found else "lacks"
        raise InputError(f"{path} is truncated, or of another data set: it {verb} {name}")


def read_devkit(path: Path) -> tuple[list[str], list[str]]:
    """Return the names (WordNet ids) of the classes, and the class of each validation image.

    Raises: InputError when the file is missing, damaged or another file.
    """
    import scipy.io

    try:
        with tarfile.open(path, "r:gz") as devkit:
            folder = f"{Path(devkit.getnames()[0]).parts[0]}/data"
            meta = devkit.extractfile(f"{folder}/meta.mat").read()
            numbers = devkit.extractfile(f"{folder}/ILSVRC2012_validation_ground_truth.txt").read()
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        names = {
            int(synset["ILSVRC2012_ID"]): str(synset["WNID"])
            for synset in synsets
            if synset["num_children"] == 0  # other synsets are groups of classes
        }
        val_classes = [names[int(number)] for number in numbers.split()]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # scipy does not say which
        raise InputError(f"{path} is damaged or no devkit: {first_line(error)}") from error
    for name in names.values():
        if not re.fullmatch(r"n\d{8}", name):  # it becomes a part of paths
            raise InputError(f"{path} is damaged: {name!r} is no WordNet id")
    return sorted(names.values()), val_classes


def check_md5(path: Path) -> None:
    """Compare a file with its official MD5 sum, or print why this cannot be done.

    Raises: InputError when it differs.
    """
    size, expected = path.stat().st_size, OFFICIAL[path.name][1]
    if size != OFFICIAL[path.name][0]:
        print(
            f"{path} has {size:,} bytes, and the official file {OFFICIAL[path.name][0]:,}: its MD5 "
            "sum is not checked"
        )
        return
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, progress(size, f"check {path.name}") as bar:
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected:
        raise InputError(
            f"{path} is damaged: its MD5 sum is {digest.hexdigest()}, and must be {expected}"
        )


def write_archive(images: OfficialFiles, out: Path) -> None:
    """Write the images to the tar archive ``out``, with the times of the official tars.

    Names and sizes determine the place of every image, so the length of a file that an earlier
    start has left says where to go on. The class that was written last is written again: the disk
    may have lost it, if the machine failed.

    Raises: InputError when ``out`` cannot be written, or holds something else.
    """
    members = [_member(name, images.entries()[name]) for name in sorted(images.entries())]
    names = [member.name for member in members]
    blocks = [1 + -(-member.size // tarfile.BLOCKSIZE) for member in members]  # 1: the header
    places = (np.cumsum([0, *blocks]) * tarfile.BLOCKSIZE).tolist()  # the last one: the end
    if out.exists():
        with open(out, "rb") as file:
            if file.seek(0, io.SEEK_END) < places[-1] or not _holds(file, members, places):
                raise InputError(f"{out} is another file: delete it or name another one")
        print(f"{out}: done before")
        return
    with files.report_write_errors(out), open_partial(out) as file:
        written = min(file.seek(0, io.SEEK_END), places[-1])
        last = names[max(bisect_left(places, written) - 1, 0)]
        first = bisect_left(names, os.path.dirname(last) + "/")
        if not _holds(file, members[:first], places):
            raise InputError(f"{file.name} was begun with other images: delete it")
        file.seek(places[first])
        file.truncate()
        with (
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive,
            progress(len(names), "write archive") as bar,
        ):
            bar.update(first)
            for _, group in itertools.groupby(members[first:], lambda m: os.path.dirname(m.name)):
                for member in group:
                    archive.addfile(member, io.BytesIO(images.content(member.name)))
                    archive.members.clear()  # tarfile would keep every header in memory
                    bar.update()
                file.flush()
                os.fsync(file.fileno())
        files.publish(file, out)
    print(f"{out}: {len(names):,} images")


def _member(name: str, location: Location) -> tarfile.TarInfo:
    """Return the header of an image in an archive."""
    member = tarfile.TarInfo(name)
    _, _, member.size, member.mtime = location
    return member


def _holds(file: BinaryIO, members: list[tarfile.TarInfo], places: list[int]) -> bool:
    """Return whether the last of ``members``, if there is one, is at its place in an archive.

    Its place depends on the names and sizes of all images before it.
    """
    if not members:
        return True
    file.seek(places[len(members) - 1])
    return file.read(tarfile.BLOCKSIZE) == members[-1].tobuf(tarfile.USTAR_FORMAT)


def write_folder(images: OfficialFiles, out: Path) -> None:
    """Write the images to the folder ``out``, with the times of the official tars.

    They are written beside it first. Of those that an earlier start has left, a file with the size
    and time of its image is kept.

    Raises: InputError when ``out`` cannot be written, or holds something else.
    """
    entries = images.entries()
    partial = out.with_name(out.name + files.PARTIAL)

    def is_written(path: Path, name: str) -> bool:
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        return (status.st_size, int(status.st_mtime)) == entries[name][2:]

    with files.report_write_errors(out), progress(len(entries), "write folder") as bar:
        if out.exists():
            for name in entries:
                if not is_written(out / name, name):
                    raise InputError(f"{out} lacks {name}: delete it or name another folder")
                bar.update()
            print(f"{out}: done before")
            return
        for folder, names in itertools.groupby(sorted(entries), os.path.dirname):
            (partial / folder).mkdir(parents=True, exist_ok=True)
            for name in names:
                path = partial / name
                if not is_written(path, name):
                    path.write_bytes(images.content(name))
                    os.utime(path, (entries[name][3],) * 2)
                bar.update()
        os.replace(partial, out)
    print(f"{out}: {len(entries):,} images")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return the exit status as ``ldae`` does."""
    import tyro

    try:
        tyro.cli(imagenet, args=argv)
    except InputError as error:
        report(error)
        return error.exit_status
    except KeyboardInterrupt as stopped:
        print("stopped: the same command resumes", file=sys.stderr)
        return exit_status(stopped)
    return 0


if __name__ == "__main__":
    sys.exit(main())
