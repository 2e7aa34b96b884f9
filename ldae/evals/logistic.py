"""Logistic regressions with many values of C, fitted together on the shares of all ranks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ldae.distributed import all_reduce_sum, broadcast_from_main, rank, world_size
from ldae.evals.features import Features, allocate_rows, gather_rows, move_if_fits
from ldae.evals.lbfgs import minimize

_ROWS_AT_ONCE = {"cpu": 512, "cuda": 4096}
_LOGITS_AT_ONCE = {"cpu": 2**18, "cuda": 2**27}  # on a CPU as many as fit its cache


class LinearClassifiers:
    """H linear classifiers: (B, D) -> float64 (B, H, K), NaN for classes that were not learned."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight, self.bias = weight, bias  # (H, K, D) and (H, K)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        scores = features.double() @ self.weight.flatten(0, 1).T
        return scores.unflatten(1, self.bias.shape) + self.bias


class Fits(NamedTuple):
    """The classifiers that were fitted to the same images, one for each C."""

    classifiers: LinearClassifiers
    converged: torch.Tensor
    """bool (H,): False where the last allowed iteration ended the fit."""
    iterations: torch.Tensor
    """int64 (H,)."""


class LogisticRegression:
    """Fits scikit-learn's logistic regression to subsets of some images.

    The loss of weights W (K, D) is the mean cross-entropy of n images plus |W|^2 / (2 C n);
    intercepts have no penalty. Centring the features and turning them to the axes of their
    covariance does not change it. On these axes the Hessian at zero is diagonal, apart from a
    coupling of the classes, so a scale for each axis saves many iterations. Axes without variance
    get no weight and are left out. Each rank computes with its share of the images.

    Args:
        train: this rank's share.
        chosen: bool (N,), the images among those of all ranks that subsets are taken from.
        device: where the loss is computed, and where the ranks exchange.
    """

    def __init__(self, train: Features, chosen: torch.Tensor, device: torch.device) -> None:
        self.device, self.share = device, chosen[rank() :: world_size()].nonzero()[:, 0]
        self.labels = gather_rows(train.labels, len(chosen), device).cpu()
        self.classes = self.labels[chosen].unique()
        self.targets = torch.searchsorted(self.classes, train.labels[self.share]).to(device)
        images, dim = int(chosen.sum()), train.features.shape[1]
        blocks = self.share.split(_ROWS_AT_ONCE[device.type])

        def centred(block: torch.Tensor) -> torch.Tensor:
            return train.features[block].to(device).double() - self.mean

        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        total, covariance = torch.zeros_like(self.mean), self.mean.new_zeros(dim, dim)
        for block in blocks:
            total += centred(block).sum(0)
        self.mean = all_reduce_sum(total) / images
        for block in blocks:
            covariance += centred(block).T @ centred(block) / images
        eigh = torch.linalg.eigh(all_reduce_sum(covariance))
        # All ranks need the axes of one rank: CPUs of two kinds may round differently.
        variances, axes = map(broadcast_from_main, eigh)
        varies = variances > dim * torch.finfo(variances.dtype).eps * variances[-1]
        self.axes = axes[:, varies]
        # The Hessian changes most along axes of little variance, so their share of it is raised.
        raised = variances[varies] + variances[varies].mean()
        # The last column of the rows is 1, for the intercept.
        self.curvature = torch.cat([raised, raised.new_ones(1)]) / len(self.classes)
        rows = allocate_rows(len(self.share), len(self.curvature), torch.float64)
        for block, into in zip(blocks, rows.split(_ROWS_AT_ONCE[device.type])):
            into[:, :-1] = centred(block) @ self.axes
            into[:, -1] = 1
        self.rows = move_if_fits(rows, device)

    @torch.inference_mode()
    def fit(
        self, subsets: Sequence[torch.Tensor], C: Sequence[float], max_iter: int, tol: float
    ) -> list[Fits]:
        """Fit every C to every subset, bool (N,), of at least two classes."""
        losses = _Losses(self, subsets, C)
        found = minimize(losses, losses.scale, max_iter, tol)
        solved = found.points.unflatten(1, (len(self.classes), -1))
        classes = int(self.labels.max()) + 1
        weight = solved.new_zeros(len(solved), classes, len(self.mean))
        bias = solved.new_full(weight.shape[:2], torch.nan)
        known = self.classes.to(self.device)
        weight[:, known] = solved[..., :-1] @ self.axes.T
        bias[:, known] = solved[..., -1] - weight[:, known] @ self.mean + losses.offset
        parts = (weight, bias.where(bias.isfinite(), torch.nan), found.converged, found.iterations)
        return [
            Fits(LinearClassifiers(weight, bias), converged, iterations)
            for weight, bias, converged, iterations in zip(*(p.split(len(C)) for p in parts))
        ]


class _Losses:
    """The losses of H logistic regressions: every C on the first subset, then on the second, ..."""

    def __init__(
        self, images: LogisticRegression, subsets: Sequence[torch.Tensor], C: Sequence[float]
    ) -> None:
        self.rows, self.targets, self.device = images.rows, images.targets, images.device
        classes, columns = images.classes, len(images.curvature)
        members = [torch.searchsorted(classes, images.labels[subset]) for subset in subsets]
        counts = torch.stack([torch.bincount(part, minlength=len(classes)) for part in members])
        sizes = counts.sum(1, keepdim=True)
        # With two classes, scikit-learn has a single vector, the difference of the two.
        vectors = torch.where((counts > 0).sum(1, keepdim=True) == 2, 2.0, 1.0)
        penalty = (vectors / (torch.tensor(C, dtype=torch.float64) * sizes)).flatten()
        shares = [subset[rank() :: world_size()][images.share] for subset in subsets]
        self.weights = (torch.stack(shares, 1) / sizes[:, 0].double()).to(self.device)  # (B, S)
        self.subset = torch.arange(len(subsets)).repeat_interleave(len(C)).to(self.device)
        # A class without images in a subset has the score -inf.
        offset = torch.zeros(counts.shape, dtype=torch.float64).masked_fill(counts == 0, -torch.inf)
        self.offset = offset.to(self.device)[self.subset]  # (H, K)
        self.penalty = penalty.to(self.device)[:, None].repeat(1, columns)  # (H, R + 1)
        self.penalty[:, -1] = 0
        hessian = images.curvature + self.penalty
        self.scale = hessian.reciprocal()[:, None].expand(-1, len(classes), -1).flatten(1)

    def __call__(
        self, points: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses (A,) and their gradients of the regressions ``indices``, (A, P)."""
        weight = points.unflatten(1, (-1, self.rows.shape[1]))  #         (A, K, R + 1)
        losses, gradient = points.new_zeros(len(points)), torch.zeros_like(weight)
        at_once = _ROWS_AT_ONCE[self.device.type]
        some = max(_LOGITS_AT_ONCE[self.device.type] // (at_once * weight.shape[1]), 1)
        parts = range(0, len(points), some)
        for first in range(0, len(self.rows), at_once):
            block = slice(first, first + at_once)
            rows = self.rows[block].to(self.device)
            for part in (slice(start, start + some) for start in parts):
                of_images = self.weights[block, self.subset[indices[part]]]  #  (B, A)
                value, error = _cross_entropy(
                    torch.addmm(
                        self.offset[indices[part]].flatten(), rows, weight[part].flatten(0, 1).T
                    ).unflatten(1, weight[part].shape[:2]),
                    self.targets[block],
                    of_images,
                )
                losses[part] += value
                gradient[part].view(-1, rows.shape[1]).addmm_(error.flatten(1).T, rows)
        losses, gradient = all_reduce_sum(losses), all_reduce_sum(gradient)
        decay = self.penalty[indices][:, None] * weight
        return losses + (decay * weight).sum((1, 2)) / 2, (gradient + decay).flatten(1)


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums (A,) of weighted cross-entropies, and their gradients by logits (B, A, K).

    Args:
        logits: (B, A, K); they are overwritten.
        weights: (B, A), 0 for images that do not count.
    """
    logits -= logits.amax(2, keepdim=True)
    places = targets[:, None, None].expand(-1, logits.shape[1], 1)
    true = logits.gather(2, places)[..., 0]
    total = logits.exp_().sum(2)
    losses = torch.where(weights > 0, weights * (total.log() - true), 0.0)
    logits *= (weights / total)[..., None]
    logits.scatter_add_(2, places, -weights[..., None])
    return losses.sum(0), logits
