"""Numbered pictures on the disk, in a folder or one .npz, each made once under one set of settings."""

import io
import json
import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldae import files
from ldae.distributed import barrier, is_main
from ldae.errors import InputError

RECORD = "samples.json"


class Album:
    """Pictures in ``folder``: 000000.png, of one or three channels, or arrays 000000.npy.

    Its samples.json holds ``record``, all that decides what picture n is; every rank opens it.

    Raises: InputError when the folder holds pictures of another record, or something else.
    """

    def __init__(self, folder: Path, record: dict, suffix: str = ".png") -> None:
        self.folder, self.suffix = folder, suffix
        with files.report_write_errors(folder):
            holds_files = folder.exists() and any(folder.iterdir())
        if (folder / RECORD).is_file():
            check_same(folder, record)
        elif holds_files:
            raise InputError(f"{folder} is not empty and holds no {RECORD}; name another --out")
        barrier()  # every rank has looked before one of them writes
        if is_main():
            files.write_json(folder / RECORD, record)
        barrier()

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}{self.suffix}"

    def put(self, number: int, picture: torch.Tensor) -> None:
        """Keep a picture, uint8 (C, H, W) on the CPU.

        Raises: InputError when the disk does not take it; those before stay.
        """
        array, content = _channels_last(picture), io.BytesIO()
        if self.suffix == ".png":
            Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(
                content, "png"
            )
        else:
            np.save(content, array)
        files.write(self.path(number), content.getvalue())


def pack(album: Album, count: int, labels: np.ndarray | None, record: dict, out: Path) -> None:
    """Write the first ``count`` arrays of an album as one ``.npz`` and remove the album.

    The file is that of the ADM suite: ``arr_0``, uint8 (N, H, W, C), and, with ``labels``,
    ``arr_1``, int64 (N,). One picture at a time is in memory. The record is its ZIP comment.

    Raises: InputError when the disk does not take it; the album is then still there.
    """
    aside = out.with_name(out.name + ".partial")
    shape = (count, *np.load(album.path(0)).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with files.report_write_errors(out):
        try:
            with open(aside, "wb") as whole:
                with zipfile.ZipFile(whole, "w") as archive:
                    with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array_header_1_0(file, header)
                        for number in range(count):
                            file.write(np.load(album.path(number)).tobytes())
                    if labels is not None:
                        with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                            np.lib.format.write_array(file, labels)
                    archive.comment = json.dumps(record).encode()
                whole.flush()
                os.fsync(whole.fileno())
            os.replace(aside, out)
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise
        shutil.rmtree(album.folder)


def record_of(images: Path) -> dict | None:
    """What decided the pictures of a folder or ``.npz``; None when it was not written here."""
    try:
        if images.is_dir():
            return json.loads((images / RECORD).read_text())
        with zipfile.ZipFile(images) as archive:
            return json.loads(archive.comment)
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


def check_same(where: Path, record: dict) -> None:
    """Raises: InputError naming the first setting in which a folder or ``.npz`` differs."""
    found = record_of(where)
    if found is None:
        raise InputError(f"{where} holds other images, without their settings; name another --out")
    wanted = json.loads(json.dumps(record))  # tuples are lists there
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{where} holds other samples: {name} is {found.get(name)!r} there, "
                f"{wanted.get(name)!r} here; name another --out"
            )


def _channels_last(picture: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(picture.movedim(0, -1).numpy())
