"""Runs that the code before the second plan of the house wrote, half done, are graded and resumed.

The folders of ``written_before`` are of commit 51f9c35: a pre-training, a tokenizer and a fine-tuning,
each stopped at image 64 of 128. ``expected.json`` holds how that code ended them. Another processor
rounds otherwise, so numbers are compared to 1e-4: a lost moment of the optimizer, another average or
another seed change them by 1e-3 and more.
"""

import json
import math
import shutil
from pathlib import Path

import pytest

from ldae import cli
from ldae.runs.checkpoints import Checkpoints

HERE = Path(__file__).parent / "written_before"
EXPECTED = json.loads((HERE / "expected.json").read_text())


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A copy of the folders, as the current one."""
    shutil.copytree(HERE, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def moved(run: str, part: str) -> float:
    """How far the weights, or their average, are from those of the half-done run: an L2 norm."""
    now, half = Checkpoints(Path(run)).load()[part], Checkpoints(HERE / run).load()[part]
    pairs = [(now[name], half[name]) for name in now if now[name].is_floating_point()]
    return math.sqrt(sum((a.double() - b.double()).square().sum().item() for a, b in pairs))


@pytest.mark.parametrize("run", ["pretraining", "tokenizer", "finetuning"])
def test_it_resumes_to_the_same_end(before, run):
    wanted = EXPECTED[run]
    assert cli.main(wanted["command"]) == 0
    last = json.loads(Path(run, "metrics.jsonl").read_text().splitlines()[-1])
    assert last.keys() == wanted["metrics"].keys() | {"images_per_second", "data_wait"}
    assert last["images"] == wanted["images_seen"] == 128
    assert last["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert moved(run, "model") == pytest.approx(wanted["model_moved"]["norm"], rel=1e-4)
    if wanted["average_moved"]:
        found = moved(run, "average")
        assert found == pytest.approx(wanted["average_moved"]["norm"], rel=1e-4)


def test_it_is_graded(before):
    half = EXPECTED["pretraining"]["half"]["knn"]
    assert cli.main(half["command"]) == 0
    record = json.loads((before / "knn" / "results.json").read_text())
    assert record["results"] == pytest.approx(half["results"], abs=0.5)


def test_a_setting_that_contradicts_it_is_named(before, capsys):
    command = [*EXPECTED["pretraining"]["command"], "--optim.min-lr", "0.1"]
    assert cli.main(command) == 2
    assert "optim.min_lr is 0.0 there, 0.1 here" in capsys.readouterr().err
