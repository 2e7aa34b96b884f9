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
from ldae.tokenizers.moments import Moments


class Statistics(NamedTuple):
    """What the distance knows of a set of images, in float64 on the CPU."""

    mean: torch.Tensor
    """(D,)."""
    covariance: torch.Tensor
    """(D, D), unbiased: divided by count - 1."""
    count: int | None
    """Images; None where a file does not tell."""
    claim: dict
    """How the features were made; empty where a file does not tell."""


def statistics_of(moments: Moments, claim: dict) -> Statistics:
    covariance = moments.covariance(correction=1).cpu()
    return Statistics(moments.mean().cpu(), covariance, int(moments.count), claim)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), also of singular covariances.

    With C = L L^T, the trace of the last root is the sum of the singular values of L_a^T L_b. No
    root is taken of a product's small eigenvalues, whose rounding errors would become their square
    roots.

    Source: Heusel et al. 2017, eq. 6; Dowson and Landau 1982.
    """
    mean = (a.mean - b.mean).square().sum()
    own = a.covariance.trace() + b.covariance.trace()
    common = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    return max(0.0, float(mean + own - 2 * common))  # a square: below 0 by rounding only


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """L (D, r) with C = L L^T, without the axes whose variance is a rounding error."""
    variances, axes = torch.linalg.eigh((covariance + covariance.T) / 2)
    smallest = variances[-1] * len(variances) * torch.finfo(variances.dtype).eps
    kept = variances > smallest.clamp(min=0)
    return axes[:, kept] * variances[kept].sqrt()


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write ``mu`` and ``sigma`` as the files of the ADM suite have them, with count and claim.

    Raises: InputError when the disk does not take it.
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
    """The statistics in a .npz file, None when there are none in it.

    Raises: InputError when the file cannot be read, or what it holds cannot be statistics.
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
