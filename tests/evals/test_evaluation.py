"""The record of every grader says which weights and which images its numbers come from."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
from graders import GRADERS, KINDS, short

from ldae import tree
from ldae.backbones.open import load_backbone, load_classifier
from ldae.commands.export import export
from ldae.commands.finetune import finetune
from ldae.commands.knn import knn
from ldae.commands.retrieve import RetrievalProtocol, retrieve
from ldae.data.label_maps import open_map_splits
from ldae.data.open import open_splits
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.neighbours import KNNProtocol
from ldae.files import state_hash

SETUP = Setup(workers=0, device="cpu")


def check(record: dict, model, splits) -> None:
    assert record["backbone"]["sha256"] == state_hash(model.state_dict())
    assert record["backbone"]["images_seen"] == 8
    found = [record["data"][name] for name in ("fingerprint", "eval_fingerprint")]
    assert found == [split.fingerprint() for split in splits]


@pytest.mark.parametrize(("verb", "name"), KINDS)
def test_every_record_names_weights_and_images(verb, name, run, data, classifier, tmp_path):
    grader = GRADERS[verb]
    is_classifier = grader.takes("classifier")
    spec = str(classifier if is_classifier else run())
    splits = open_splits(str(data), None)
    if verb == "segment":
        data = data.with_name("maps")
        splits = open_map_splits(str(data), None)
    setup = replace(SETUP, out=tmp_path / "out")
    record = grader.function(spec, str(data), protocol=short(verb, name), setup=setup)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["data"] == record["data"]
    model = (load_classifier if is_classifier else load_backbone)(spec)
    check(record, model, splits if grader.takes("eval_data") else splits[1:] * 2)


@pytest.mark.parametrize("verb", GRADERS)
def test_no_evaluation_is_written_into_the_folder_of_a_run(verb, run, data, classifier):
    """`ldae linear RUN --out RUN` removed the run's checkpoints after its own training."""
    folder = run()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    spec = str(classifier if GRADERS[verb].takes("classifier") else folder)
    with pytest.raises(InputError, match="is the folder of a run") as raised:
        GRADERS[verb].function(spec, str(data), setup=replace(SETUP, out=folder))
    assert str(folder / "evals" / verb) in str(raised.value)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LEARNING = [verb for verb, grader in GRADERS.items() if grader.takes("eval_data")]


@pytest.mark.parametrize("verb", [*LEARNING, "finetune"])
def test_no_images_are_graded_that_are_learned_from(verb, run, data, short_tuning, tmp_path):
    """A folder without splits that was named twice gave k-NN an accuracy of 100 %."""
    whole, out = data / "train", tmp_path / "out"
    if verb == "finetune":
        changes = {"data.eval_source": str(whole)}
        grade = partial(finetune, tree.replace(short_tuning(run(), whole), changes), out)
    else:
        if verb == "segment":
            pairs = data.with_name("maps")
            whole = tmp_path / "pairs"
            for part in ("images", "labels"):
                shutil.copytree(pairs / part / "train", whole / part)
        setup = replace(SETUP, out=out)
        grade = partial(GRADERS[verb].function, str(run()), whole, whole, setup=setup)
    with pytest.raises(InputError, match="the images to grade on, of .*, are those to learn from"):
        grade()
    assert not out.exists()


def test_leave_one_out_grades_the_images_that_it_searches(data, tmp_path):
    setup, whole = replace(SETUP, out=tmp_path / "out"), data / "train"
    found = knn("pixels:8", whole, protocol=KNNProtocol(k=(1,), leave_one_out=True), setup=setup)
    assert found["data"]["fingerprint"] == found["data"]["eval_fingerprint"]
    protocol = RetrievalProtocol(k=(1,), leave_one_out=True)
    assert retrieve("pixels:8", whole, protocol=protocol, setup=setup)["data"] == found["data"]


def test_a_fine_tuning_names_the_weights_that_it_wrote(run, data, short_tuning, tmp_path):
    record = finetune(short_tuning(run(), data), tmp_path / "tuned")
    check(record, load_classifier(tmp_path / "tuned"), open_splits(str(data), None))


def test_an_export_is_graded_as_its_run(run, data, tmp_path):
    """The untrained control has seen no images."""
    folder = run()
    export(folder, tmp_path / "exported")
    setup = replace(SETUP, out=tmp_path / "out")
    records = [
        knn(str(spec), str(data), protocol=KNNProtocol(k=(1,)), setup=how)
        for spec in (folder, tmp_path / "exported")
        for how in (setup, replace(setup, random_init=True))
    ]
    one, control, two, same_control = (record["backbone"] for record in records)
    assert one["sha256"] == two["sha256"] and one["images_seen"] == two["images_seen"] == 8
    assert control["sha256"] == same_control["sha256"] != one["sha256"]
    assert control["images_seen"] is same_control["images_seen"] is None
    assert one["timestep"] == two["timestep"] == 10
    assert control["timestep"] is same_control["timestep"] is None


def test_a_record_says_what_the_features_are(run, data, tmp_path):
    folder = run()
    export(folder, tmp_path / "at 500", timestep=500)
    export(folder, tmp_path / "white", whiten=data, whiten_shrinkage=0.5, device="cpu")
    facts = ("architecture", "global_pool", "timestep", "whitened")

    def described(spec, **given) -> tuple:
        setup = replace(SETUP, out=tmp_path / "out", **given)
        record = knn(str(spec), str(data), protocol=KNNProtocol(k=(1,)), setup=setup)
        return tuple(record["backbone"][fact] for fact in facts)

    vit = "vit_tiny_patch16_224"
    assert described(tmp_path / "at 500") == (vit, "avg", 500, False)
    assert described(tmp_path / "white") == (vit, "avg", 10, True)
    random = {"random_init": True, "img_size": 16}
    assert described("test_vit", **random) == ("test_vit", "token", None, False)
    assert described("test_resnet", **random) == ("test_resnet", "avg", None, False)
    assert described("pixels:8") == ("pixels", None, None, False)


def test_a_folder_at_home_is_found_where_no_shell_has_named_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Setup(out="~/suite").out == tmp_path / "suite"
