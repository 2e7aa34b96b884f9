"""The distance is the formula's, also where covariances are singular, and so are its files."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from ldae.errors import InputError
from ldae.evals.frechet import (
    Statistics,
    frechet_distance,
    load_statistics,
    save_statistics,
    statistics_of,
)
from ldae.moments import Moments


def features(count: int, dim: int, seed: int, rank: int | None = None) -> torch.Tensor:
    """Correlated float64 features, of a covariance of this rank."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(count, rank or dim, generator=generator, dtype=torch.float64)
    mix = torch.randn(rank or dim, dim, generator=generator, dtype=torch.float64)
    return draws @ mix + torch.randn(dim, generator=generator, dtype=torch.float64)


def statistics(rows: torch.Tensor, parts: int = 1) -> Statistics:
    moments = Moments(rows.shape[1])
    for part in rows.tensor_split(parts):
        moments.update(part)
    return statistics_of(moments, {})


def gaussian(mean: list, covariance: list) -> Statistics:
    return Statistics(
        *(torch.tensor(part, dtype=torch.float64) for part in (mean, covariance)), 9, {}
    )


def slow_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The equation as it is written, by NumPy's covariance and SciPy's root of a matrix."""
    (m1, c1), (m2, c2) = ((x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(c1)
    cross = scipy.linalg.sqrtm(root @ c2 @ root)
    return float((m1 - m2) @ (m1 - m2) + np.trace(c1 + c2 - 2 * cross).real)


@pytest.mark.parametrize("dim", [1, 2, 24])
def test_distance_is_the_equations(dim):
    a, b = features(200, dim, 0), features(150, dim, 1)
    wanted = float(slow_distance(a, b)) if dim > 1 else scalar_distance(a, b)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(wanted, rel=1e-9)


def scalar_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)


def test_distance_is_torch_fidelitys():
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = features(300, 40, 0), features(200, 40, 1)
    parts = (fidelity.fid_features_to_statistics(x) for x in (a, b))
    wanted = fidelity.fid_statistics_to_metric(*parts, False)[fidelity.KEY_METRIC_FID]
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(wanted, rel=1e-9)


def test_gaussians_that_share_their_axes_have_the_closed_form():
    a, b = (
        gaussian([1, 2, 0], [[4, 0, 0], [0, 9, 0], [0, 0, 0]]),
        gaussian([0, 0, 0], [[1, 0, 0], [0, 1, 0], [0, 0, 16]]),
    )
    # sum of (m_a - m_b)^2 + (s_a - s_b)^2, also where one of them has no variance
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 4 + 16, rel=1e-12)


def test_distance_of_a_set_to_itself_is_zero_and_it_is_symmetric():
    a, b = statistics(features(100, 30, 0)), statistics(features(100, 30, 1))
    assert 0 <= frechet_distance(a, a) < 1e-10 * float(a.covariance.trace())
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


@pytest.mark.parametrize("ranks", [(5, 5), (5, 30), (1, 7)])
def test_singular_covariances_lose_no_digits(ranks):
    """Rotated out of a space where nothing is singular but zeros, whose distance is the same."""
    dim = 30
    a, b = (features(200, dim, seed, rank) for seed, rank in enumerate(ranks))
    found = frechet_distance(statistics(a), statistics(b))
    # tr (C_a^1/2 C_b C_a^1/2)^1/2 as the nuclear norm of the centred features' product, which
    # needs no root at all.
    x, y = (part - part.mean(0) for part in (a, b))
    cross = torch.linalg.matrix_norm(x @ y.T, "nuc") / math.sqrt(199 * 199)
    own = x.square().sum() / 199 + y.square().sum() / 199
    wanted = (a.mean(0) - b.mean(0)).square().sum() + own - 2 * cross
    assert found == pytest.approx(float(wanted), rel=1e-10)
    assert frechet_distance(statistics(a), statistics(a)) < 1e-10 * float(own)


def test_streamed_in_any_parts_is_all_at_once():
    rows = features(1000, 10, 0)
    whole = statistics(rows)
    np.testing.assert_allclose(whole.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-10)
    for parts in (2, 7, 1000):
        other = statistics(rows, parts)
        torch.testing.assert_close(other.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
        assert other.count == 1000


def test_saved_statistics_are_read_back_and_those_of_others_too(tmp_path):
    kept = statistics(features(50, 4, 0))._replace(claim={"sha256": "ab"})
    save_statistics(kept, tmp_path / "mine.npz")
    found = load_statistics(tmp_path / "mine.npz")
    assert torch.equal(found.mean, kept.mean) and torch.equal(found.covariance, kept.covariance)
    assert (found.count, found.claim) == (50, {"sha256": "ab"})
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3))
    found = load_statistics(tmp_path / "adm.npz")
    assert found.mean.dtype == torch.float64 and (found.count, found.claim) == (None, {})


@pytest.mark.parametrize(
    "content, told",
    [
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "no mean and covariance"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "not finite"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "no readable .npz"),
        ({"mu": np.zeros(2), "sigma": np.array([{}, {}], object)}, "no readable .npz"),
    ],
)
def test_what_can_not_be_statistics_is_told(content, told, tmp_path):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(InputError, match=f"a.npz .*{told}"):
        load_statistics(tmp_path / "a.npz")


def test_a_file_that_is_no_npz_is_told(tmp_path):
    for number, content in enumerate([b"", b"text", b"PK\x03\x04 damaged", b"\x93NUMPY"]):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(content)
        with pytest.raises(InputError, match="no readable .npz"):
            load_statistics(path)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    (tmp_path / "plain.npy").rename(tmp_path / "plain.npz")
    with pytest.raises(InputError, match="no readable .npz"):
        load_statistics(tmp_path / "plain.npz")
