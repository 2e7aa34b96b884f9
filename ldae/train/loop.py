"""The one training loop. All it knows of a run's progress is the number of images seen."""

import copy
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldae import distributed
from ldae.data.loader import Batch, dead_worker
from ldae.errors import InputError
from ldae.settings import Optim, System
from ldae.train.checkpoint import Checkpoints
from ldae.train.interrupt import Interrupted, StopRequest
from ldae.train.metrics import Metrics, progress_line
from ldae.train.optim import adamw, lr_at, peak_lr, set_lr


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


def plan(images: int, optim: Optim, system: System) -> Plan:
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
    optim: Optim,
    system: System,
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
    the moving average of it where the recipe has one.

    Raises: InputError on a loss that is not finite, and whatever the data raises, with all progress
        before it saved; Interrupted when Ctrl-C or SIGTERM asked to stop.
    """
    world = distributed.world_size()
    optimizer = adamw(model, optim)
    average = copy.deepcopy(model).requires_grad_(False) if optim.ema else None
    seen = _restore(checkpoints.load(device), describe, model, average, optimizer)
    network = torch.compile(model) if compiled else model
    if world > 1:
        on = [device] if device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=on, broadcast_buffers=False)
    warmup = round(optim.warmup_epochs * plan.epoch)

    def step(lr: float) -> dict[str, torch.Tensor]:
        """Update the weights once; the loss of this rank's share of the batch, and its parts."""
        set_lr(optimizer, lr)
        total = {"loss": torch.zeros((), device=device)}
        for micro in range(plan.micro_batches):
            with meter.waiting():
                batch = next_batch()
            meter.skipped += len(batch.bad)
            torch.manual_seed(_seed_of(seed, batch))
            images, positions, labels = (
                part.to(device, non_blocking=True)
                for part in (batch.images, batch.positions, batch.labels)
            )
            reduce_now = world == 1 or micro == plan.micro_batches - 1
            with nullcontext() if reduce_now else network.no_sync():
                told = network(images, positions, labels)
                loss, parts = told if isinstance(told, tuple) else (told, {})
                (loss / plan.micro_batches).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                total[name] = total.get(name, 0) + value / plan.micro_batches
        if optim.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            _move_average(average, model, optim.ema)
        return total

    def next_batch() -> Batch:
        try:
            return next(batches)
        except InputError:  # wrong data, not a wrong state: what was learnt so far is kept
            report.read()
            save()
            raise

    def save() -> None:
        if distributed.is_main():
            state = {"images_seen": seen, "model": model.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "describe": describe}
            state["average"] = average.state_dict() if average else None
            checkpoints.save(state)

    model.train()
    metrics, saved_at, meter = open_metrics(seen), time.monotonic(), Meter(seen)
    batches = batches_from(seen)
    report = nothing = Report(torch.zeros(3, device=device), ("loss",), "")
    with StopRequest() as stop, dead_worker():
        try:
            while seen < plan.total:
                lr = lr_at(
                    seen,
                    peak=peak_lr(optim),
                    warmup=warmup,
                    total=plan.total,
                    least=optim.min_lr,
                )
                losses = step(lr)
                seen += plan.batch_size
                late = time.monotonic() - saved_at >= 60 * system.save_minutes
                # What every rank must agree on travels in one small sum. On a GPU it is read a step
                # late, so that the device never waits for the host; nothing is saved in between.
                previous = report
                report = Report.of(
                    losses, stop.received > 0, late, f"to image {seen:,} at lr {lr:.3g}"
                )
                _, stop_now, save_now = (report if device.type == "cpu" else previous).read()
                meter.reports.append(report)

                at_end = seen >= plan.total
                if seen // plan.batch_size % system.log_every == 0 or at_end:
                    report.read()
                    record = meter.record(seen, plan.epoch, lr)
                    last_line = (seen - 1) // plan.batch_size // system.log_every
                    for hook in hooks:
                        if hook.due(last_line * system.log_every * plan.batch_size, seen):
                            record |= hook.call(average or model)
                            model.train()
                    metrics.write(record)
                    if distributed.is_main():
                        print(progress_line(record, plan.total), flush=True)
                    meter = Meter(seen)
                if save_now or stop_now or at_end:
                    report.read()
                    save()
                    report, saved_at = nothing, time.monotonic()  # what it asked for is done
                if stop_now and not at_end:
                    raise Interrupted(
                        stop.received or signal.SIGTERM,
                        f"stopped at image {seen:,} of {plan.total:,}; it is saved, and the same "
                        "command goes on from here",
                    )
        finally:
            metrics.close()
            batches.close()  # its workers end now, and not with the process
    return average or model


def _restore(
    state: dict | None,
    describe: dict,
    model: nn.Module,
    average: nn.Module | None,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Put a checkpoint's state in place and return its images seen, 0 without one.

    Raises: InputError when the run was begun on something else, such as other images.
    """
    if state is None:
        return 0
    for what, before in state["describe"].items():
        if before != describe[what]:
            raise InputError(
                f"{what} of this run was {before} when it began, and is {describe[what]} now"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if average:
        average.load_state_dict(state["average"])
    return state["images_seen"]


def _seed_of(seed: int, batch: Batch) -> int:
    return int(np.random.SeedSequence([seed, int(batch.positions[0])]).generate_state(1)[0])


@torch.no_grad()
def _move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model; the statistics of a BatchNorm, too."""
    for kind in (nn.Module.parameters, nn.Module.buffers):
        pairs = [pair for pair in zip(kind(average), kind(model)) if pair[0].is_floating_point()]
        if pairs:
            torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - decay)


class Report:
    """What all ranks know of one step: the mean loss and its parts, whether to stop or to save.

    A GPU's copy to the host is started at once and waited for only when a value is read. Read a
    step later, it never makes the host wait for work that is still queued.
    """

    def __init__(self, values: torch.Tensor, names: tuple[str, ...], where: str) -> None:
        self.losses, self.names, self.where = values[2:], names, where
        self.host, self.copied = values.to("cpu", non_blocking=True), None
        if values.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    @classmethod
    def of(cls, losses: dict[str, torch.Tensor], stop: bool, save: bool, where: str) -> "Report":
        # new_full and not a tensor from the host, whose copy could wait for the queue.
        flags = [losses["loss"].new_full((), float(flag)) for flag in (stop, save)]
        means = [value.float() / distributed.world_size() for value in losses.values()]
        values = distributed.all_reduce_sum(torch.stack([*flags, *means]))
        return cls(values, tuple(losses), where)

    def read(self) -> tuple[float, bool, bool]:
        """Loss, stop and save.

        Raises: InputError when the loss is not finite.
        """
        if self.copied:
            self.copied.synchronize()
        stop, save, loss = self.host.tolist()[:3]
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} in the step {self.where}, which is not saved; begin a run with "
                "a lower optim.blr or with optim.clip_grad, or look at the data"
            )
        return loss, stop > 0, save > 0


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
