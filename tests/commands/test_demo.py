import json

import pytest

from ldae.commands import demo
from ldae.errors import InputError


@pytest.fixture
def stage(monkeypatch):
    """stage(scores): replace the commands of the demo, with given scores of the backbones."""

    def replace(scores: dict[str, float]) -> None:
        monkeypatch.setattr(demo, "pretrain", lambda config, run, row: run.mkdir(parents=True))
        monkeypatch.setattr(demo, "export", lambda run, out: out.mkdir())

        def grade(backbone, labels, *, setup, **protocol):
            name = backbone.split("/")[-1] + ("-random" if setup.random_init else "")
            return {"results": {"top1_k20": scores[name], "top1": scores[name] + 1}}

        monkeypatch.setattr(demo, "knn", grade)
        monkeypatch.setattr(demo, "linear", grade)

    return replace


SCORES = {"pixels": 10.0, "exported-random": 20.0, "run": 30.0, "exported": 30.0}


def test_the_demo_prints_a_table_and_paths(stage, tmp_path, capsys):
    stage(SCORES)
    table = demo.demo(tmp_path / "run")
    assert list(table.values()) == [[10, 11], [20, 21], [30, 31], [30, 31]]
    assert json.loads((tmp_path / "run" / "demo.json").read_text()) == table
    out = capsys.readouterr().out
    for part in ("raw pixels", "30.0    31.0", "denoised.png", "filters.png", "exported"):
        assert part in out


@pytest.mark.parametrize("epochs, warmup", [(2.5, 0.5), (0.5, 0.25)])
def test_the_warm_up_of_a_demo_ends_before_the_demo(epochs, warmup, stage, tmp_path, monkeypatch):
    stage(SCORES)
    configs = []
    monkeypatch.setattr(demo, "pretrain", lambda config, run, row: configs.append(config))
    (tmp_path / "run").mkdir()
    demo.demo(tmp_path / "run", epochs)
    assert (configs[0].optim.epochs, configs[0].optim.warmup_epochs) == (epochs, warmup)


def test_an_export_with_another_score_is_refused(stage, tmp_path):
    stage(SCORES | {"exported": 29.0})
    with pytest.raises(InputError, match="exported backbone scores .*29.0.*run .*30.0"):
        demo.demo(tmp_path / "run")
