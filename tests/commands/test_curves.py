"""ldae curves prints what a run measured, beside a reference run."""

import importlib.util
import json
from pathlib import Path

import pytest

from ldae import cli
from ldae.commands.curves import curves
from ldae.commands.pretrain import pretrain
from ldae.errors import InputError
from ldae.runs import curves as saved
from ldae.runs.metrics import read_records

TOOL = Path(__file__).parents[2] / "tools" / "reference_curve.py"
_spec = importlib.util.spec_from_file_location("reference_curve", TOOL)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)


@pytest.fixture
def run(tiny, tmp_path):
    """run(name, **changes): a run of 128 images that measured its features eight times."""

    def make(name: str = "run", **changes) -> Path:
        watched = {"system__watch_every": 16, "system__log_every": 2, "optim__epochs": 2}
        pretrain(tiny(**watched | changes), tmp_path / name, "l_dae")
        return tmp_path / name

    return make


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the reference curves, empty."""
    for module in (saved, tool):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "curves")
    return tmp_path / "curves"


def test_a_run_beside_itself_has_the_same_values_and_settings(run, folder, capsys):
    path = run()
    assert tool.main([str(path), "mine"]) == 0
    capsys.readouterr()
    assert cli.main(["curves", str(path), "--beside", "mine"]) == 0
    out = capsys.readouterr().out
    assert "mine is l_dae on scattered-digits:64. Its settings are the same.\n" in out
    rows = [line.split() for line in out.splitlines()[2:10]]
    assert [row[0] for row in rows] == [str(images) for images in range(16, 129, 16)]
    watched = [record for record in read_records(path) if "rankme" in record]
    for row, record in zip(rows, watched, strict=True):
        assert row[2] == f"{record['loss']:.4g}"
        for own, other in zip(row[2::2], row[3::2], strict=True):
            assert float(other.strip("()")) == pytest.approx(float(own), rel=1e-3)


def test_settings_that_differ_and_symptoms_are_listed(run, folder, capsys):
    assert tool.main([str(run("reference")), "healthy"]) == 0
    path = run("still", optim__blr=1e-12)
    capsys.readouterr()
    curves(path, beside="healthy")
    out = capsys.readouterr().out
    assert "Settings that differ: optim.blr 0.01 there, 1e-12 here\n" in out
    assert out.count("the run stands still") == 1
    assert "cannot be compared" not in out and "ends at" not in out
    curves(path)
    assert "reference runs: healthy (--beside NAME)" in capsys.readouterr().out


def test_another_row_names_first_what_makes_its_losses_others(run, folder, capsys):
    assert tool.main([str(run("reference")), "healthy"]) == 0
    changes = {"optim__epochs": 4, "data__flip": True, "optim__blr": 2e-3, "optim__ema": 0.9}
    changes |= {"noise__max_sigma": 0.5, "objective__target": "normalized"}
    path = run("other", **changes)
    capsys.readouterr()
    curves(path, beside="healthy")
    below = capsys.readouterr().out.partition("healthy is ")[2]
    settings, losses, end, *_ = below.splitlines()
    named = [part.split()[0] for part in settings.partition("differ: ")[2].split("; ")]
    assert named[:3] == ["noise.max_sigma", "objective.target", "data.flip"] and len(named) == 6
    assert losses == "losses cannot be compared: objective.target 'image' there, 'normalized' here"
    assert end == "healthy ends at 128 images"


def test_a_reference_is_interpolated_inside_of_its_curve_alone():
    records = [{"images": 10, "loss": 1.0}, {"images": 20}, {"images": 30, "loss": 0.5}]
    values = [saved.interpolate(records, "loss", images) for images in (5, 10, 20, 30, 31)]
    assert values == [None, 1.0, 0.75, 0.5, None]
    assert saved.interpolate(records, "rankme", 10) is None


def test_long_curves_are_thinned_to_measurements_with_both_ends():
    records = [{"images": n} | ({"rankme": 1.0} if n % 10 == 0 else {}) for n in range(1, 1001)]
    picked = [record["images"] for record in saved.pick(records, 11)]
    assert len(picked) == 11 and picked[0] == 10 and picked[-1] == 1000
    assert all(images % 10 == 0 for images in picked)
    assert len(saved.pick(records[:5], 11)) == 5
    assert saved.pick(records[:1], 11) == records[:1] and saved.pick([], 11) == []


def test_wrong_runs_and_names_are_refused(run, folder, tmp_path):
    with pytest.raises(InputError, match="nowhere holds no run with metrics"):
        curves(tmp_path / "nowhere")
    path = run(system__watch_every=0)
    assert tool.main([str(path), "blind"]) == 2
    folder.mkdir()
    (folder / "l_dae-demo.json").write_text("{}")
    with pytest.raises(InputError, match="no reference curve 'l_dae'; the nearest is 'l_dae-demo'"):
        curves(path, beside="l_dae")


def test_a_reference_names_no_folder(run, folder, pictures, tmp_path):
    source = pictures(16)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(16):
        source.image(number).save(images / f"{number}.png")
    path = run(data__source=str(images), tokenizer__fit_images=16)
    assert tool.main([str(path), "mine"]) == 0
    text = (folder / "mine.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["settings"]["data.source"] == "images"


@pytest.mark.parametrize("name", saved.references())
def test_the_references_of_the_package_can_be_printed(name):
    reference = saved.read_reference(name)
    assert len(reference["records"]) > 2 and reference["settings"]["data.source"]
    assert {"images", "loss", "rankme"} <= reference["records"][-1].keys()
