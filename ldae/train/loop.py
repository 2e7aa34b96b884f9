"""The one training loop. All it knows of a run's progress is the number of images seen."""

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ldae import distributed
from ldae.data.loader import Batch, report_dead_worker
from ldae.errors import InputError
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.metrics import Metrics, progress_line
from ldae.settings import OptimSettings, SystemSettings
from ldae.train.interrupt import Interrupted, StopRequest
from ldae.train.optim import lr_at, peak_lr, set_lr
from ldae.train.saver import Saver
from ldae.train.state import State
from ldae.train.watchdog import Exploded, Report, Watchdog


@dataclass(frozen=True)
class Plan:
    """How many images a run sees, and how a step's batch is divided."""

    epoch: int
    """Images of one pass over the data."""
    total: int
    """Images of the whole run, a whole number of steps."""
    batch_size: int
    micro_batches: int
    """Pieces of one rank's share of a step, whose gradients accumulate."""

    @property
    def steps(self) -> int:
        return self.total // self.batch_size


def plan_run(images: int, optim: OptimSettings, system: SystemSettings) -> Plan:
    """The plan of a run over a source of so many images, on this world size.

    Raises: InputError when the batch can not be divided as the settings ask.
    """
    world = distributed.world_size()
    if optim.batch_size < 1 or optim.batch_size % world:
        raise InputError(f"optim.batch_size {optim.batch_size} can not be split over {world} ranks")
    share = optim.batch_size // world
    micro_batches = math.ceil(share / system.device_batch) if system.device_batch else 1
    if share % micro_batches:
        raise InputError(
            f"a rank's share of optim.batch_size, {share}, can not be cut into {micro_batches} "
            f"equal parts of at most system.device_batch {system.device_batch}"
        )
    total = math.ceil(optim.epochs * images / optim.batch_size) * optim.batch_size
    return Plan(images, total, optim.batch_size, micro_batches)


class Hook:
    """Something to do every ``every`` images with the model, or with its moving average where there
    is one; returns numbers for the metrics."""

    def __init__(self, every: int, call: Callable[[nn.Module], dict[str, float]]) -> None:
        self.every, self.call = every, call

    def due(self, before: int, now: int) -> bool:
        return before // self.every != now // self.every


def train(
    model: nn.Module,
    batches_from: Callable[[int], Generator[Batch]],
    plan: Plan,
    optim: OptimSettings,
    system: SystemSettings,
    *,
    device: torch.device,
    checkpoints: Checkpoints,
    open_metrics: Callable[[int], Metrics],
    describe: dict,
    compiled: bool,
    hooks: tuple[Hook, ...] = (),
    seed: int = 0,
) -> nn.Module:
    """Train ``model``, whose forward(images, positions, labels) is the loss, to the plan's end.

    The forward may also return (loss, {name: part of it}), always of the same names; the parts go to
    the metrics as the loss does, as means over the batch and over the steps between two records.

    It starts from the newest checkpoint if there is one. ``batches_from(n)`` yields this rank's
    micro batches from image n on. ``describe`` is kept in every checkpoint. What the model draws from
    torch's global generators, as dropout does, is a function of ``seed`` and of the first position of
    the micro batch. A model may declare its parameter groups, see ``adamw``. Returns the model, or
    the moving average of it where the recipe has one, whole on every rank.

    Raises: InputError on a loss that is not finite, and whatever the data raises, with all progress
        before it saved; Interrupted when Ctrl-C or SIGTERM asked to stop.
    """
    state = State(model, optim, system, device, compiled)
    watchdog = Watchdog(system.explosion)
    with StopRequest() as stop, report_dead_worker(), Saver(checkpoints) as saver:
        loop = _Loop(state, plan, optim, system, watchdog, saver, stop, describe, hooks, seed)
        while True:
            try:
                loop.restore()
                loop.run(batches_from, open_metrics)
                return state.shown()
            except Exploded as exploded:
                if distributed.is_main():
                    print(
                        f"{exploded}; back to the last checkpoint, and past this batch", flush=True
                    )
                watchdog.leave_out(exploded.first)
                saver.wait()
                distributed.barrier()  # what is on the disk now, all ranks see


class _Loop:
    """From the newest checkpoint to the end of the plan."""

    def __init__(
        self,
        state: State,
        plan: Plan,
        optim: OptimSettings,
        system: SystemSettings,
        watchdog: Watchdog,
        saver: Saver,
        stop: StopRequest,
        describe: dict,
        hooks: tuple[Hook, ...],
        seed: int,
    ) -> None:
        self.state, self.plan, self.optim, self.system = state, plan, optim, system
        self.watchdog, self.saver, self.stop = watchdog, saver, stop
        self.describe, self.hooks, self.seed = describe, hooks, seed
        self.seen, self.lr, self.report = 0, 0.0, None

    def restore(self) -> None:
        """Put the newest checkpoint's state in place, if there is one.

        Raises: InputError when the run was begun on something else, such as other images, and when
            the ranks do not see the same folder.
        """
        found = self.saver.checkpoints.load_together()
        self.state.forget()
        if found:
            check_same(found["describe"], self.describe)
            self.state.restore(found)
        self.seen, self.report = found["images_seen"] if found else 0, None
        self.watchdog.restore(found and found["watchdog"])
        if self.system.explosion and not found:
            self.save()  # to have something to go back to

    def run(
        self,
        batches_from: Callable[[int], Generator[Batch]],
        open_metrics: Callable[[int], Metrics],
    ) -> None:
        """Raises: as ``train``, and Exploded."""
        self.state.model.train()
        self.metrics, self.meter = open_metrics(self.seen), Meter(self.seen)
        self.batches, saved_at = batches_from(self.seen), time.monotonic()
        try:
            while self.seen < self.plan.total:
                late = time.monotonic() - saved_at >= 60 * self.system.save_minutes
                stop_now, save_now = self.step(late and distributed.is_main())
                at_end = self.seen >= self.plan.total
                if self.seen // self.plan.batch_size % self.system.log_every == 0 or at_end:
                    self.tell()
                if save_now or stop_now or at_end:
                    self.save()
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
            self.batches.close()  # its workers end now, and not with the process

    def step(self, late: bool) -> tuple[bool, bool]:
        """Train on the next batch; whether all ranks stop, and whether they save."""
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
        losses = self._pass_over() if left_out else self._learn()
        self.seen += size
        # What every rank must agree on travels in one small sum. On a GPU it is read a step
        # late, so that the device never waits for the host; nothing is saved in between.
        where = (
            f"step {self.seen // size:,} (images {first:,} to {self.seen - 1:,}, lr {self.lr:.3g})"
        )
        previous = self.report
        self.report = Report.of(losses, self.stop.received > 0, late, first, where)
        if not left_out:
            self.meter.reports.append(self.report)
        agreed = self.report if self.state.device.type == "cpu" else previous
        self.watchdog.look(agreed)
        return agreed.read()[1:] if agreed else (False, False)

    def _learn(self) -> dict[str, torch.Tensor]:
        """Update the weights once; the loss of this rank's share of the batch, and its parts."""
        state, pieces = self.state, self.plan.micro_batches
        total = {"loss": torch.zeros((), device=state.device)}
        for micro in range(pieces):
            batch = self._next()
            self.meter.skipped += len(batch.bad)
            torch.manual_seed(_seed_of(self.seed, batch))
            images, positions, labels = (
                part.to(state.device, non_blocking=True)
                for part in (batch.images, batch.positions, batch.labels)
            )
            with state.spread.averaging(micro == pieces - 1):
                told = state.spread.network(images, positions, labels)
                loss, parts = told if isinstance(told, tuple) else (told, {})
                (loss / pieces).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                total[name] = total.get(name, 0) + value / pieces
        if self.optim.clip_grad:
            nn.utils.clip_grad_norm_(state.model.parameters(), self.optim.clip_grad)
        state.update()
        return total

    def _pass_over(self) -> dict[str, torch.Tensor]:
        """Let a batch go by."""
        for _ in range(self.plan.micro_batches):
            self._next()
        self.state.forget()
        return {"loss": torch.zeros((), device=self.state.device)}

    def _next(self) -> Batch:
        try:
            with self.meter.waiting():
                return next(self.batches)
        except InputError:  # wrong data, not a wrong state: what was learnt so far is kept
            if not self.state.spread.in_shares:  # which the other ranks do not gather now
                self.save()
                self.saver.wait()
            raise

    def tell(self) -> None:
        """Write a line of metrics and of progress, with what the hooks that are due have found."""
        self.watchdog.look(self.report)
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
        if distributed.is_main():
            print(progress_line(record, plan.total), flush=True)
        self.meter = Meter(self.seen)

    def save(self) -> None:
        """Begin to save what the run is now, once that is known to be good."""
        self.watchdog.look(self.report)
        self.report = None  # what it asked for is done
        self.saver.wait()
        state, copied = self.state.capture()
        watchdog = self.watchdog.capture()
        if state:
            state |= {"images_seen": self.seen, "describe": self.describe, "watchdog": watchdog}
            self.saver.save(state, copied)


def check_same(before: dict, now: dict) -> None:
    """Raises: InputError when the run was begun on something else, such as other images.

    The row can be the name of a file, which may lie elsewhere; the settings tell what it is.
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
    """Losses, speed and waiting between two lines of progress."""

    def __init__(self, since: int) -> None:
        self.since, self.start = since, time.perf_counter()
        self.wait, self.reports, self.skipped = 0.0, [], 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        asked = time.perf_counter()
        yield
        self.wait += time.perf_counter() - asked

    def record(self, seen: int, epoch: int, lr: float) -> dict:
        """Means over the images since the last record."""
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
