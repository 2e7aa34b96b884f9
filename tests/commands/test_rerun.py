"""A repeated evaluation has the same numbers, beside the first one, or it is said why not."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from graders import GRADERS, KINDS, short
from PIL import Image

import ldae
from ldae import cli
from ldae.commands.rerun import rerun
from ldae.errors import DifferentResult, InputError
from ldae.evals.augmented import _Probe
from ldae.runs.checkpoints import Checkpoints

SETUP = ldae.Setup(workers=0, device="cpu")
DIGITS = replace(SETUP, in_chans=1)


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def first(tmp_path):
    """The folder of a k-NN of raw pixels."""
    out = tmp_path / "first"
    protocol = ldae.KNNProtocol(k=(5, 20))
    setup = replace(DIGITS, out=out, seed=3)
    ldae.knn("pixels:8", "digits", protocol=protocol, predictions=True, setup=setup)
    return out


def edit(folder: Path, **changes) -> None:
    """Change entries of results.json, by their dotted names with __ for a dot."""
    path = folder / "results.json"
    record = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, key = name.split("__")
        part = record
        for parent in parents:
            part = part[parent]
        part[key] = value
    path.write_text(json.dumps(record))


def test_a_repetition_equals_the_first_to_the_bit_and_lies_beside_it(first, capsys):
    before = files_of(first)
    found = rerun(first / "results.json")
    assert found["verdict"] == "equal" and found["changed"] == []
    assert found == json.loads((first / "rerun" / "rerun.json").read_text())
    assert before == {path: path.read_bytes() for path in before}
    then, now = (json.loads((at / "results.json").read_text()) for at in (first, first / "rerun"))
    for part in then.keys() - {"environment"}:
        assert then[part] == now[part]
    assert found["numbers"].keys() == now["results"].keys()
    images = then["data"]["eval_images"]
    assert found["predictions"] == {"k5": [0, images], "k20": [0, images]}
    printed = capsys.readouterr().out
    assert "the same to the bit; " in printed and "top1_k20" in printed


def test_each_repetition_has_a_folder_of_its_own(first):
    (first / "rerun").mkdir()  # of a repetition that was interrupted
    for name in ("rerun", "rerun-2"):
        assert rerun(first)["now"] == str(first / name / "results.json")
    before = files_of(first)
    for out in (first, first / "rerun"):
        with pytest.raises(InputError, match="has results already: name a new folder"):
            rerun(first, out=out)
    assert files_of(first) == before


@pytest.mark.parametrize(("verb", "name"), KINDS)
def test_every_grader_can_be_repeated(verb, name, run, data, classifier, tmp_path):
    grader = GRADERS[verb]
    spec = classifier if grader.takes("classifier") else run()
    protocol = short(verb, name)
    if verb == "segment":
        protocol = replace(protocol, classes=3)
    source = data.with_name("maps") if verb == "segment" else data
    setup = replace(SETUP, out=tmp_path / "out", seed=2, batch_size=7)
    record = grader.function(spec, source, protocol=protocol, setup=setup)
    assert rerun(tmp_path / "out")["verdict"] == "equal"
    again = json.loads((tmp_path / "out" / "rerun" / "results.json").read_text())
    for part in ("protocol", "data", "call", "results"):
        assert again[part] == record[part]


def test_leave_one_out_can_be_repeated(tmp_path):
    protocol = ldae.KNNProtocol(k=(5,), leave_one_out=True, shots=(2,), draws=2)
    ldae.knn("pixels:8", "digits", protocol=protocol, setup=replace(DIGITS, out=tmp_path))
    assert rerun(tmp_path)["verdict"] == "equal"


@pytest.fixture
def tuned(run, data, short_tuning, tmp_path):
    """The folder of a fine-tuning."""
    ldae.finetune(short_tuning(run(), data, "ldae", seed=4), tmp_path / "tuned")
    return tmp_path / "tuned"


def test_a_fine_tuning_can_be_repeated(tuned):
    found = rerun(tuned)
    assert found["verdict"] == "equal" and found["changed"] == []
    one, other = (Checkpoints(at).load()["model"] for at in (tuned, tuned / "rerun"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_distance_can_be_repeated(tmp_path):
    file = tmp_path / "results.json"
    settings = ldae.FIDSettings(features="pixels:4", workers=0, device="cpu", out=file)
    ldae.fid("scattered-digits:120", "scattered-digits:160", setup=settings)
    found = rerun(tmp_path)
    assert found["verdict"] == "equal" and [*found["numbers"]] == ["frechet_distance"]


def train_more(folder: Path) -> None:
    """Give a run another checkpoint."""
    state = Checkpoints(folder).load()
    noise = torch.Generator().manual_seed(1)
    for name, value in state["model"].items():
        if value.is_floating_point() and name.startswith("denoiser"):
            state["model"][name] = value + torch.randn(value.shape, generator=noise)
    Checkpoints(folder).save(state | {"images_seen": state["images_seen"] + 8})


def test_other_weights_are_said(run, data, tmp_path):
    folder = run()
    ldae.knn(folder, data, protocol=ldae.KNNProtocol(k=(1,)), setup=replace(SETUP, out=tmp_path))
    train_more(folder)
    with suppress(DifferentResult):  # as many of ten images may be right by chance
        rerun(tmp_path)
    changed = f"the weights of {folder} have changed"
    comparison = json.loads((tmp_path / "rerun" / "rerun.json").read_text())
    assert comparison["changed"][0] == changed and changed in comparison["sentence"]


def test_other_images_are_said(data, tmp_path):
    setup = replace(SETUP, out=tmp_path)
    ldae.knn("pixels:8", data, protocol=ldae.KNNProtocol(k=(1,)), setup=setup)
    Image.new("RGB", (9, 9)).save(data / "val" / "0" / "more.png")
    with pytest.raises(DifferentResult, match=f"graded images of {data} have changed"):
        rerun(tmp_path)


def test_another_start_of_a_fine_tuning_is_said(tuned, tmp_path):
    start = tmp_path / "run-l_dae"
    train_more(start)
    with suppress(DifferentResult):
        rerun(tuned)
    changed = f"the weights of {start} have changed"
    comparison = json.loads((tuned / "rerun" / "rerun.json").read_text())
    assert comparison["changed"][0] == changed and changed in comparison["sentence"]


def test_a_changed_number_has_an_exit_status_of_its_own(first, capsys):
    then = json.loads((first / "results.json").read_text())["results"]["top1_k20"]
    edit(first, results__top1_k20=then - 1)
    assert cli.main(["rerun", str(first)]) == 1
    printed = capsys.readouterr()
    assert "different, and neither device, versions, weights nor images" in printed.err
    assert printed.err.count("different") == 1
    (line,) = [line for line in printed.out.splitlines() if line.startswith("top1_k20 ")]
    assert line.split()[1:] == [f"{then - 1:.4f}", f"{then:.4f}", "+1"]
    edit(first, environment__packages__torch="1.0")
    assert cli.main(["rerun", str(first)]) == 1
    assert "by more than a change of device or version explains: torch 1.0" in (
        capsys.readouterr().err
    )
    assert cli.main(["rerun", str(first), "--tolerance", "1"]) == 0
    assert "the same within what a change" in capsys.readouterr().out


def test_the_predictions_that_have_changed_are_counted(first):
    with np.load(first / "predictions.npz") as file:
        content = dict(file)
    content["k5"][:3] += 1
    np.savez_compressed(first / "predictions.npz", **content)
    images = len(content["names"])
    assert rerun(first)["predictions"] == {"k5": [3, images], "k20": [0, images]}


def test_a_repetition_that_was_interrupted_goes_on(data, tmp_path, interrupts):
    protocol = ldae.MAEProtocol(epochs=4, warmup_epochs=1, total_batch=15)
    ldae.linear("pixels:8", data, protocol=protocol, setup=replace(SETUP, out=tmp_path))
    calls = interrupts(_Probe, 5)
    with pytest.raises(ldae.Interrupted):
        rerun(tmp_path)
    assert not (tmp_path / "rerun" / "results.json").exists()
    assert rerun(tmp_path)["now"] == str(tmp_path / "rerun" / "results.json")
    assert len(calls) == 8  # updates, none of them twice


def test_another_device_is_taken_if_it_is_named(first):
    with pytest.raises(InputError, match="device must be auto, cpu, cuda or cuda:N, not 'tpu'"):
        rerun(first, device="tpu")
    edit(first, call__settings__setup__device="tpu")
    assert rerun(first, device="cpu")["verdict"] == "equal"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"results": 3}, "is no results.json of an evaluation"),
        ({"environment": None}, "is no results.json of an evaluation"),
        ({"call": 3}, "cannot be repeated: its call is damaged"),
        ({"call": {"command": "knn"}}, "cannot be repeated: its call is damaged"),
        ({"call__arguments": []}, "cannot be repeated: its call is damaged"),
        ({"call__command": "export"}, "cannot be repeated: ldae export is no evaluation"),
        ({"call__settings__speed": 3}, "knn has no setting 'speed'"),
        ({"call__settings__protocol__kk": 3}, "there is no setting 'kk'; the nearest is 'k'"),
        ({"call__settings__protocol__k": [0]}, "k must be at least 1, not 0"),
        ({"call__settings__protocol__version": 0}, "version 0 of the protocol dino, and this ldae"),
        ({"call__settings__setup__workers": "x"}, "'workers' takes int, not 'x'"),
    ],
)
def test_a_record_that_cannot_be_repeated_is_refused(changes, sentence, first, capsys):
    edit(first, **changes)
    before = files_of(first)
    assert cli.main(["rerun", str(first)]) == 2
    err = capsys.readouterr().err
    assert sentence in err and str(first / "results.json") in err and len(err.splitlines()) == 1
    assert files_of(first) == before


def test_a_record_of_an_older_ldae_is_answered_with_its_command(first, capsys):
    record = json.loads((first / "results.json").read_text())
    del record["call"]
    record["environment"]["command"] = ["ldae", "knn", "my run", "--data", "x"]
    (first / "results.json").write_text(json.dumps(record))
    assert cli.main(["rerun", str(first)]) == 2
    assert "its command was: ldae knn 'my run' --data x" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"results": {}}'])
def test_another_file_is_refused(text, tmp_path):
    file = tmp_path / "some.json"
    with pytest.raises(InputError, match="some.json cannot be read: No such file"):
        rerun(file)
    file.write_text(text)
    with pytest.raises(InputError, match="some.json is no results.json of an evaluation"):
        rerun(file)


def test_a_negative_tolerance_is_refused(first):
    with pytest.raises(InputError, match="tolerance must be at least 0, not -1"):
        rerun(first, tolerance=-1)


def test_ranks_repeat_together(first, on_ranks):
    """Another number of ranks is among what may explain a difference."""
    assert on_ranks(lambda: rerun(first)) == ["", ""]
    found = json.loads((first / "rerun" / "rerun.json").read_text())
    assert found["verdict"] in ("equal", "close")
    assert "ranks 1 then, 2 now" in found["explained"]
    assert not (first / "rerun-2").exists()
