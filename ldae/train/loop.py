"""The one training loop. The only measure of progress is the number of images seen."""

import signal
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ldae import distributed
from ldae.console import print_main
from ldae.data.workers import Batch, report_dead_worker
from ldae.errors import InputError, quoted
from ldae.precision import deterministic_algorithms, float32_products, unchanged_compiler
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.folder import how_to_go_on
from ldae.runs.metrics import Metrics, progress_line
from ldae.runs.skipped import record_skipped
from ldae.settings import ExecutionSettings, OptimSettings
from ldae.train.interrupt import Interrupted, StopRequest
from ldae.train.lookahead import Lookahead
from ldae.train.memory import fewest_micro_batches, too_little_memory
from ldae.train.meter import Meter
from ldae.train.optim import adamw, ema_decay, lr_at, peak_lr, set_lr
from ldae.train.plan import Plan
from ldae.train.saver import Saver
from ldae.train.state import State
from ldae.train.update import Update
from ldae.train.watchdog import Agreement, Exploded, Report, Watchdog

_RECORDS = 10  # least number of records of metrics in a run, if it has as many steps


@dataclass(frozen=True)
class Hook:
    """A function that is called every ``every`` images and returns values for the metrics."""

    every: int
    """Images between two calls."""
    call: Callable[[nn.Module], dict[str, float]]
    weights: Literal["averaged", "trained", "both"] = "averaged"
    """Which weights ``call`` gets: their moving average, where the recipe has one; the trained
    weights; or both in turn, where the names of the trained weights begin with ``weights_``."""
    judge: Callable[[], list[str]] | None = None
    """Called on rank 0 when the values are written; returns sentences to print."""

    def due(self, before: int, now: int) -> bool:
        """Return whether a multiple of ``every`` lies between two numbers of images seen."""
        return before // self.every != now // self.every


@dataclass(eq=False)
class Loop:
    """The training of a model, from the newest checkpoint or from the start to the end of the plan.

    ``model(images, positions, targets)`` returns the loss, or a pair of the loss and its parts
    ``{name: part}`` with the same names in every step. The metrics hold the loss and its parts as
    means over the batch and over the steps since the last record.

    The model may have a method ``parameter_groups(weight_decay)``, see ``adamw``, and a method
    ``after_step()``, which all ranks call after each update of the weights. ``after_step`` updates
    buffers from values that the forward passes of the step stored in the model, such as the running
    statistics of a BatchNorm. The moving average follows parameters and buffers.

    Before each forward pass, torch's global generators are seeded by ``seed`` and the first
    position of the micro batch, for dropout and the like.
    """

    model: nn.Module
    batches_from: Callable[[int, int], Generator[Batch]]
    """Returns this rank's micro batches, from an image on and with a number of them in a step."""
    plan: Plan
    optim: OptimSettings
    system: ExecutionSettings
    device: torch.device
    checkpoints: Checkpoints
    open_metrics: Callable[[int], Metrics]
    """Returns the metrics of a run that has seen the given number of images."""
    describe: dict[str, Any]
    """The description of the run in every checkpoint. A run resumes only if it is the same."""
    compiled: bool = False
    hooks: tuple[Hook, ...] = ()
    seed: int = 0
    mixing: Callable[[Batch], Batch] | None = None
    """Changes each batch before the model sees it."""
    optimizer: Callable[[nn.Module, OptimSettings], torch.optim.Optimizer] = adamw
    """Creates the optimizer; the loop sets the learning rate before each step."""

    # What changes while the loop trains.
    state: State = field(init=False)
    update: Update = field(init=False)
    seen: int = field(init=False)
    """Images seen, the position in the plan."""
    lr: float = field(init=False)
    """The learning rate of the last step."""
    batches: Lookahead = field(init=False)
    division: dict[str, int] | None = field(init=False, default=None)
    """The number of micro batches that a search found, and for how many ranks."""
    report: Report | None = field(init=False)
    """The report of the last step."""
    skipped: dict[str, str] = field(init=False, default_factory=dict)
    """Images that this rank has skipped since the last checkpoint: name -> reason."""
    watchdog: Watchdog = field(init=False)
    metrics: Metrics = field(init=False)
    meter: Meter = field(init=False)
    """Counts since the last record of metrics."""
    stop: StopRequest = field(init=False)
    saver: Saver = field(init=False)

    @property
    def log_every(self) -> int:
        """Steps between two records of metrics."""
        return max(min(self.system.log_every, self.plan.steps // _RECORDS), 1)

    def train(self) -> nn.Module:
        """Train to the end of the plan.

        Returns: the model, or its moving average where the recipe has one, unsharded on every rank.

        Raises: InputError when the loss is not finite, and on all ranks when the data of a rank
            are bad, after the steps before them are saved, and when the device has too little
            memory; Interrupted after a stop signal.
        """
        self.watchdog = Watchdog(self.system.explosion)
        with (
            unchanged_compiler(self.compiled),
            float32_products(tf32=self.system.precision == "tf32"),
            deterministic_algorithms(self.system.deterministic),
            StopRequest() as self.stop,
            report_dead_worker(),
            Saver(self.checkpoints) as self.saver,
        ):
            self.state = State(
                self.model, self.optim, self.system, self.device, self.compiled, self.optimizer
            )
            self.update = Update(self.state, self.seed, self.optim.clip_grad, self.mixing)
            while True:
                try:
                    self._restore()
                    self._run()
                    return self.state.inference_model()
                except Exploded as exploded:
                    print_main(f"{exploded}; back to the last checkpoint, without this batch")
                    self.watchdog.leave_out(exploded.first)
                    self.saver.wait()
                    distributed.barrier()  # all ranks now see the same checkpoints
                except torch.OutOfMemoryError:
                    raise too_little_memory(self.plan, self.device) from None

    def _restore(self) -> None:
        """Load the newest checkpoint, if there is one.

        Raises: InputError when the checkpoint is of another run, such as of other images, and when
            the ranks do not see the same folder.
        """
        checkpoint = self.checkpoints.load_on_all_ranks()
        self.state.reset_counts()
        if checkpoint:
            _check_same_run(self.checkpoints.run, checkpoint["describe"], self.describe)
            self.state.restore(checkpoint)
            self._use_division(checkpoint["division"])
        self.seen = checkpoint["images_seen"] if checkpoint else 0
        self.report = None
        self.watchdog.restore(checkpoint and checkpoint["watchdog"])
        if self.system.explosion and not checkpoint:
            self._save()  # so that there is a checkpoint to go back to

    def _use_division(self, division: dict[str, int] | None) -> None:
        """Use the division of a checkpoint instead of a search, so that the run stays the same.

        Another number of ranks needs another division.
        """
        plan = self.plan
        if plan.searched and division and division["ranks"] == distributed.world_size():
            if division["micro_batches"] in plan.divisions():
                self.division, self.plan = division, plan.divided(division["micro_batches"])

    def _run(self) -> None:
        """Train from image ``seen`` to the end of the plan, and write metrics and checkpoints.

        Raises: as ``train``, and Exploded.
        """
        self.state.model.train()
        self.metrics, self.meter = self.open_metrics(self.seen), Meter(self.seen)
        self.batches = self._batches()
        saved_at = time.monotonic()
        try:
            self._fetch_first()
            if self.plan.searched and self.seen < self.plan.total:
                self._find_division()
            while self.seen < self.plan.total:
                save_due = time.monotonic() - saved_at >= 60 * self.system.save_minutes
                if save_due:
                    saved_at = time.monotonic()  # so that only one checkpoint is asked for
                agreed = self._step(save_due and distributed.is_main())
                at_end = self.seen >= self.plan.total
                if self.seen // self.plan.batch_size % self.log_every == 0 or at_end:
                    self._log()
                if agreed.save or agreed.stop or agreed.bad_data or at_end:
                    self._save()
                    saved_at = time.monotonic()
                if agreed.bad_data:
                    self.saver.wait()
                    self.batches.raise_errors()
                if agreed.stop and not at_end:
                    self.saver.wait()
                    raise Interrupted(
                        self.stop.received or signal.SIGTERM,
                        f"stopped at image {self.seen:,} of {self.plan.total:,}; all progress is "
                        "saved, and the same command resumes here",
                    )
            self.saver.wait()
        finally:
            self.metrics.close()
            self.batches.close()  # ends the data workers now instead of with the process

    def _batches(self) -> Lookahead:
        """Return the batches from image ``seen`` on."""
        micro_batches = self.plan.micro_batches
        return Lookahead(self.batches_from(self.seen, micro_batches), micro_batches)

    def _fetch_first(self) -> None:
        """Fetch the batches that are ahead of the first step. Raises: as ``Lookahead``."""
        if self.seen < self.plan.total:
            for _ in range(1 + report_lag(self.device)):
                self._fetch()
        self.batches.raise_errors()

    def _find_division(self) -> None:
        """Divide a rank's share of the batch into the fewest micro batches that memory allows.

        Raises: InputError as ``fewest_micro_batches``.
        """
        found = fewest_micro_batches(self.update, self.batches.next_batch(), self.plan)
        self.division = {"ranks": distributed.world_size(), "micro_batches": found}
        self.plan = self.plan.divided(found)
        if found > 1:
            print_main(
                f"{self.plan.share} images do not fit into the memory of a device: each step has "
                f"{found} micro batches of {self.plan.micro_batch} images"
            )
            self.batches.close()
            self.batches = self._batches()
            self._fetch_first()

    def _step(self, save_due: bool) -> Agreement:
        """Train on the next batch, and return what the ranks agree on."""
        self.saver.check()
        self._fetch()
        size, plan = self.plan.batch_size, self.plan
        self.lr = lr_at(
            self.seen,
            peak=peak_lr(self.optim),
            warmup=round(self.optim.warmup_epochs * plan.epoch),
            total=plan.total,
            minimum=self.optim.min_lr,
        )
        set_lr(self.state.optimizer, self.lr)
        first, left_out = self.seen, self.seen in self.watchdog.left_out
        losses = self._skip_batch() if left_out else self._update()
        self.seen += size
        # The ranks agree by one small sum. Batches are fetched ahead, so a rank reports a missing
        # batch one step early, and all ranks stop before the step that this rank cannot do.
        where = (
            f"step {self.seen // size:,} (images {first:,} to {self.seen - 1:,}, lr {self.lr:.3g})"
        )
        previous = self.report
        self.report = Report.of(
            losses,
            stop=self.stop.received > 0,
            save=save_due,
            bad_data=self.batches.error is not None,
            first=first,
            where=where,
        )
        if not left_out:
            self.meter.reports.append(self.report)
        known = previous if report_lag(self.device) else self.report
        self.watchdog.check(known)
        return known.read() if known else Agreement()

    def _update(self) -> dict[str, torch.Tensor]:
        """Update the weights once, and return this rank's mean loss and its parts."""
        batches = self.batches.next_step()
        for batch in batches:
            self.meter.skipped += len(batch.bad)
            self.skipped.update(batch.bad)
        return self.update(batches, ema_decay(self.seen // self.plan.batch_size, self.optim))

    def _skip_batch(self) -> dict[str, torch.Tensor]:
        """Skip the next batch, and return a loss of zero."""
        self.batches.next_step()
        self.state.reset_counts()
        return {"loss": torch.zeros((), device=self.device)}

    def _fetch(self) -> None:
        with self.meter.waiting():
            self.batches.fetch()

    def _log(self) -> None:
        """Call the hooks that are due, write a record of metrics and print a line of progress."""
        self.watchdog.check(self.report)
        if not self.meter.reports:
            return
        plan = self.plan
        record = self.meter.record(self.seen, plan.epoch, self.lr)
        every = self.log_every * plan.batch_size
        last_line = (self.seen - 1) // every * every
        due = [hook for hook in self.hooks if hook.due(last_line, self.seen)]
        if due:
            try:
                record |= self._call(due)
            except InputError:  # such as a bad evaluation image, which must not cost the training
                if distributed.world_size() == 1:  # the other ranks may be in a collective
                    self._save()
                    self.saver.wait()
                raise
        self.metrics.write(record)
        print_main(progress_line(record, plan.total))
        for hook in due:
            if hook.judge and distributed.is_main():
                for sentence in hook.judge():
                    print_main(sentence)
        self.meter = Meter(self.seen)

    def _call(self, hooks: list[Hook]) -> dict[str, float]:
        """Return the values of hooks."""
        values: dict[str, float] = {}
        for hook in hooks:
            values |= hook.call(self.state.inference_model(averaged=hook.weights != "trained"))
            if hook.weights == "both" and self.state.average:
                of_weights = hook.call(self.state.inference_model(averaged=False))
                values |= {f"weights_{name}": value for name, value in of_weights.items()}
        self.state.model.train()
        return values

    def _save(self) -> None:
        """Check the last loss, record the skipped images, and begin to write a checkpoint."""
        self.watchdog.check(self.report)
        record_skipped(self.checkpoints.run, self.skipped)
        self.skipped.clear()
        self.saver.wait()
        state, copied = self.state.capture()
        watchdog = self.watchdog.capture()
        if state:
            state |= {"images_seen": self.seen, "describe": self.describe, "watchdog": watchdog}
            state["division"] = self.division
            self.saver.save(state, copied)


def report_lag(device: torch.device) -> int:
    """Return how many steps late the report of a step is read.

    On a GPU the report is read one step late, so that the device never waits for the host.
    """
    return 0 if device.type == "cpu" else 1


def _check_same_run(run: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a run resumes with the images and labels that it began with.

    The row is not compared, since it can be the path of a file that has moved.

    Raises: InputError naming the difference.
    """
    for name, value in before.items():
        if name != "row" and value != now[name]:
            raise InputError(
                f"this run began with other images or labels: {name} was {quoted(value)} then, and "
                f"is {quoted(now[name])} now; put them back, or name another --run"
                f"{how_to_go_on(run)}"
            )
