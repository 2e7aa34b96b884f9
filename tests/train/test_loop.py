import math
import re
import resource
import threading
import time
from concurrent import futures
from types import SimpleNamespace

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from ldae import distributed
from ldae.data.workers import Batch
from ldae.errors import InputError
from ldae.runs.checkpoints import Checkpoints
from ldae.settings import OptimSettings, SystemSettings
from ldae.train import loop, watchdog
from ldae.train.loop import Hook, Loop
from ldae.train.optim import adamw, lr_at
from ldae.train.plan import Plan
from ldae.train.saver import Saver
from ldae.train.state import State
from ldae.train.update import on_device

OPTIM = OptimSettings(batch_size=4, blr=1.0, epochs=3, warmup_epochs=0.5)
SYSTEM = SystemSettings(log_every=2, workers=0)


class Line(nn.Module):
    """A stand-in with the method's interface, which fits y = w x to images that are numbers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, images, positions, labels):
        return ((self.w * images - labels) ** 2).mean()


def batches_from(bad_at=None, nan_at=None, wild=(), total=48):
    """A stream of batches, with NaN or an error from an image on, and with some wild batches."""

    def stream(start, micro_batches):
        size = 4 // micro_batches
        for n in range(start, total, size):
            positions = torch.arange(n, n + size)
            if bad_at is not None and n >= bad_at:
                raise InputError("image cat.jpg is truncated")
            images = (positions % 7).float()
            if nan_at is not None and n >= nan_at:
                images = images * math.nan
            images = images * (100 if n // 4 * 4 in wild else 1)
            yield Batch(images, 3 * images, positions, [])

    return stream


def run(
    folder,
    stream=batches_from(),
    optim=OPTIM,
    system=SYSTEM,
    micro_batches=1,
    hooks=(),
    model=None,
    optimizer=adamw,
    total=48,
    seed=0,
):
    model = model or Line()
    records = []
    log = SimpleNamespace(write=records.append, close=lambda: None)
    trained = Loop(
        model,
        stream,
        Plan(epoch=16, total=total, batch_size=4, micro_batches=micro_batches),
        optim,
        system,
        device=torch.device("cpu"),
        checkpoints=Checkpoints(folder),
        open_metrics=lambda seen: log,
        describe={},
        hooks=hooks,
        seed=seed,
        optimizer=optimizer,
    ).train()
    return trained.w.item(), records


def test_a_run_learns_logs_and_saves(tmp_path, capsys):
    weight, records = run(tmp_path, optim=OptimSettings(batch_size=4, blr=40.0, warmup_epochs=0.5))
    assert abs(weight - 3) < 1
    assert [record["images"] for record in records] == list(range(4, 49, 4))
    assert records[-1]["loss"] < records[0]["loss"]
    assert capsys.readouterr().out.count("images/s") == 12
    assert Checkpoints(tmp_path).load()["images_seen"] == 48


@pytest.mark.parametrize("log_every", [1, 2, 20, 10**6])
def test_a_run_has_ten_records_or_one_of_each_step(log_every):
    for steps in range(300):
        loop_of = Loop(
            Line(), batches_from(), Plan(16, 4 * steps, 4, 1), OPTIM,
            SystemSettings(log_every=log_every), device=torch.device("cpu"),
            checkpoints=Checkpoints("run"), open_metrics=lambda seen: None, describe={},
        )  # fmt: skip
        every = loop_of.log_every
        assert 1 <= every <= log_every and len(range(0, steps, every)) >= min(steps, 10)
        assert every == log_every or 10 * (every + 1) > steps  # no more records than asked for


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    whole, _ = run(tmp_path / "whole")
    pieces, _ = run(tmp_path / "pieces", batches_from(), micro_batches=2)
    assert pieces == pytest.approx(whole, rel=1e-6)


class LineInParts(Line):
    """Returns the largest number of the batch and the weight as parts of the loss."""

    def forward(self, images, positions, labels):
        loss = super().forward(images, positions, labels)
        return loss, {"largest": images.max(), "weight": self.w.detach().mean()}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_parts_of_the_loss_are_logged_as_means(micro_batches, tmp_path):
    """The means are over micro batches and over the steps between two records."""
    how = {"stream": batches_from(total=80), "total": 80, "micro_batches": micro_batches}
    plain, without = run(tmp_path / "plain", **how)
    weight, records = run(tmp_path / "parts", **how, model=LineInParts())
    assert weight == plain
    size = 4 // micro_batches
    for record, other in zip(records, without, strict=True):
        assert record["loss"] == other["loss"] and "largest" not in other
        first = record["images"] - 8
        largest = [max(n % 7 for n in range(i, i + size)) for i in range(first, first + 8, size)]
        assert record["largest"] == pytest.approx(sum(largest) / len(largest))
    assert records[0]["weight"] < records[-1]["weight"] < 3


def test_bad_data_stops_the_run_after_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match="cat.jpg is truncated"):
        run(tmp_path, batches_from(bad_at=22))
    assert Checkpoints(tmp_path).load()["images_seen"] == 24
    resumed, _ = run(tmp_path)
    assert resumed == run(tmp_path / "undisturbed")[0]


def test_a_loss_that_is_not_finite_stops_the_run_without_a_checkpoint(tmp_path):
    system = SystemSettings(log_every=100, save_minutes=0)
    with pytest.raises(InputError, match="loss is nan in step 6 \\(images 20 to 23, lr"):
        run(tmp_path, batches_from(nan_at=20), system=system)
    state = Checkpoints(tmp_path).load()
    assert state["images_seen"] == 20 and state["model"]["w"].isfinite().all()


def slow_line(left_out=(), rate=40.0):
    """Return the weight after 48 images without those left out, by torch's own AdamW."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], weight_decay=0.0, betas=(0.9, 0.999))
    peak, warmup = rate * 4 / 256, 8
    for n in range(0, 48, 4):
        if n in left_out:
            continue
        cosine = 0.5 * (1 + math.cos(math.pi * (n - warmup) / (48 - warmup)))
        optimizer.param_groups[0]["lr"] = peak * (n / warmup if n < warmup else cosine)
        images = (torch.arange(n, n + 4) % 7).float()
        ((weight * images - 3 * images) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight.item()


WILD = OptimSettings(batch_size=4, blr=40.0, epochs=3, warmup_epochs=0.5)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(watchdog, "_MIN_LOSSES", 3)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("minutes", [0, 10])
def test_an_explosion_is_undone_and_its_batch_left_out(
    minutes, micro_batches, impatient, tmp_path, capsys
):
    """The run equals a run that never saw the batch, whenever it was saved."""
    system = SystemSettings(log_every=2, save_minutes=minutes, explosion=20)
    stream = batches_from(wild=(24,))
    weight, _ = run(tmp_path, stream, WILD, system, micro_batches)
    assert weight == pytest.approx(slow_line(left_out=(24,)), rel=1e-5)
    assert weight != pytest.approx(slow_line(), rel=1e-5)
    out = capsys.readouterr().out
    assert out.count("back to the last checkpoint") == 1
    assert "in step 7 (images 24 to 27, lr" in out
    assert Checkpoints(tmp_path).load()["watchdog"]["left_out"] == [24]


def test_a_batch_stays_left_out_after_a_stop(impatient, tmp_path):
    system = SystemSettings(log_every=2, explosion=20)
    whole, _ = run(tmp_path / "whole", batches_from(wild=(24,)), WILD, system)
    with pytest.raises(InputError, match="cat.jpg"):
        run(tmp_path / "parts", batches_from(wild=(24,), bad_at=36), WILD, system)
    assert run(tmp_path / "parts", batches_from(wild=(24,)), WILD, system)[0] == whole


def test_metrics_hold_no_step_that_was_undone(impatient, tmp_path):
    """The metrics are opened again at the last checkpoint."""
    system = SystemSettings(log_every=1, explosion=20)
    starts, model = [], Line()
    log = SimpleNamespace(write=lambda record: None, close=lambda: None)
    Loop(
        model, batches_from(wild=(24,)), Plan(16, 48, 4, 1), WILD, system,
        device=torch.device("cpu"), checkpoints=Checkpoints(tmp_path),
        open_metrics=lambda seen: starts.append(seen) or log, describe={},
    ).train()  # fmt: skip
    assert starts == [0, 0]  # the file is truncated there


def test_repeated_explosions_end_the_run(impatient, tmp_path):
    system = SystemSettings(log_every=2, explosion=20)
    with pytest.raises(InputError, match="step 9 .*second time since the last checkpoint"):
        run(tmp_path / "one", batches_from(wild=(24, 32)), WILD, system)
    system = SystemSettings(log_every=2, explosion=20, save_minutes=0)
    weight, _ = run(tmp_path / "saved between", batches_from(wild=(24, 32)), WILD, system)
    assert weight == pytest.approx(slow_line(left_out=(24, 32)), rel=1e-5)


class Arithmetic(Line):
    """Records the arithmetic of its forward passes."""

    def forward(self, *batch):
        matmul = torch.get_float32_matmul_precision()
        self.found = (matmul, torch.are_deterministic_algorithms_enabled())
        return super().forward(*batch)


@pytest.mark.parametrize("precision, matmul", [("fp32", "highest"), ("tf32", "high")])
def test_the_arithmetic_is_that_of_the_settings(precision, matmul, tmp_path):
    system = SystemSettings(precision=precision, deterministic=precision == "tf32", workers=0)
    model = Arithmetic()
    run(tmp_path, system=system, model=model)
    assert model.found == (matmul, precision == "tf32")


class Large(Line):
    """Needs more memory than there is for more than two images at a time."""

    def forward(self, images, *others):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(images, *others)


def test_too_little_memory_is_a_sentence_with_the_settings_to_change(tmp_path):
    with pytest.raises(
        InputError, match="memory to train on 4 images .* system.device_batch below"
    ):
        run(tmp_path, model=Large())
    run(tmp_path, batches_from(), micro_batches=2, model=Large())


class Heavy(Line):
    """A model of one megabyte."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ballast", torch.zeros(250_000))


@pytest.mark.parametrize("minutes", [0, 10])
def test_a_full_disk_ends_the_run_and_loses_nothing(minutes, tmp_path):
    """The system refuses to let a file grow beyond half a megabyte."""
    with pytest.raises(InputError, match="cat.jpg"):
        run(tmp_path, batches_from(bad_at=16), model=Heavy())
    before = {path: path.read_bytes() for path in Checkpoints(tmp_path).folder.iterdir()}
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, most))
    try:
        with pytest.raises(InputError, match="could not be saved .*last good one is .*0016.pt$"):
            run(tmp_path, system=SystemSettings(log_every=2, save_minutes=minutes), model=Heavy())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
    assert {path: path.read_bytes() for path in Checkpoints(tmp_path).folder.iterdir()} == before
    resumed, _ = run(tmp_path, model=Heavy())
    assert resumed == run(tmp_path / "undisturbed")[0]


def test_training_continues_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """Each checkpoint is written only after the next step has begun."""
    steps, saved, original = [], [], Checkpoints.save

    def save(self, state):
        until = time.monotonic() + 10
        while len(steps) < min(12, state["images_seen"] // 4 + 1):
            assert time.monotonic() < until
            time.sleep(0.001)
        saved.append(state["images_seen"])
        return original(self, state)

    class Watched(Line):
        def forward(self, images, positions, labels):
            steps.append(1)
            return super().forward(images, positions, labels)

    monkeypatch.setattr(Checkpoints, "save", save)
    weight, _ = run(tmp_path, system=SystemSettings(log_every=100, save_minutes=0), model=Watched())
    assert saved == list(range(4, 49, 4))
    kept = [torch.load(path)["model"]["w"].item() for path in Checkpoints(tmp_path).paths()]
    assert kept[-1] == weight and len(set(kept[1:])) == 11  # the first step has a rate of 0


def test_a_failed_save_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    """The run does not first go on to its end, days later."""
    steps, savers, stepping = [], [], threading.Event()

    class Kept(Saver):
        def __init__(self, checkpoints):
            super().__init__(checkpoints)
            savers.append(self)

    def save(self, state):
        assert stepping.wait(60)
        raise InputError("the disk is full")

    class Watched(Line):
        def forward(self, images, positions, labels):
            steps.append(1)
            stepping.set()
            futures.wait([savers[0]._writing])
            return super().forward(images, positions, labels)

    monkeypatch.setattr(loop, "Saver", Kept)
    monkeypatch.setattr(Checkpoints, "save", save)
    system = SystemSettings(log_every=100, explosion=1e9)  # there is a checkpoint from the start
    with pytest.raises(InputError, match="the disk is full"):
        run(tmp_path, system=system, model=Watched())
    assert len(steps) == 1


def test_ranks_with_different_folders_are_refused(on_ranks, tmp_path):
    def work():
        with distributed.process_group(torch.device("cpu"), rank_timeout=1):
            folder = tmp_path / str(distributed.rank())
            if distributed.rank() == 1:
                state = {"images_seen": 8, "model": Line().state_dict(), "average": None}
                Checkpoints(folder).save(state | {"optimizer": {}, "describe": {}})
            run(folder)

    sentence = (
        "InputError: the ranks see different checkpoints in .*, of 0, 8 images: is it the same"
    )
    assert all(re.match(sentence, error) for error in on_ranks(work))


def test_the_average_follows_its_recurrence(tmp_path, monkeypatch):
    seen = []
    original = torch._foreach_lerp_

    def spy(averages, weights, share):
        seen.append((averages[0].item(), weights[0].item()))
        original(averages, weights, share)

    monkeypatch.setattr(torch, "_foreach_lerp_", spy)
    averaged, _ = run(
        tmp_path, optim=OptimSettings(batch_size=4, blr=1.0, warmup_epochs=0.5, ema=0.75)
    )
    expected = seen[0][0]
    for _, weight in seen:
        expected = 0.75 * expected + 0.25 * weight
    assert averaged == pytest.approx(expected, rel=1e-6) and len(seen) == 12


def test_a_warm_average_equals_timms(tmp_path, monkeypatch):
    weights, original = [], State.update

    def update(state, decay):
        original(state, decay)
        weights.append(state.model.w.item())

    monkeypatch.setattr(State, "update", update)
    optim = OptimSettings(batch_size=4, blr=1.0, warmup_epochs=0.5, ema=0.8, ema_warmup=True)
    averaged, _ = run(tmp_path, optim=optim)
    model = Line()
    reference = ModelEmaV3(model, 0.8, use_warmup=True)
    for step, weight in enumerate(weights, start=1):
        model.w.data.fill_(weight)
        reference.update(model, step)
    assert averaged == pytest.approx(reference.module.w.item(), rel=1e-6) and len(weights) == 12


@pytest.mark.parametrize("ema_warmup", [False, True])
def test_the_average_resumes_after_a_stop(ema_warmup, tmp_path):
    optim = OptimSettings(batch_size=4, blr=1.0, warmup_epochs=0.5, ema=0.9, ema_warmup=ema_warmup)
    with pytest.raises(InputError):
        run(tmp_path, batches_from(bad_at=24), optim)
    assert run(tmp_path, optim=optim)[0] == run(tmp_path / "undisturbed", optim=optim)[0]


def test_gradients_are_clipped_in_every_step(tmp_path, monkeypatch):
    norms = []
    original = nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda p, limit: norms.append(original(list(p), limit))
    )
    run(tmp_path)
    assert norms == []
    run(
        tmp_path / "clipped",
        optim=OptimSettings(batch_size=4, blr=1.0, warmup_epochs=0, clip_grad=0.5),
    )
    assert len(norms) == 12


def test_the_rate_of_a_run_ends_above_its_minimum(tmp_path):
    optim = OptimSettings(batch_size=4, blr=1.0, warmup_epochs=0.5, min_lr=0.01)
    _, records = run(tmp_path, optim=optim)
    for record in records:
        at = {"peak": 4 / 256, "warmup": 8, "total": 48, "minimum": 0.01}
        assert record["lr"] == lr_at(record["images"] - 4, **at)


@pytest.mark.parametrize(
    "every, images", [(16, [16, 32, 48, 64, 80]), (12, [16, 24, 40, 48, 64, 72])]
)
def test_hooks_run_every_so_many_images(every, images, tmp_path):
    """They run at the next record of metrics, of which there is one every 8 images."""
    hook = Hook(every, lambda model: {"knn": 0.0})
    _, records = run(tmp_path, batches_from(total=80), hooks=(hook,), total=80)
    assert [r["images"] for r in records if "knn" in r] == images


def test_an_error_of_a_hook_ends_the_run_after_a_checkpoint(tmp_path):
    def bad(model):
        raise InputError("image cat.jpg of the evaluation is truncated")

    with pytest.raises(InputError, match="cat.jpg"):
        run(tmp_path, hooks=(Hook(24, bad),))
    assert Checkpoints(tmp_path).load()["images_seen"] == 24


def test_hooks_get_the_average_where_there_is_one(tmp_path):
    seen = []
    hook = Hook(16, lambda model: {"w": seen.append(model) or 0.0})
    model = Line()
    run(tmp_path / "plain", hooks=(hook,), model=model)
    assert all(other is model for other in seen)
    seen.clear()
    optim = OptimSettings(batch_size=4, blr=1.0, warmup_epochs=0.5, ema=0.9)
    averaged, _ = run(tmp_path / "averaged", optim=optim, hooks=(hook,), model=model)
    assert all(other is not model for other in seen) and seen[-1].w.item() == averaged


def test_a_hook_may_evaluate_the_weights_beside_their_average_or_alone(tmp_path):
    hook = Hook(16, lambda model: {"w": model.w.item()}, weights="both")
    plain = run(tmp_path / "plain", hooks=(hook,))[1][-1]
    assert "w" in plain and "weights_w" not in plain
    optim = OptimSettings(batch_size=4, blr=1.0, warmup_epochs=0.5, ema=0.9)
    model = Line()
    averaged, records = run(tmp_path / "averaged", optim=optim, hooks=(hook,), model=model)
    assert records[-1]["w"] == averaged and records[-1]["weights_w"] == model.w.item()
    assert averaged != model.w.item()
    trained = Hook(16, lambda model: {"w": model.w.item()}, weights="trained")
    _, records = run(tmp_path / "trained", optim=optim, hooks=(trained,), model=model)
    assert records[-1]["w"] == model.w.item() and "weights_w" not in records[-1]


class NoisyLine(Line):
    """Draws from torch's generator, as dropout does, and counts in a buffer, as BatchNorm does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.zeros(1))

    def forward(self, images, positions, labels):
        self.level += 1
        return super().forward(images * (1 + 0.1 * torch.randn(())), positions, labels)


def test_random_draws_depend_only_on_seed_and_position(tmp_path):
    for name, global_seed in (("whole", 1), ("parts", 2)):
        torch.manual_seed(global_seed)
        if name == "parts":
            with pytest.raises(InputError):
                run(tmp_path / name, batches_from(bad_at=24), model=NoisyLine())
            torch.manual_seed(5)
        weight, _ = run(tmp_path / name, model=NoisyLine())
        assert weight == Checkpoints(tmp_path / "whole").load()["model"]["w"].item()
    assert weight != run(tmp_path / "without noise")[0]


class DrawingLine(Line):
    """Keeps a random number of each forward pass."""

    def __init__(self):
        super().__init__()
        self.draws = []

    def forward(self, images, positions, labels):
        self.draws.append(torch.rand(()).item())
        return super().forward(images, positions, labels)


def test_each_micro_batch_and_seed_has_random_draws_of_its_own(tmp_path):
    draws = []
    for seed in range(2):
        model = DrawingLine()
        run(tmp_path / str(seed), model=model, micro_batches=2, seed=seed, stream=batches_from())
        draws += model.draws
    assert len(draws) == len(set(draws)) == 2 * 24


def test_buffers_are_averaged_too(tmp_path):
    optim = OptimSettings(batch_size=4, blr=1.0, warmup_epochs=0.5, ema=0.5)
    run(tmp_path, optim=optim, model=NoisyLine())
    expected = 0.0
    for step in range(1, 13):
        expected = 0.5 * expected + 0.5 * step
    assert Checkpoints(tmp_path).load()["average"]["level"].item() == pytest.approx(expected)


class Centred(Line):
    """Subtracts a running mean, updated after each step by the micro batches in order."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.means = []

    def forward(self, images, positions, labels):
        self.means.append(images.mean())
        return super().forward(images - self.mean, positions, labels)

    def after_step(self):
        for mean in self.means:
            self.mean.lerp_(mean, 0.1)
        self.means.clear()


def momentum(model, optim):
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)


def slow_centred(decay):
    """Train Centred by SGD in plain numbers; return the weight, the mean and their averages."""
    w = mean = moment = 0.0
    averages = [0.0, 0.0]
    for n in range(0, 48, 4):
        cosine = 0.5 * (1 + math.cos(math.pi * (n - 8) / 40))
        slope, means = 0.0, []
        for first in (n, n + 2):
            images = [i % 7 for i in (first, first + 1)]
            slope += sum(2 * (w * (x - mean) - 3 * x) * (x - mean) for x in images) / 4
            means.append(sum(images) / 2)
        moment = 0.9 * moment + slope
        w -= 4 / 256 * (n / 8 if n < 8 else cosine) * moment
        for batch_mean in means:
            mean += 0.1 * (batch_mean - mean)
        averages = [decay * old + (1 - decay) * new for old, new in zip(averages, (w, mean))]
    return w, mean, *averages


def test_another_optimizer_and_buffers_train_and_resume(tmp_path):
    optim = OptimSettings(batch_size=4, blr=1.0, warmup_epochs=0.5, ema=0.75)
    how = {"optim": optim, "micro_batches": 2, "optimizer": momentum}
    run(tmp_path / "whole", batches_from(), model=Centred(), **how)
    whole = Checkpoints(tmp_path / "whole").load()
    states = [whole[kept][name].item() for kept in ("model", "average") for name in ("w", "mean")]
    assert states == pytest.approx(slow_centred(0.75), rel=1e-5)
    with pytest.raises(InputError):
        run(tmp_path / "parts", batches_from(bad_at=30), model=Centred(), **how)
    run(tmp_path / "parts", batches_from(), model=Centred(), **how)
    parts = Checkpoints(tmp_path / "parts").load()
    for kept in ("model", "average"):
        assert parts[kept] == whole[kept]
    assert parts["optimizer"]["state"] == whole["optimizer"]["state"]


BOXES = [{"boxes": torch.ones(n, 4), "of": (torch.tensor(n), [])} for n in range(3)]


def test_a_tree_of_targets_keeps_its_structure_on_the_device():
    """The device is torch's meta device."""
    batch = Batch(torch.zeros(3), BOXES, torch.arange(3), [])
    images, positions, targets = on_device(batch, torch.device("meta"))
    assert images.is_meta and positions.is_meta and len(targets) == 3
    for n, target in enumerate(targets):
        assert target["boxes"].is_meta and target["boxes"].shape == (n, 4)
        assert type(target["of"]) is tuple and target["of"][0].is_meta and target["of"][1] == []


def test_a_model_may_train_on_a_tree_of_targets(tmp_path):
    class Counts(Line):
        def forward(self, images, positions, targets):
            labels = torch.stack([target["boxes"].sum() for target in targets])
            return super().forward(images, positions, labels)

    def stream(start, micro_batches):
        for batch in batches_from()(start, micro_batches):
            yield batch._replace(targets=[{"boxes": torch.ones(3, int(n))} for n in batch.images])

    assert run(tmp_path / "tree", stream, model=Counts())[0] == run(tmp_path / "labels")[0]
