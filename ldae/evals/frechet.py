"""The Frechet distance of two Gaussians, and files of their statistics."""

import io
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ldae.errors import InputError
from ldae.files import write
from ldae.moments import Moments


class Statistics(NamedTuple):
    """The mean and the covariance of the features of images, in float64 on the CPU."""

    mean: torch.Tensor
    """(D,)."""
    covariance: torch.Tensor
    """(D, D), unbiased: divided by count - 1."""
    count: int | None
    """Number of images; None when the file does not state it."""
    claim: dict
    """Description of the features; empty when the file has none."""


def statistics_of(moments: Moments, claim: dict) -> Statistics:
    """Return the statistics of features with these moments and this description."""
    covariance = moments.covariance(correction=1).cpu()
    return Statistics(moments.mean().cpu(), covariance, int(moments.count), claim)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return |m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2).

    With C = L L^T, the trace of the last root is the sum of the singular values of L_a^T L_b. So
    covariances may be singular: no root of a small eigenvalue turns its rounding error eps into
    the larger eps^1/2.

    Source: Heusel et al. 2017, eq. 6; Dowson and Landau 1982.
    """
    mean = (a.mean - b.mean).square().sum()
    own = a.covariance.trace() + b.covariance.trace()
    common = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    return max(0.0, float(mean + own - 2 * common))  # only rounding errors are below 0


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """Return L (D, r) with C = L L^T. Axes whose variance is a rounding error are left out."""
    variances, axes = torch.linalg.eigh((covariance + covariance.T) / 2)
    smallest = variances[-1] * len(variances) * torch.finfo(variances.dtype).eps
    kept = variances > smallest.clamp(min=0)
    return axes[:, kept] * variances[kept].sqrt()


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write ``mu`` and ``sigma`` as in the files of the ADM suite, and count and claim.

    Raises: InputError when the file cannot be written.
    """
    content = io.BytesIO()
    np.savez(
        content,
        mu=statistics.mean.numpy(),
        sigma=statistics.covariance.numpy(),
        count=np.int64(statistics.count),
        claim=np.array(json.dumps(statistics.claim)),
    )
    write(path, content.getvalue())


def load_statistics(path: Path) -> Statistics | None:
    """Return the statistics in a .npz file, or None when it has no ``mu`` and ``sigma``.

    Raises: InputError when the file cannot be read, or ``mu`` and ``sigma`` are not statistics.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file):
                return None
            mean, covariance = (np.asarray(file[key], np.float64) for key in ("mu", "sigma"))
            count = int(file["count"]) if "count" in file else None
            claim = json.loads(str(file["claim"])) if "claim" in file else {}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no readable .npz file") from error
    finite = np.isfinite(mean).all() and np.isfinite(covariance).all()
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not finite:
        raise InputError(
            f"{path} holds no mean and covariance: mu is {mean.shape}, sigma {covariance.shape}"
            + ("" if finite else ", with values that are not finite")
        )
    return Statistics(torch.from_numpy(mean), torch.from_numpy(covariance), count, claim)
