import json
import sys
from types import SimpleNamespace

import pytest

from ldae.data.open import open_source
from ldae.errors import InputError
from ldae.runs.folder import open_run
from ldae.runs.metrics import Metrics, progress_line
from ldae.tree import flatten

RECORD = {
    "images": 512, "epoch": 0.5, "loss": 0.25, "lr": 1e-3,
    "images_per_second": 100.0, "data_wait": 0.02, "skipped": 0,
}  # fmt: skip


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_records_after_the_last_checkpoint_are_dropped(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for images in (128, 256, 384):
        metrics.write({"images": images})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'\x00\xff no text\n{"images": 51')  # a line that a kill cut in half
    Metrics(tmp_path, 256).close()
    assert [line["images"] for line in lines(tmp_path)] == [128, 256]


def test_a_line_of_progress_shows_loss_speed_wait_and_time_left():
    line = progress_line(RECORD, total=1512)
    for part in (
        "512/1,512",
        "epoch 0.50",
        "loss 0.2500",
        "100 images/s",
        "waiting for data 2%",
        "00:00:10",
    ):
        assert part in line


def test_tensorboard_events_are_written(tmp_path):
    metrics = Metrics(tmp_path, 0, tensorboard=True)
    metrics.write(RECORD)
    metrics.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(512, 0.25)]


@pytest.fixture
def wandb(monkeypatch):
    """A fake client that keeps what it is called with."""
    calls = []

    class Run:
        def log(self, record, step):
            calls.append((record, step))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return calls


def test_a_run_folder_is_one_run_of_wandb_with_its_settings(tmp_path, tiny, wandb):
    """Two places with folders of the same name are two runs there; a resumed run goes on."""
    settings = tiny(optim__blr=0.25, data__mean=(0.5, 0.25, 0.5))
    source = open_source("scattered-digits:64", "train")

    def log(run, config=settings):
        with open_run(run, "pretraining", config, source, "cpu"):
            metrics = Metrics(run, 0, wandb="project")
            metrics.write(RECORD)
            metrics.close()
        opened, *rest = wandb
        wandb.clear()
        assert rest == [(RECORD, 512), "finished"]
        return opened

    first, second, again = (log(tmp_path / place / "run") for place in ("a", "b", "a"))
    assert first == again and first["id"] != second["id"] and "run" not in first["id"]
    assert first["project"] == "project" and first["name"] == "run" and first["resume"] == "allow"
    assert first["config"] == {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flatten(settings).items()
    } | {"kind": "pretraining"}
    other = log(tmp_path / "a" / "run", tiny(optim__blr=0.5))
    assert other["id"] != first["id"], "a run that begins again with other settings is another one"
    assert other["config"]["optim.blr"] == 0.5


@pytest.mark.parametrize(
    "extra, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_logger_that_is_not_installed_is_refused(tmp_path, monkeypatch, extra, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"system.{extra} needs .*ldae\[{extra}\]"):
        Metrics(tmp_path, 0, **{extra: "project" if extra == "wandb" else True})
