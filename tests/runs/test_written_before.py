"""Half-done runs of older code are graded, and resume to the same end.

Commit 51f9c35 wrote the folders of ``written_before``: a pre-training, a tokenizer and a
fine-tuning, each stopped at image 64 of 128. ``expected.json`` holds their ends by that code.
Processors round differently, so numbers are compared to 1e-4. A lost moment of the optimizer,
another average or another seed change them by at least 1e-3.
"""

import json
import math
import shutil
from pathlib import Path
from statistics import mean

import pytest
from written import lines

from ldae import cli
from ldae.runs.checkpoints import Checkpoints

HERE = Path(__file__).parent / "written_before"
EXPECTED = json.loads((HERE / "expected.json").read_text())


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A copy of the folders, which becomes the working directory."""
    shutil.copytree(HERE, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def moved(run: str, part: str) -> float:
    """Return the L2 distance of the weights, or their average, from the half-done run's."""
    now, half = Checkpoints(Path(run)).load()[part], Checkpoints(HERE / run).load()[part]
    pairs = [(now[name], half[name]) for name in now if now[name].is_floating_point()]
    return math.sqrt(sum((a.double() - b.double()).square().sum().item() for a, b in pairs))


@pytest.mark.parametrize("run", ["pretraining", "tokenizer", "finetuning"])
def test_an_older_run_resumes_to_the_same_end(before, run):
    expected = EXPECTED[run]
    assert cli.main(expected["command"]) == 0
    records = lines(Path(run))
    assert records[-1].keys() == expected["metrics"].keys() | {"images_per_second", "data_wait"}
    assert records[-1]["images"] == expected["images_seen"] == 128
    # The older code had one record of the last four steps, and now each step has one.
    losses = [record["loss"] for record in records if record["images"] > 96]
    assert mean(losses) == pytest.approx(expected["loss"], rel=1e-4)
    assert moved(run, "model") == pytest.approx(expected["model_moved"]["norm"], rel=1e-4)
    if expected["average_moved"]:
        average = moved(run, "average")
        assert average == pytest.approx(expected["average_moved"]["norm"], rel=1e-4)


def test_an_older_run_is_graded(before):
    half = EXPECTED["pretraining"]["half"]["knn"]
    assert cli.main(half["command"]) == 0
    record = json.loads((before / "knn" / "results.json").read_text())
    assert record["results"] == pytest.approx(half["results"], abs=0.5)


def test_a_setting_that_contradicts_an_older_run_is_named(before, capsys):
    command = [*EXPECTED["pretraining"]["command"], "--optim.min-lr", "0.1"]
    assert cli.main(command) == 2
    assert "optim.min_lr is 0.0 there, 0.1 here" in capsys.readouterr().err


def test_an_older_run_of_a_conv_tokenizer_keeps_its_scale(before, capsys):
    """Its latents were scaled per axis, which was the default of every row."""
    command = ["fit-tokenizer", "no_adversarial", *EXPECTED["tokenizer"]["command"][2:-2]]
    command[command.index("--tokenizer.dim") + 1] = "8"
    command += ["--tokenizer.width", "8", "--run", "conv"]
    assert cli.main([*command, "--tokenizer.scale", "per-axis"]) == 0
    (before / "conv" / "tokenizer.safetensors").unlink()  # as of a run that is not finished
    assert cli.main(command) == 2
    assert "tokenizer.scale is 'per-axis' there, 'global' here" in capsys.readouterr().err
    assert cli.main(["fit-tokenizer", "conv/config.yaml", "--run", "conv"]) == 0
    assert "scale: per-axis" in (before / "conv" / "config.yaml").read_text()
