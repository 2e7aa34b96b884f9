"""Rows of features: in memory, or from some size on in a file that the system deletes by itself."""

import os
import tempfile

import numpy as np
import torch

from ldae.errors import InputError

# One set of features of 256 x 256 ImageNet is 2 to 5 GB, and a node runs up to eight ranks. Pages of
# a mapped file are the system's to drop, those of memory are not.
IN_MEMORY = 2 * 2**30
"""Bytes of one set of features that are held in memory."""


def new_rows(count: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Room for features (count, dim), zero; in a file from ``IN_MEMORY`` on.

    The file has no name. It lies where ``TMPDIR`` says, and is gone with the tensor or the process.

    Raises: InputError when the disk has no room for it.
    """
    size = dtype.itemsize * count * dim
    if size < IN_MEMORY:
        return torch.zeros(count, dim, dtype=dtype)
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Reserved now: a page of a mapped file that finds the disk full kills the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return torch.from_numpy(
                np.memmap(file, torch.empty(0, dtype=dtype).numpy().dtype, "r+", shape=(count, dim))
            )
    except OSError as error:
        raise InputError(
            f"{folder} has no room for features of {size / 2**30:.1f} GiB ({error.strerror}): "
            "set TMPDIR to a folder of a larger disk"
        ) from None


def rows_on(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``rows`` on the device, if they are few enough to be held there, else where they are."""
    return rows.to(device) if rows.nbytes < IN_MEMORY else rows
