"""What is known of each step on all ranks, and what is done about a loss that is wrong."""

import math
import statistics
from collections import deque
from typing import Any

import torch

from ldae import distributed
from ldae.errors import InputError

_WINDOW, _LEAST = 100, 10  # losses that a median is of; with fewer there is nothing to compare with


class Report:
    """What all ranks know of one step: the mean loss and its parts, whether to stop or to save.

    A GPU's copy to the host is started at once and waited for only when a value is read. Read a
    step later, it never makes the host wait for work that is still queued.

    Args:
        values: stop, save, the loss and its parts.
        first: the first image of the step's batch.
        where: names the step in a sentence.
    """

    def __init__(
        self, values: torch.Tensor, names: tuple[str, ...], first: int, where: str
    ) -> None:
        self.losses, self.names, self.first, self.where = values[2:], names, first, where
        self.looked_at = False
        self.host, self.copied = values.to("cpu", non_blocking=True), None
        if values.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(values.device))

    @classmethod
    def of(
        cls, losses: dict[str, torch.Tensor], stop: bool, save: bool, first: int, where: str
    ) -> "Report":
        # new_full and not a tensor from the host, whose copy could wait for the queue.
        flags = [losses["loss"].new_full((), float(flag)) for flag in (stop, save)]
        means = [value.float() / distributed.world_size() for value in losses.values()]
        values = distributed.all_reduce_sum(torch.stack([*flags, *means]))
        return cls(values, tuple(losses), first, where)

    def read(self) -> tuple[float, bool, bool]:
        """Loss, stop and save."""
        if self.copied:
            self.copied.synchronize()
        stop, save, loss = self.host.tolist()[:3]
        return loss, stop > 0, save > 0


class Exploded(Exception):
    """The loss of a step is to be undone; ``first`` is the first image of its batch."""

    def __init__(self, first: int, sentence: str) -> None:
        super().__init__(sentence)
        self.first = first


class Watchdog:
    """Looks at every loss, once.

    A loss that is not finite ends the run. With a ``factor``, it and a loss of more than ``factor``
    times the median of the last 100 are undone: the run goes back to its last checkpoint, and past
    the batch. So the weights are those of a run that never saw the batch, whenever it was saved.
    Should that happen again before the next checkpoint, the run ends.
    """

    def __init__(self, factor: float = 0.0) -> None:
        self.factor = factor
        self.losses, self.left_out = deque(maxlen=_WINDOW), set()
        self._unsaved = set()  # batches that are left out since the last checkpoint

    def look(self, report: Report | None) -> None:
        """Raises: InputError when the loss ends the run, and Exploded when it is to be undone."""
        if report is None or report.looked_at or report.first in self.left_out:
            return
        report.looked_at = True
        loss = report.read()[0]
        median = statistics.median(self.losses) if len(self.losses) >= _LEAST else math.inf
        if self.factor and 0 < median < math.inf and not loss <= self.factor * median:
            told = f"the loss is {loss:.4g} in {report.where}, and {median:.4g} by the median before it"
            if self._unsaved:
                raise InputError(
                    f"{told}; that is the second time since the last checkpoint (system.explosion "
                    f"{self.factor:g}): begin a run with a lower optim.blr or with optim.clip_grad, or "
                    "look at the data"
                )
            raise Exploded(report.first, told)
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} in {report.where}, which is not saved; begin a run with "
                "a lower optim.blr or with optim.clip_grad, or look at the data"
            )
        self.losses.append(loss)

    def leave_out(self, first: int) -> None:
        """The batch that begins with image ``first``, from now on."""
        self._unsaved.add(first)

    def capture(self) -> dict[str, Any]:
        self._unsaved.clear()
        return {"losses": list(self.losses), "left_out": sorted(self.left_out)}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Where the run stood at a checkpoint; what has to be left out since then stays so."""
        state = state or {"losses": [], "left_out": []}
        self.losses = deque(state["losses"], maxlen=_WINDOW)
        self.left_out = {*state["left_out"], *self._unsaved}
