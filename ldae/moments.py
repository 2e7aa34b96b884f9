"""Mean and covariance of a stream of vectors, in memory that does not grow with their number."""

from collections.abc import Iterable

import torch

from ldae.distributed import all_reduce_sum


class Moments:
    """Count, sum and second moment of D-dimensional vectors, in float64."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        double = {"dtype": torch.float64, "device": device}
        self.count = torch.zeros((), **double)
        self.sum = torch.zeros(dim, **double)
        self.second = torch.zeros(dim, dim, **double)

    @classmethod
    def of(
        cls, batches: Iterable[torch.Tensor], dim: int, device: torch.device | str = "cpu"
    ) -> "Moments":
        """Return the moments, with products in float64, of the vectors (n, D) of all ranks.

        Each rank passes its own share.
        """
        moments = cls(dim, device)
        for vectors in batches:
            moments.update(vectors.to(device, torch.float64))
        moments.all_reduce()
        return moments

    def update(self, vectors: torch.Tensor) -> None:
        """Add vectors (n, D): blocks are multiplied in their own precision, summed in float64.

        In float32 the result is exact for integers of absolute value at most 128. The products of a
        block then sum to at most 1024 * 128^2 = 2^24, and float32 holds every integer up to 2^24.
        """
        for block in vectors.split(1024):
            self.count += len(block)
            self.sum += block.sum(0)
            self.second += block.T @ block

    def all_reduce(self) -> None:
        """Sum the moments over all ranks, in place."""
        for part in (self.count, self.sum, self.second):
            all_reduce_sum(part)

    def mean(self) -> torch.Tensor:
        """Return the mean (D,)."""
        return self.sum / self.count

    def covariance(self, correction: int = 0) -> torch.Tensor:
        """Return the covariance (D, D), divided by count - ``correction``; 1 is unbiased."""
        mean = self.mean()
        biased = self.second / self.count - mean[:, None] * mean
        return biased * (self.count / (self.count - correction))
