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
        """Add vectors (n, D). Small blocks keep the float64 copy small."""
        for block in vectors.split(65_536):
            block = block.to(self.sum)
            self.count += len(block)
            self.sum += block.sum(0)
            self.second.addmm_(block.T, block)

    def all_reduce(self) -> None:
        """Make the moments those of the vectors of all ranks."""
        for part in (self.count, self.sum, self.second):
            all_reduce_sum(part)

    def mean(self) -> torch.Tensor:
        return self.sum / self.count

    def covariance(self) -> torch.Tensor:
        mean = self.mean()
        return self.second / self.count - mean[:, None] * mean
