"""Mean and covariance of vectors that stream by, in memory that does not grow with their number."""

import torch

from ldae.distributed import all_reduce_sum


class Moments:
    """Count, sum and second moment of D-dimensional vectors, in float64."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        double = {"dtype": torch.float64, "device": device}
        self.count = torch.zeros((), **double)
        self.sum = torch.zeros(dim, **double)
        self.second = torch.zeros(dim, dim, **double)

    def update(self, vectors: torch.Tensor) -> None:
        """Add vectors (n, D), in blocks that are multiplied in their precision and added in float64.

        In float32 nothing is lost when the vectors are integers of at most 128 in size: a block's
        sums of products are at most 1024 * 128^2 = 2^24, up to which float32 counts exactly.
        """
        for block in vectors.split(1024):
            self.count += len(block)
            self.sum += block.sum(0)
            self.second += block.T @ block

    def all_reduce(self) -> None:
        """Make the moments those of the vectors of all ranks."""
        for part in (self.count, self.sum, self.second):
            all_reduce_sum(part)

    def mean(self) -> torch.Tensor:
        return self.sum / self.count

    def covariance(self, correction: int = 0) -> torch.Tensor:
        """(D, D), divided by count - ``correction``: 1 for the unbiased estimate."""
        mean = self.mean()
        biased = self.second / self.count - mean[:, None] * mean
        return biased * (self.count / (self.count - correction))
