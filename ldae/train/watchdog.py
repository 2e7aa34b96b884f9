"""Check the loss of every step on all ranks; a bad loss ends the run or undoes the step."""

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

import torch

from ldae import distributed
from ldae.errors import InputError

_WINDOW = 100  # last losses of which the median is taken
_MIN_LOSSES = 10  # with fewer losses, their median is not used


class Agreement(NamedTuple):
    """The mean loss of a step, and the requests of all ranks."""

    loss: float = math.nan
    stop: bool = False
    save: bool = False
    bad_data: bool = False
    """Whether the batch of the next step is missing on a rank."""


class Report:
    """One step over all ranks: the mean loss and its parts, and the requests of the ranks.

    A GPU copies the values to the host in the background, and only ``read`` waits for the copy. If
    it is read one step late, the host never waits for queued work.

    Args:
        values: (3 + K,): whether to stop, whether to save, whether data are bad, and K losses: the
            loss and its parts. ``losses`` (K,) stay on the device.
        names: the K names of the losses.
        first: the first image of the step's batch.
        where: the name of the step in messages.
    """

    def __init__(
        self, values: torch.Tensor, names: tuple[str, ...], first: int, where: str
    ) -> None:
        self.losses, self.names, self.first, self.where = values[3:], names, first, where
        self.checked = False
        self.host, self.copied = values.to("cpu", non_blocking=True), None
        if values.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(values.device))

    @classmethod
    def of(
        cls,
        losses: dict[str, torch.Tensor],
        *,
        stop: bool = False,
        save: bool = False,
        bad_data: bool = False,
        first: int,
        where: str,
    ) -> "Report":
        """Average the losses over all ranks. The request of one rank counts for all."""
        # new_full creates the flags on the device. A copy from the host could wait for the queue.
        flags = [losses["loss"].new_full((), float(flag)) for flag in (stop, save, bad_data)]
        means = [value.float() / distributed.world_size() for value in losses.values()]
        values = distributed.all_reduce_sum(torch.stack([*flags, *means]))
        return cls(values, tuple(losses), first, where)

    def read(self) -> Agreement:
        """Wait for the values, and return them."""
        if self.copied:
            self.copied.synchronize()
        *requests, loss = self.host.tolist()[:4]
        return Agreement(loss, *(count > 0 for count in requests))


class Exploded(Exception):
    """A step must be undone because of its loss; ``first`` is the first image of its batch."""

    def __init__(self, first: int, sentence: str) -> None:
        super().__init__(sentence)
        self.first = first


class Watchdog:
    """A check of every loss.

    A loss that is not finite ends the run. With a ``factor``, and once there are ten losses, a step
    is undone if its loss is not finite or exceeds ``factor`` times the median of the last 100. The
    run then returns to its last checkpoint and leaves out the batch, so its weights are those of a
    run that never saw the batch. A second such loss before the next checkpoint ends the run.
    """

    def __init__(self, factor: float = 0.0) -> None:
        self.factor = factor
        self.losses, self.left_out = deque(maxlen=_WINDOW), set()
        self._unsaved = set()  # batches left out since the last checkpoint

    def check(self, report: Report | None) -> None:
        """Check the loss of a step, unless it was checked before.

        Raises: InputError when the loss ends the run, and Exploded when the step must be undone.
        """
        if report is None or report.checked or report.first in self.left_out:
            return
        report.checked = True
        loss = report.read().loss
        median = statistics.median(self.losses) if len(self.losses) >= _MIN_LOSSES else math.inf
        if self.factor and 0 < median < math.inf and not loss <= self.factor * median:
            sentence = f"the loss is {loss:.4g} in {report.where}, after a median of {median:.4g}"
            if self._unsaved:
                raise InputError(
                    f"{sentence}; this is the second time since the last checkpoint "
                    f"(system.explosion {self.factor:g}): begin a run with a lower optim.blr or "
                    "with optim.clip_grad, or look at the data"
                )
            raise Exploded(report.first, sentence)
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} in {report.where}, which is not saved; begin a run with "
                "a lower optim.blr or with optim.clip_grad, or look at the data"
            )
        self.losses.append(loss)

    def leave_out(self, first: int) -> None:
        """Leave out the batch that begins with image ``first``, from the next ``restore`` on."""
        self._unsaved.add(first)

    def capture(self) -> dict[str, Any]:
        """Return the last losses and the batches that are left out, for a checkpoint."""
        self._unsaved.clear()
        return {"losses": list(self.losses), "left_out": sorted(self.left_out)}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Load a captured state, or start afresh. Batches left out since then stay left out."""
        state = state or {"losses": [], "left_out": []}
        self.losses = deque(state["losses"], maxlen=_WINDOW)
        self.left_out = {*state["left_out"], *self._unsaved}
