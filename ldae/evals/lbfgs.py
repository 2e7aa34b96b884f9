"""L-BFGS for many convex functions side by side, each with its own steps and its own end."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from ldae.console import progress
from ldae.distributed import broadcast_from_main

Function = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes points (A, P) and the indices (A,) of the functions to evaluate there, and returns values
(A,) and gradients (A, P), the same on all ranks."""

_PAIRS = 10  # as many as scipy's L-BFGS-B keeps
_ARMIJO = 1e-4

# A step that lowers a function by less is its last one, as in scikit-learn: 64 machine epsilons.
_LEAST_DECREASE = 64 * torch.finfo(torch.float64).eps

# L-BFGS keeps about 30 float64 numbers for each parameter, which takes 2 GiB.
_PARAMETERS_AT_ONCE = 2**23


class Minima(NamedTuple):
    """The points at which L-BFGS ended, for H functions of P numbers."""

    points: torch.Tensor
    """float64 (H, P)."""
    converged: torch.Tensor
    """bool (H,): False where L-BFGS ended at the last iteration that was allowed."""
    iterations: torch.Tensor
    """int64 (H,)."""


def minimize(function: Function, scale: torch.Tensor, max_iter: int, tol: float) -> Minima:
    """Minimise H smooth convex functions of P numbers, each as if alone, from zero.

    A function has converged when no number of its gradient is above ``tol``, or when a step lowers
    it by less than 64 machine epsilons, relative to its value or to 1 if that is larger.

    Args:
        function: evaluates some of the H functions.
        scale: float64 (H, P), about the inverse of the diagonal of the Hessians.

    Source: Nocedal and Wright, Numerical Optimization, 2006, algorithms 3.1 and 7.4.
    """
    count, size = scale.shape
    every = torch.arange(count, device=scale.device)
    with progress(count, "fit") as bar:
        blocks = [
            _minimize_together(function, some, scale[some], max_iter, tol, bar.update)
            for some in every.split(max(_PARAMETERS_AT_ONCE // size, 1))
        ]
    return Minima(*(torch.cat(parts) for parts in zip(*blocks)))


def _minimize_together(
    function: Function,
    indices: torch.Tensor,
    scale: torch.Tensor,
    max_iter: int,
    tol: float,
    report: Callable[[int], object],
) -> Minima:
    """Do what ``minimize`` does for the functions ``indices``; ``report`` how many have ended.

    Every round evaluates each function once. The function then either takes the step and gets a new
    direction, or shortens its step, so that none waits for the line search of another.
    """
    rows = torch.arange(len(indices), device=scale.device)
    minima = Minima(torch.zeros_like(scale), torch.zeros_like(rows).bool(), torch.zeros_like(rows))
    history = _History(scale)
    points, iterations = minima.points.clone(), minima.iterations.clone()
    values, gradients = function(points, indices)
    directions = history.direction(gradients)
    lengths = torch.ones_like(values)
    while len(rows):
        slopes = torch.linalg.vecdot(gradients, directions)
        new_points = points + lengths[:, None] * directions
        new_values, new_gradients = function(new_points, indices[rows])
        least = _LEAST_DECREASE * values.abs().clamp(min=1)
        taken = new_values <= values + _ARMIJO * lengths * slopes + least  # rounding is no rise
        flat = (values - new_values <= least) | (new_gradients.abs().amax(1) <= tol)
        # Rank 0 decides, because CPUs of two kinds may round differently.
        taken, converged = broadcast_from_main(torch.stack([taken, taken & flat]).int()).bool()

        new_slopes = torch.linalg.vecdot(new_gradients, directions)
        secant = (slopes / (slopes - new_slopes)).nan_to_num(0.1).clamp(0.1, 0.5)
        lengths = torch.where(taken, 1.0, secant * lengths)
        step = taken[:, None]
        history.add((new_points - points) * step, (new_gradients - gradients) * step)
        points = torch.where(step, new_points, points)
        gradients = torch.where(step, new_gradients, gradients)
        values = torch.where(taken, new_values, values)
        iterations = iterations + taken

        ended = converged | (iterations == max_iter)
        if ended.any():
            minima.points[rows[ended]] = points[ended]
            minima.converged[rows[ended]] = converged[ended]
            minima.iterations[rows[ended]] = iterations[ended]
            report(int(ended.sum()))
            history.keep(~ended)
            rows, points, values, gradients, directions, lengths, iterations, step = (
                part[~ended]
                for part in (
                    rows, points, values, gradients, directions, lengths, iterations, step
                )
            )  # fmt: skip
        directions = torch.where(step, history.direction(gradients), directions)
    return minima


class _History:
    """The last steps of A functions and the changes of their gradients: the inverse Hessians."""

    def __init__(self, scale: torch.Tensor) -> None:
        self.scale, self.factor = scale, torch.ones_like(scale[:, 0])
        self.pairs: deque[list[torch.Tensor]] = deque(maxlen=_PAIRS)

    def add(self, steps: torch.Tensor, changes: torch.Tensor) -> None:
        """Add a pair (A, P), which is zero where a function took no step."""
        curvature = torch.linalg.vecdot(steps, changes)
        scaled = torch.linalg.vecdot(self.scale * changes, changes)
        known = curvature > 0
        self.factor = torch.where(known, curvature / scaled, self.factor)
        self.pairs.append([steps, changes, torch.where(known, 1 / curvature, 0.0)])

    def direction(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return minus the inverse Hessians times the gradients, (A, P)."""
        direction, weights = -gradients, []
        for steps, changes, inverse in reversed(self.pairs):
            weights.append(inverse * torch.linalg.vecdot(steps, direction))
            direction.addcmul_(weights[-1][:, None], changes, value=-1)
        direction *= self.factor[:, None] * self.scale
        for steps, changes, inverse in self.pairs:
            weight = weights.pop() - inverse * torch.linalg.vecdot(changes, direction)
            direction.addcmul_(weight[:, None], steps)
        return direction

    def keep(self, some: torch.Tensor) -> None:
        """Drop the functions that are not in ``some``, bool (A,)."""
        self.scale, self.factor = self.scale[some], self.factor[some]
        for pair in self.pairs:
            pair[:] = [part[some] for part in pair]
