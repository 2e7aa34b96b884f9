"""Functions minimised together reach the minima that each has alone."""

import pytest
import torch

from ldae.evals import lbfgs
from ldae.evals.lbfgs import minimize

COUNT, SIZE = 5, 12


@pytest.fixture
def bowls():
    """Five convex functions, each steeper than the last: log cosh of A x - b, plus |x|^2 / 2."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    matrices = torch.randn(COUNT, SIZE, SIZE, **options) * 2.0 ** torch.arange(-4, 1).view(-1, 1, 1)
    targets = torch.randn(COUNT, SIZE, **options)
    seen = []

    def function(points, indices):
        seen.append(indices.tolist())
        inside = (matrices[indices] @ points[:, :, None])[..., 0] - targets[indices]
        values = (inside.abs() + torch.log1p((-2 * inside.abs()).exp())).sum(1)
        gradients = (inside.tanh()[:, None] @ matrices[indices])[:, 0]
        return values + points.square().sum(1) / 2, gradients + points

    scale = 1 / (1 + matrices.square().sum(1))
    return function, scale, seen


def test_gradients_vanish_at_the_minima(bowls):
    function, scale, seen = bowls
    found = minimize(function, scale, 1000, 1e-12)
    assert found.converged.all() and found.iterations.unique().numel() > 1
    assert len(seen) < 1.5 * found.iterations.max()  # most steps are taken at once
    _, gradients = function(found.points, torch.arange(COUNT))
    assert gradients.abs().max() < 1e-5


@pytest.mark.parametrize("at_once", [1, 2 * SIZE, 100 * SIZE])
def test_a_function_takes_the_steps_that_it_takes_alone(at_once, bowls, monkeypatch):
    function, scale, seen = bowls
    wanted = minimize(function, scale, 1000, 1e-9)
    monkeypatch.setattr(lbfgs, "_PARAMETERS_AT_ONCE", at_once)
    seen.clear()
    found = minimize(function, scale, 1000, 1e-9)
    assert max(map(len, seen)) == min(max(at_once // SIZE, 1), COUNT)
    assert found.iterations.tolist() == wanted.iterations.tolist()
    torch.testing.assert_close(found.points, wanted.points)


def test_a_function_that_has_ended_is_not_evaluated_again(bowls):
    function, scale, seen = bowls
    most = int(minimize(function, scale, 1000, 1e-9).iterations.float().mean())
    seen.clear()
    found = minimize(function, scale, most, 1e-9)
    assert found.converged[0] and not found.converged[-1] and found.iterations.max() == most
    evaluated = [sum(i in indices for indices in seen) for i in range(COUNT)]
    assert evaluated[0] < evaluated[-1] == len(seen)
