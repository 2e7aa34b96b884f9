"""Numbered samples on the disk, in a folder or an .npz file, all drawn with the same settings."""

import io
import json
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldae import files
from ldae.distributed import barrier, is_main
from ldae.errors import InputError
from ldae.sampling.settings import SamplingSettings

RECORD = "samples.json"


class Album:
    """A folder of samples: images 000000.png with one or three channels, or arrays 000000.npy.

    samples.json in the folder holds ``record``, the settings that determine every sample. All ranks
    open the same album.

    Raises: InputError when the folder holds samples of another record, or other files.
    """

    def __init__(self, folder: Path, record: dict, suffix: str = ".png") -> None:
        self.folder, self.suffix = folder, suffix
        with files.report_write_errors(folder):
            holds_files = folder.exists() and any(folder.iterdir())
        if (folder / RECORD).is_file():
            check_same_record(folder, record)
        elif holds_files:
            raise InputError(f"{folder} is not empty and holds no {RECORD}; name another --out")
        barrier()  # all ranks have checked the folder before rank 0 writes
        if is_main():
            files.write_json(folder / RECORD, record)
        barrier()

    def path(self, number: int) -> Path:
        """Return the file of one sample."""
        return self.folder / f"{number:06d}{self.suffix}"

    def save(self, number: int, picture: torch.Tensor) -> None:
        """Write one sample, uint8 (C, H, W) on the CPU.

        Raises: InputError when it cannot be written; earlier samples stay.
        """
        array, content = np.ascontiguousarray(picture.movedim(0, -1).numpy()), io.BytesIO()
        if self.suffix == ".png":
            image = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
            image.save(content, "png")
        else:
            np.save(content, array)
        files.write(self.path(number), content.getvalue())


def pack_npz(album: Album, count: int, labels: np.ndarray | None, record: dict, out: Path) -> None:
    """Write the first ``count`` arrays of an album as one ``.npz``, and remove the album.

    The format is the ADM suite's: ``arr_0``, uint8 (N, H, W, C), and, with ``labels``, ``arr_1``,
    int64 (N,). The record is the comment of the ZIP archive. One sample at a time is in memory.

    Raises: InputError when the file cannot be written; the album then stays.
    """
    shape = (count, *np.load(album.path(0)).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with files.report_write_errors(out):
        with files.open_atomic(out) as npz, zipfile.ZipFile(npz, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for number in range(count):
                    file.write(np.load(album.path(number)).tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, labels)
            archive.comment = json.dumps(record).encode()
        shutil.rmtree(album.folder)


def read_record(images: Path) -> dict | None:
    """Return the record of a folder or ``.npz`` of samples, or None when ldae did not write it."""
    try:
        if images.is_dir():
            record = json.loads((images / RECORD).read_text())
        else:
            with zipfile.ZipFile(images) as archive:
                record = json.loads(archive.comment)
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    return record if isinstance(record, dict) else None


def check_same_record(images: Path, record: dict) -> None:
    """Check that a folder or ``.npz`` of samples has this record.

    A record of an earlier version may lack settings, which were at their defaults, and facts about
    the run, which are not compared.

    Raises: InputError naming the first setting that differs.
    """
    written = read_record(images)
    if written is None:
        raise InputError(f"{images} holds other images, without their settings; name another --out")
    requested = files.as_json(record)
    written = asdict(SamplingSettings()) | written
    for name, value in files.as_json(written).items():
        if value != requested.get(name):
            raise InputError(
                f"{images} holds other samples: {name} is {value!r} there, "
                f"{requested.get(name)!r} here; name another --out"
            )
