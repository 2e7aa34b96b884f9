import json

import pytest

from ldae.commands import demo
from ldae.errors import InputError


@pytest.fixture
def stage(monkeypatch):
    """The demo with its verbs replaced: what each backbone scores is given."""

    def play(scores: dict[str, float]) -> None:
        monkeypatch.setattr(demo, "pretrain", lambda config, run, row: run.mkdir(parents=True))
        monkeypatch.setattr(demo, "export", lambda run, out: out.mkdir())

        def grade(backbone, labels, *, setup, **protocol):
            name = backbone.split("/")[-1] + ("-random" if setup.random_init else "")
            return {"results": {"top1_k20": scores[name], "top1": scores[name] + 1}}

        monkeypatch.setattr(demo, "knn", grade)
        monkeypatch.setattr(demo, "linear", grade)

    return play


SCORES = {"pixels": 10.0, "exported-random": 20.0, "run": 30.0, "exported": 30.0}


def test_it_ends_with_a_table_and_paths(stage, tmp_path, capsys):
    stage(SCORES)
    table = demo.demo(tmp_path / "run")
    assert list(table.values()) == [(10, 11), (20, 21), (30, 31), (30, 31)]
    assert json.loads((tmp_path / "run" / "demo.json").read_text()) == {
        name: list(pair) for name, pair in table.items()
    }
    told = capsys.readouterr().out
    for part in ("raw pixels", "30.0    31.0", "denoised.png", "filters.png", "exported"):
        assert part in told


def test_an_export_that_scores_otherwise_is_told(stage, tmp_path):
    stage(SCORES | {"exported": 29.0})
    with pytest.raises(InputError, match="exported backbone scores .*29.0.*run .*30.0"):
        demo.demo(tmp_path / "run")
