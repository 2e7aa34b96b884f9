"""The table holds the results of the cells' files; a cell is run once, and fails alone."""

import csv
import json
import os
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from tyro.conf import Fixed

from ldae import cli, distributed
from ldae.backbones.open import load_backbone
from ldae.backbones.preprocessing import preprocessing
from ldae.commands.evaluate import evaluate
from ldae.commands.retrieve import RetrievalProtocol, retrieve
from ldae.commands.validate import ValidationProtocol
from ldae.errors import InputError, LostRank
from ldae.evals import features
from ldae.evals.evaluation import Setup
from ldae.evals.neighbours import KNNProtocol
from ldae.files import write_json
from ldae.train.interrupt import Interrupted

SUITE = """
[data.digits]
train = "digits"
[data.same]
train = "digits"
eval = "digits"
[protocols.knn]
k = [5]
temperature = 0.1
[protocols.retrieve]
k = [1]
data = ["same"]
"""


@pytest.fixture
def called(monkeypatch):
    """The cells that fake commands computed; ``stops`` holds what they raise instead."""
    made = []

    def grader(kind):
        def grade(backbone, /, data, eval_data=None, *, protocol: kind, setup: Setup):
            made.append(str(setup.out.relative_to(setup.out.parents[2])))
            if made[-1] in called_by.stops:
                raise called_by.stops[made[-1]]
            number = {protocol.headline: 10.0 + len(made)}
            record = {"results": number | {"converged": True, "sweep": [1]}}
            write_json(setup.out / "results.json", record)
            return record

        return grade

    monkeypatch.setattr("ldae.commands.knn.knn", grader(KNNProtocol))
    monkeypatch.setattr("ldae.commands.retrieve.retrieve", grader(RetrievalProtocol))
    parts = {"made": made, "stops": {}, "grader": staticmethod(grader)}
    called_by = type("Called", (), parts)
    return called_by


def numbers(folder) -> tuple[dict, dict, str]:
    """Return table.json and table.csv by cell and metric, and the text of table.md."""
    entries = json.loads((folder / "table.json").read_text())["cells"]
    first = {
        (one["backbone"], one["data"], one["protocol"], metric): value
        for one in entries
        for metric, value in (one["results"] or {}).items()
    }
    lines = csv.DictReader((folder / "table.csv").read_text().splitlines())
    second = {
        (one["backbone"], one["data"], one["protocol"], one["metric"]): float(one["value"])
        for one in lines
    }
    return first, second, (folder / "table.md").read_text()


def test_a_suite_opens_each_backbone_once(suite, setup, monkeypatch):
    opened, load = [], load_backbone

    def counted(spec, **settings):
        opened.append(spec)
        return load(spec, **settings)

    monkeypatch.setattr("ldae.evals.open.load_backbone", counted)
    evaluate(("pixels:8", "pixels:4"), suite=suite, setup=setup)
    assert opened == ["pixels:8", "pixels:4"]


def test_the_table_holds_the_results_of_the_cells_files(suite, setup, capsys):
    table = evaluate(("pixels:8", "pixels:4"), suite=suite, setup=setup)
    by_json, by_csv, text = numbers(setup.out)
    assert table == json.loads((setup.out / "table.json").read_text())
    wanted = {}
    for cell in table["cells"]:
        record = json.loads((setup.out / cell["file"]).read_text())
        assert record["backbone"]["spec"] == cell["spec"]
        assert record["suite"]["weights"] == record["backbone"]["sha256"]
        for name in ("fingerprint", "eval_fingerprint"):
            assert record["suite"][name] == record["data"][name]
        for metric, value in record["results"].items():
            wanted[cell["backbone"], cell["data"], cell["protocol"], metric] = value
    assert len(table["cells"]) == 6 and by_json == by_csv == wanted
    assert by_json["pixels-8", "digits", "knn", "top1_k5"] > 90
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[0] == ["data", "backbone", "knn: top1_k5", "retrieve: mean_average_precision"]
    for data, backbone, knn, precision in lines[2:]:
        assert float(knn) == round(by_json[backbone, data, "knn", "top1_k5"], 2)
        key = (backbone, data, "retrieve", "mean_average_precision")
        assert precision == (f"{by_json[key]:.2f}" if data == "same" else "")
    assert [line[:2] for line in lines[2:]] == [
        [data, backbone] for data in ("digits", "same") for backbone in ("pixels-8", "pixels-4")
    ]
    printed = capsys.readouterr().out
    assert "cell 1 of 6: knn of pixels-8 on digits\n" in printed and "cell 6 of 6" in printed


def test_a_table_leaves_a_headline_out_that_the_images_do_not_allow(suite, setup):
    suite.write_text('[data.few]\ntrain = "scattered-digits:15"\n[protocols.knn]\n')
    evaluate(("pixels:8",), suite=suite, setup=setup)
    by_json, _, text = numbers(setup.out)
    assert {metric for *_, metric in by_json} == {"top1_k10", "top5_k10"}
    assert "knn: top1_k20" in text and "| few | pixels-8 | - |" in text


def test_published_numbers_stand_beside_the_results_and_decide_nothing(suite, setup, called):
    backbone = "[[backbones]]\nspec = 'pixels:4'\npublished.same = { knn = 74.5 }\n"
    suite.write_text(backbone + SUITE)
    table = evaluate(("pixels:8",), suite=suite, setup=setup)
    by_json, by_csv, text = numbers(setup.out)
    assert by_csv == by_json | {("pixels-4", "same", "knn", "published"): 74.5}
    published = [(c["backbone"], c["data"], c["published"]) for c in table["cells"]]
    assert [one for one in published if one[2]] == [("pixels-4", "same", 74.5)]
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[0][2:] == [
        "knn: top1_k5", "knn: published", "retrieve: mean_average_precision"
    ]  # fmt: skip
    assert [line[3] for line in lines[2:]] == ["", "", "", "74.5"]
    suite.write_text((backbone + SUITE).replace("74.5", "75"))
    count = len(called.made)
    evaluate(("pixels:8",), suite=suite, setup=setup)
    assert len(called.made) == count and "| 75.0 |" in (setup.out / "table.md").read_text()


def test_cells_of_a_backbone_and_a_data_set_share_features(suite, setup, monkeypatch):
    """The numbers equal those of each command by itself."""
    extracted, original = [], features.encode_share

    def encode_share(encoder, source, *how):
        extracted.append(source.split)
        return original(encoder, source, *how)

    monkeypatch.setattr(features, "encode_share", encode_share)
    table = evaluate(("pixels:8", "pixels:4"), suite=suite, setup=setup)
    assert len(extracted) == 2 * 2 * 2  # backbones, data sets, splits; and not by protocols
    protocol, own = RetrievalProtocol(k=(1,)), replace(setup, out=setup.out / "alone")
    alone = retrieve("pixels:4", "digits", protocol=protocol, setup=own)
    assert table["cells"][-1]["results"] == alone["results"] and len(extracted) == 10


def test_finished_cells_are_skipped_and_changed_cells_run_again(suite, setup, called, capsys):
    first = evaluate(("pixels:8",), suite=suite, setup=setup)
    assert len(called.made) == 3
    assert evaluate(("pixels:8",), suite=suite, setup=setup) == first and len(called.made) == 3
    assert "cell 2 of 3: knn of pixels-8 on same, finished before\n" in capsys.readouterr().out
    faster = Setup(in_chans=1, workers=1, device="cpu", out=setup.out, batch_size=9)
    evaluate(("pixels:8",), suite=suite, setup=faster)
    assert len(called.made) == 3  # which change no number

    suite.write_text(SUITE.replace("temperature = 0.1", "temperature = 0.2"))
    evaluate(("pixels:8",), suite=suite, setup=setup)
    assert called.made[3:] == ["pixels-8/digits/knn", "pixels-8/same/knn"]
    suite.write_text(suite.read_text().replace('eval = "digits"', ""))
    evaluate(("pixels:8",), suite=suite, setup=setup)
    assert called.made[5:] == ["pixels-8/same/knn", "pixels-8/same/retrieve"]
    (setup.out / "pixels-8" / "same" / "knn" / "results.json").write_text("{")
    table = evaluate(("pixels:8",), suite=suite, setup=setup)
    assert called.made[7:] == ["pixels-8/same/knn"]
    assert [cell["results"][cell["headline"]] for cell in table["cells"]] == [14, 18, 17]


def test_other_weights_under_the_same_name_are_graded_again(suite, setup, called, monkeypatch):
    suite.write_text("[data.d]\ntrain = 'digits'\n[protocols.knn]")
    evaluate(("pixels:8",), suite=suite, setup=setup)
    monkeypatch.setattr("ldae.evals.running.state_hash", lambda state: "other")
    evaluate(("pixels:8",), suite=suite, setup=setup)
    assert len(called.made) == 2


def test_another_preprocessing_of_the_same_weights_is_graded_again(
    suite, setup, called, monkeypatch
):
    suite.write_text("[data.d]\ntrain = 'digits'\n[protocols.knn]")
    for size in (8, 8, 16):
        other = replace(preprocessing(load_backbone("pixels:8")), input_size=(3, size, size))
        monkeypatch.setattr("ldae.evals.running.preprocessing", lambda _, other=other: other)
        evaluate(("pixels:8",), suite=suite, setup=setup)
    assert len(called.made) == 2


def test_cells_that_the_table_loses_are_named(suite, setup, called, capsys):
    suite.write_text("[data.d]\ntrain = 'digits'\n[protocols.knn]")
    sentence = "1 cells of another suite or other backbones, such as pixels-8/d/knn"
    evaluate(("pixels:8",), suite=suite, setup=setup)
    evaluate(("pixels:8", "pixels:16"), suite=suite, setup=setup)
    assert sentence not in capsys.readouterr().out
    evaluate(("pixels:16",), suite=suite, setup=setup)
    assert sentence in capsys.readouterr().out


def test_other_images_under_the_same_name_are_graded_again(suite, setup, called, tmp_path):
    for name in ("train/a/1", "train/b/2", "val/a/3", "val/b/4"):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 9).save(path)
    suite.write_text(f"{SUITE}\n[data.folder]\ntrain = '{tmp_path / 'images'}'")
    for _ in range(2):
        evaluate(("pixels:8",), suite=suite, setup=setup)
    assert len(called.made) == 4
    for number, split in ((5, "train/a/1"), (6, "val/b/4")):
        path = tmp_path / "images" / f"{split}.png"
        status = path.stat()
        Image.new("L", (8, 8), 8).save(path)  # of the same size
        assert path.stat().st_size == status.st_size
        os.utime(path, (status.st_atime, status.st_mtime + number))
        evaluate(("pixels:8",), suite=suite, setup=setup)
        assert called.made[4:] == ["pixels-8/folder/knn"] * (number - 4)


def test_another_version_of_a_protocol_is_another_cell(suite, setup, called, monkeypatch):
    @dataclass(frozen=True)
    class NextVersion(RetrievalProtocol):
        version: Fixed[int] = RetrievalProtocol.version + 1

    evaluate(("pixels:8",), suite=suite, setup=setup)
    monkeypatch.setattr("ldae.commands.retrieve.retrieve", called.grader(NextVersion))
    evaluate(("pixels:8",), suite=suite, setup=setup)
    assert called.made[3:] == ["pixels-8/same/retrieve"]


def test_a_cell_fails_alone(suite, setup, called, capsys):
    called.stops |= {
        "pixels-8/digits/knn": InputError("the disk is full"),
        "pixels-8/same/knn": RuntimeError("out of memory\nat line 3"),
    }
    argv = ["evaluate", "pixels:8", "--suite", str(suite), "--out", str(setup.out)]
    argv += ["--in-chans", "1", "--workers", "0", "--device", "cpu"]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert "ldae: knn of pixels-8 on digits: the disk is full\n" in err
    # `ldae jobs` shows the last line.
    assert "2 of 3 cells failed, the first with: the disk is full; " in err.splitlines()[-1]
    by_json, _, text = numbers(setup.out)
    assert list(by_json) == [("pixels-8", "same", "retrieve", "mean_average_precision")]
    assert len(called.made) == 3
    assert text.count("| failed |") == 2 and "- knn of pixels-8 on digits: the disk is full" in text
    assert "RuntimeError: out of memory\n" in text
    called.stops.clear()
    assert cli.main(argv) == 0
    assert called.made[3:] == ["pixels-8/digits/knn", "pixels-8/same/knn"]
    assert "Failed" not in (setup.out / "table.md").read_text()


def test_a_backbone_that_cannot_be_opened_fails_alone(suite, setup, called):
    with pytest.raises(InputError, match="3 of 6 cells failed"):
        evaluate(("no_such_model", "pixels:8"), suite=suite, setup=setup)
    cells = json.loads((setup.out / "table.json").read_text())["cells"]
    assert ["no timm model" in (cell["error"] or "") for cell in cells] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted(15, "it is saved")])
def test_after_an_interrupt_the_same_command_continues(stop, suite, setup, called):
    """The command is killed, or ends itself once it has saved."""
    called.stops["pixels-8/same/knn"] = stop
    with pytest.raises(type(stop)):
        evaluate(("pixels:8",), suite=suite, setup=setup)
    by_json, _, text = numbers(setup.out)
    assert len(by_json) == 1 and text.count("to do") == 2
    called.stops.clear()
    evaluate(("pixels:8",), suite=suite, setup=setup)
    assert called.made[2:] == ["pixels-8/same/knn", "pixels-8/same/retrieve"]


def test_results_that_were_cut_short_are_computed_again(suite, setup, called):
    """The grader had written its results, but the suite had not added the cell's key."""
    evaluate(("pixels:8",), suite=suite, setup=setup)
    path = setup.out / "pixels-8" / "digits" / "knn" / "results.json"
    record = json.loads(path.read_text())
    for damage in ({"suite": None}, {"results": None}, {"results": [1]}):
        path.write_text(json.dumps(record | damage))
        evaluate(("pixels:8",), suite=suite, setup=setup)
    assert called.made[3:] == ["pixels-8/digits/knn"] * 3


def test_out_is_required(suite):
    with pytest.raises(InputError, match="say where the table goes: --out DIR"):
        evaluate(("pixels:8",), suite=suite)


def test_a_classifier_is_graded_on_the_images_of_eval(tmp_path, setup, monkeypatch):
    """The grader learns from no images. Another head on the same backbone is another cell."""
    given = []

    def validate(classifier, /, data, *, protocol: ValidationProtocol, setup: Setup):
        given.append((classifier, data, protocol.real_labels))
        return {"results": {"top1": 1.0}}

    monkeypatch.setattr("ldae.commands.validate.validate", validate)
    model = timm.create_model("test_vit", num_classes=3, img_size=16)
    heads = iter([model.state_dict(), model.state_dict(), {"head.bias": torch.ones(3)}])
    loaded = SimpleNamespace(state_dict=lambda: next(heads))
    monkeypatch.setattr("ldae.evals.open.load_classifier", lambda *_, **__: loaded)
    path = tmp_path / "my.toml"
    path.write_text(
        "[data.a]\ntrain = 'digits'\n[data.b]\ntrain = 'x'\neval = 'scattered-digits:9'\n"
        "[protocols.validate]\nreal_labels = true\ndata = ['b']"
    )
    for times in (1, 1, 2):
        evaluate(("somewhere",), suite=path, setup=setup)
        assert given == [("somewhere", "scattered-digits:9", True)] * times
    path.write_text(path.read_text().replace("['b']", "['a']"))
    heads = iter([{}])
    evaluate(("somewhere",), suite=path, setup=setup)
    assert given[-1] == ("somewhere", "digits", True)


@pytest.mark.parametrize("error", [LostRank("rank 1 hangs"), RuntimeError("gloo/x.cc: closed")])
def test_a_lost_rank_is_no_cells_fault(error, suite, setup, called):
    called.stops["pixels-8/same/knn"] = error
    with pytest.raises(type(error)) as caught:
        evaluate(("pixels:8",), suite=suite, setup=setup)
    assert caught.value is error and len(called.made) == 2


@pytest.mark.parametrize("failing", [(1,), (0, 1)])
def test_ranks_fail_together(failing, suite, setup, monkeypatch, on_ranks):
    """A rank that fails alone ends all. If all of them fail, the other cells are still run."""

    def knn(backbone, /, data, eval_data=None, *, protocol: KNNProtocol, setup: Setup):
        if setup.out.parent.name == "digits" and distributed.rank() in failing:
            raise InputError(f"cuda:{distributed.rank()} has too little memory")
        distributed.barrier()
        return {"results": {protocol.headline: 50.0}}

    monkeypatch.setattr("ldae.commands.knn.knn", knn)
    monkeypatch.setattr(distributed, "_REPORT_SECONDS", 2.0)
    suite.write_text(SUITE.partition("[protocols.retrieve]")[0])
    one, two = on_ranks(lambda: evaluate(("pixels:8",), suite=suite, setup=setup), seconds=20)
    sentence = f"knn of pixels-8 on digits: cuda:{failing[0]} has too little memory"
    if len(failing) == 1:
        assert two == f"InputError: {sentence}"
        assert one == f"LostRank: rank 0 lost the other ranks: rank 1 reported: {sentence}"
    else:
        assert one == two.replace("cuda:1", "cuda:0")
        assert one.startswith("InputError: 1 of 2 cells failed")
        by_json, _, text = numbers(setup.out)
        assert len(by_json) == 1 and sentence in text


def test_ranks_that_see_different_files_run_the_same_cells(suite, setup, monkeypatch, on_ranks):
    """Rank 0 decides which cells are finished."""
    suite.write_text(SUITE.partition("[data.same]")[0] + "[protocols.knn]\nk = [1]")
    read = "ldae.evals.running._images"

    def knn(backbone, /, data, eval_data=None, *, protocol: KNNProtocol, setup: Setup):
        distributed.barrier()
        return {"results": {protocol.headline: 50.0}}

    monkeypatch.setattr("ldae.commands.knn.knn", knn)
    for seen in (["", ""], ["", "later"], ["later", "later"]):
        monkeypatch.setattr(read, lambda *_: seen[distributed.rank()])
        errors = on_ranks(lambda: evaluate(("pixels:8",), suite=suite, setup=setup), seconds=20)
        assert errors == ["", ""]
