"""What is measured between two records of metrics: losses, speed and waiting times."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ldae import distributed
from ldae.train.watchdog import Report


class Meter:
    """Losses, speed and waiting times since the last record of metrics."""

    def __init__(self, since: int) -> None:
        self.since, self.start = since, time.perf_counter()
        self.reports: list[Report] = []
        self.wait, self.skipped = 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Add the time inside of the context to the time spent waiting for data."""
        start = time.perf_counter()
        yield
        self.wait += time.perf_counter() - start

    def record(self, seen: int, epoch: int, lr: float) -> dict[str, float]:
        """Return a record of metrics since the last one; losses are means over its steps.

        ``epoch`` is the number of images in an epoch. ``images_per_second`` and ``skipped``, a
        number of images, are those of all ranks; ``data_wait`` is this rank's share of the time.
        All ranks must call this.
        """
        means = torch.stack([report.losses for report in self.reports]).mean(0)
        skipped = distributed.all_reduce_sum(means.new_tensor(self.skipped))
        elapsed = time.perf_counter() - self.start
        return {
            "images": seen,
            "epoch": round(seen / epoch, 4),
            **dict(zip(self.reports[-1].names, means.tolist(), strict=True)),
            "lr": lr,
            "images_per_second": round((seen - self.since) / elapsed, 1),
            "data_wait": round(self.wait / elapsed, 4),
            "skipped": int(skipped),
        }
