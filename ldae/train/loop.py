"""The one training loop. All it knows of a run's progress is the number of images seen."""

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ldae import distributed
from ldae.console import print_main
from ldae.data.loader import Batch, report_dead_worker
from ldae.errors import InputError
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.metrics import Metrics, progress_line
from ldae.settings import ExecutionSettings, OptimSettings
from ldae.train.interrupt import Interrupted, StopRequest
from ldae.train.optim import adamw, lr_at, peak_lr, set_lr
from ldae.train.saver import Saver
from ldae.train.state import State, each_tensor
from ldae.train.watchdog import Exploded, Report, Watchdog


@dataclass(frozen=True)
class Plan:
    """The number of images that a run sees, and how the batch of a step is divided."""

    epoch: int
    """Images of one pass over the data."""
    total: int
    """Images of the whole run, a whole number of steps."""
    batch_size: int
    """Images of one step, over all ranks."""
    micro_batches: int
    """Pieces of one rank's share of a step, whose gradients accumulate."""

    @property
    def steps(self) -> int:
        return self.total // self.batch_size


def plan_run(images: int, optim: OptimSettings, system: ExecutionSettings) -> Plan:
    """Return the plan of a run over a source of so many images, on this world size.

    Raises: InputError when the batch cannot be divided as the settings ask.
    """
    world = distributed.world_size()
    if optim.batch_size < 1 or optim.batch_size % world:
        raise InputError(f"optim.batch_size {optim.batch_size} cannot be split over {world} ranks")
    share = optim.batch_size // world
    micro_batches = math.ceil(share / system.device_batch) if system.device_batch else 1
    if share % micro_batches:
        raise InputError(
            f"a rank's share of optim.batch_size, {share}, cannot be cut into {micro_batches} "
            f"equal parts of at most system.device_batch {system.device_batch}"
        )
    total = math.ceil(optim.epochs * images / optim.batch_size) * optim.batch_size
    return Plan(images, total, optim.batch_size, micro_batches)


@dataclass(frozen=True)
class Hook:
    """A function that is called every ``every`` images and returns numbers for the metrics.

    Its argument is the model, or the moving average of the model where the recipe has one.
    """

    every: int
    call: Callable[[nn.Module], dict[str, float]]

    def due(self, before: int, now: int) -> bool:
        """Return whether a multiple of ``every`` was passed between two numbers of images."""
        return before // self.every != now // self.every


@dataclass(eq=False)
class Loop:
    """One training of a model, from the newest checkpoint, if there is one, to the end of the plan.

    ``model(images, positions, targets)`` returns the loss, or a pair of the loss and its parts,
    ``{name: part}``, always of the same names. The parts go to the metrics as the loss does: as
    means over the batch and over the steps between two records.

    A model may have a method ``parameter_groups(weight_decay)``, see ``adamw``, and a method
    ``after_step()``. The latter is called on all ranks after each update of the weights. It changes
    buffers by what the forward passes of the step left in the model, as the running statistics of a
    BatchNorm follow the micro batches of all ranks in their order. The moving average follows both.

    What the model draws from torch's global generators, as dropout does, is a function of ``seed``
    and of the first position of the micro batch.
    """

    model: nn.Module
    batches_from: Callable[[int], Generator[Batch]]
    """Returns this rank's micro batches from the given image on."""
    plan: Plan
    optim: OptimSettings
    system: ExecutionSettings
    device: torch.device
    checkpoints: Checkpoints
    open_metrics: Callable[[int], Metrics]
    """Returns the metrics of a run that stands at the given image."""
    describe: dict[str, Any]
    """What every checkpoint says about the run; a run is resumed only where it is the same."""
    compiled: bool = False
    hooks: tuple[Hook, ...] = ()
    seed: int = 0
    optimizer: Callable[[nn.Module, OptimSettings], torch.optim.Optimizer] = adamw
    """Makes the optimizer of the model; the loop sets the learning rate before each step."""

    def train(self) -> nn.Module:
        """Train to the end of the plan.

        Returns: the model, or its moving average where the recipe has one, whole on every rank.

        Raises: InputError when the loss is not finite, and what the data raises, with all progress
            before it saved; Interrupted when Ctrl-C or SIGTERM asked to stop.
        """
        self.state = State(
            self.model, self.optim, self.system, self.device, self.compiled, self.optimizer
        )
        self.watchdog = Watchdog(self.system.explosion)
        with (
            StopRequest() as self.stop,
            report_dead_worker(),
            Saver(self.checkpoints) as self.saver,
        ):
            while True:
                try:
                    self._restore()
                    self._run()
                    return self.state.shown()
                except Exploded as exploded:
                    print_main(f"{exploded}; back to the last checkpoint, and past this batch")
                    self.watchdog.leave_out(exploded.first)
                    self.saver.wait()
                    distributed.barrier()  # all ranks now see the same checkpoints

    def _restore(self) -> None:
        """Load the newest checkpoint, if there is one.

        Raises: InputError when the checkpoint is of another run, such as of other images, and when
            the ranks do not see the same folder.
        """
        found = self.checkpoints.load_together()
        self.state.reset_counts()
        if found:
            _check_same(found["describe"], self.describe)
            self.state.restore(found)
        self.seen = found["images_seen"] if found else 0
        self.report: Report | None = None  # of the last step, if it is not saved yet
        self.watchdog.restore(found and found["watchdog"])
        if self.system.explosion and not found:
            self._save()  # to have something to go back to

    def _run(self) -> None:
        """Train from image ``seen`` to the end of the plan, with progress, metrics and checkpoints.

        Raises: as ``train``, and Exploded.
        """
        self.state.model.train()
        self.metrics, self.meter = self.open_metrics(self.seen), Meter(self.seen)
        self.batches, saved_at = self.batches_from(self.seen), time.monotonic()
        try:
            while self.seen < self.plan.total:
                late = time.monotonic() - saved_at >= 60 * self.system.save_minutes
                stop_now, save_now = self._step(late and distributed.is_main())
                at_end = self.seen >= self.plan.total
                if self.seen // self.plan.batch_size % self.system.log_every == 0 or at_end:
                    self._log()
                if save_now or stop_now or at_end:
                    self._save()
                    saved_at = time.monotonic()
                if stop_now and not at_end:
                    self.saver.wait()
                    raise Interrupted(
                        self.stop.received or signal.SIGTERM,
                        f"stopped at image {self.seen:,} of {self.plan.total:,}; it is saved, and "
                        "the same command goes on from here",
                    )
            self.saver.wait()
        finally:
            self.metrics.close()
            self.batches.close()  # ends the data workers now, and not with the process

    def _step(self, late: bool) -> tuple[bool, bool]:
        """Train on the next batch, and return whether all ranks stop and whether they save.

        ``late``: ask for a checkpoint.
        """
        self.saver.check()
        size, plan = self.plan.batch_size, self.plan
        self.lr = lr_at(
            self.seen,
            peak=peak_lr(self.optim),
            warmup=round(self.optim.warmup_epochs * plan.epoch),
            total=plan.total,
            least=self.optim.min_lr,
        )
        set_lr(self.state.optimizer, self.lr)
        first, left_out = self.seen, self.seen in self.watchdog.left_out
        losses = self._leave_out() if left_out else self._learn()
        self.seen += size
        # All that the ranks must agree on travels in one small sum. On a GPU the sum is read a step
        # late, so that the device never waits for the host; nothing is saved in between.
        where = (
            f"step {self.seen // size:,} (images {first:,} to {self.seen - 1:,}, lr {self.lr:.3g})"
        )
        previous = self.report
        self.report = Report.of(losses, self.stop.received > 0, late, first, where)
        if not left_out:
            self.meter.reports.append(self.report)
        agreed = self.report if self.device.type == "cpu" else previous
        self.watchdog.check(agreed)
        return agreed.read()[1:] if agreed else (False, False)

    def _learn(self) -> dict[str, torch.Tensor]:
        """Update the weights once, and return the loss of this rank's share and its parts."""
        state, pieces = self.state, self.plan.micro_batches
        means = {"loss": torch.zeros((), device=self.device)}
        for micro in range(pieces):
            batch = self._next()
            self.meter.skipped += len(batch.bad)
            torch.manual_seed(_seed_of(self.seed, batch))
            with state.spread.averaging(micro == pieces - 1):
                output = state.spread.network(*on_device(batch, self.device))
                loss, parts = output if isinstance(output, tuple) else (output, {})
                (loss / pieces).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                means[name] = means.get(name, 0) + value / pieces
        if self.optim.clip_grad:
            nn.utils.clip_grad_norm_(state.model.parameters(), self.optim.clip_grad)
        state.update()
        return means

    def _leave_out(self) -> dict[str, torch.Tensor]:
        """Leave out the next batch, and return a loss of zero."""
        for _ in range(self.plan.micro_batches):
            self._next()
        self.state.reset_counts()
        return {"loss": torch.zeros((), device=self.device)}

    def _next(self) -> Batch:
        """Return the next micro batch. When the data are bad, save what was learnt before."""
        try:
            with self.meter.waiting():
                return next(self.batches)
        except InputError:
            # Saving shares takes all ranks, and the others are not here.
            if not self.state.spread.in_shares:
                self._save()
                self.saver.wait()
            raise

    def _log(self) -> None:
        """Call the hooks that are due, and write a record of metrics and a line of progress."""
        self.watchdog.check(self.report)
        if not self.meter.reports:
            return
        plan = self.plan
        record = self.meter.record(self.seen, plan.epoch, self.lr)
        every = self.system.log_every * plan.batch_size
        last_line = (self.seen - 1) // every * every
        due = [hook for hook in self.hooks if hook.due(last_line, self.seen)]
        if due:
            shown = self.state.shown()
            for hook in due:
                record |= hook.call(shown)
            self.state.model.train()
        self.metrics.write(record)
        print_main(progress_line(record, plan.total))
        self.meter = Meter(self.seen)

    def _save(self) -> None:
        """Begin to write a checkpoint, once the loss of the last step is known to be good."""
        self.watchdog.check(self.report)
        self.report = None  # a stop or a save that it asks for is done
        self.saver.wait()
        state, copied = self.state.capture()
        watchdog = self.watchdog.capture()
        if state:
            state |= {"images_seen": self.seen, "describe": self.describe, "watchdog": watchdog}
            self.saver.save(state, copied)


def on_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return the images, the positions and the tree of targets of a batch on the device."""
    parts = (batch.images, batch.positions, batch.targets)
    return each_tensor(parts, lambda _, part: part.to(device, non_blocking=True))


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a run is resumed on what it began with, such as the same images.

    The row is not compared: it can be the name of a file, which may lie elsewhere now.

    Raises: InputError naming the difference.
    """
    for what, value in before.items():
        if what != "row" and value != now[what]:
            raise InputError(
                f"the data of this run are not those that it began with: {what} was {value} then, "
                f"and is {now[what]} now; put them back, or name another --run"
            )


def _seed_of(seed: int, batch: Batch) -> int:
    return int(np.random.SeedSequence([seed, int(batch.positions[0])]).generate_state(1)[0])


class Meter:
    """Losses, speed and waiting times between two lines of progress."""

    def __init__(self, since: int) -> None:
        self.since, self.start = since, time.perf_counter()
        self.wait, self.reports, self.skipped = 0.0, [], 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within as waiting for data."""
        asked = time.perf_counter()
        yield
        self.wait += time.perf_counter() - asked

    def record(self, seen: int, epoch: int, lr: float) -> dict[str, float]:
        """Return one record of metrics, with means over the images since the last record."""
        means = torch.stack([report.losses for report in self.reports]).mean(0).tolist()
        elapsed = time.perf_counter() - self.start
        return {
            "images": seen,
            "epoch": round(seen / epoch, 4),
            **dict(zip(self.reports[-1].names, means, strict=True)),
            "lr": lr,
            "images_per_second": round((seen - self.since) / elapsed, 1),
            "data_wait": round(self.wait / elapsed, 4),
            "skipped": self.skipped,
        }
