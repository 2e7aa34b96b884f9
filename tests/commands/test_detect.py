"""A detection: it learns, resumes bit for bit, and refuses what does not fit."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from written import assert_equal, lines, weights

from ldae import cli
from ldae.commands.detect import detect
from ldae.commands.rerun import rerun
from ldae.data.instances import encode
from ldae.data.scenes import scene_splits
from ldae.detection.network import DetectionLoss, Detector
from ldae.detection.open import load_detector
from ldae.detection.recipes import detect_config
from ldae.detection.scoring import average_precision
from ldae.detection.settings import DetectConfig
from ldae.errors import InputError
from ldae.runs.kinds import kind_of, settings_of
from ldae.train.interrupt import Interrupted

TINY = {
    "data.source": "digit-scenes:16",
    "model.drop_path": 0.2,
    "model.dim": 8,
    "model.box_dim": 32,
    "model.proposals": 10,
    "model.rois": 8,
    "optim.batch_size": 4,
    "optim.epochs": 1.5,
    "optim.warmup_epochs": 0.25,
    "system.device": "cpu",
    "system.precision": "fp32",
    "system.workers": 0,
    "system.log_every": 2,
}


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    """Four evaluation images instead of 500."""
    monkeypatch.setattr("ldae.data.scenes._EVAL_IMAGES", 4)


@pytest.fixture
def tiny(exported):
    """tiny(**changes): settings of a short detection; a__b stands for a.b."""

    def make(**changes) -> DetectConfig:
        given = {key.replace("__", "."): value for key, value in changes.items()}
        return detect_config(exported, "scenes", TINY | given)

    return make


def test_a_detection_writes_its_files(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    config = tiny(system__predictions=True, system__eval_every=1.0)
    record = detect(config, run)
    left = {path.name for path in run.iterdir()}
    assert left == {
        "config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "results.json",
        "predictions.json",
    }  # fmt: skip
    assert kind_of(run) == "detection" and settings_of(run, "detection") == config
    assert record == json.loads((run / "results.json").read_text())
    assert record["data"]["classes"] == 10 and record["data"]["eval_images"] == 4
    assert record["protocol"]["name"] == "scenes"
    assert "model.dim=8" in record["protocol"]["modified"]
    wanted = {f"{kind}_{name}" for kind in ("box", "mask") for name in (
        "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")}  # fmt: skip
    assert record["results"].keys() == wanted
    found = json.loads((run / "predictions.json").read_text())
    dataset = scene_splits("digit-scenes:16")["eval"]().dataset()
    assert average_precision(dataset, found, masks=True) == record["results"]
    curve = lines(run)
    assert {"loss_mask", "loss_objectness", "loss_classifier"} <= curve[-1].keys()
    assert any("box_ap50" in record for record in curve)
    assert "box_ap50" in capsys.readouterr().out
    assert detect(run)["results"] == record["results"]  # a finished run stays as it is
    assert lines(run) == curve


def test_too_little_memory_names_the_setting_to_lower(tiny, tmp_path, monkeypatch):
    def small(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Detector, "find", small)
    with pytest.raises(InputError, match="too little memory for 4 images .*system.eval_batch"):
        detect(tiny(optim__epochs=0.25, optim__warmup_epochs=0.0), tmp_path / "run")


def test_a_detection_can_be_repeated(tiny, tmp_path):
    record = detect(tiny(optim__epochs=0.5), tmp_path / "run")
    again = rerun(tmp_path / "run")
    assert again["verdict"] == "equal" and again["changed"] == []
    repeated = json.loads((tmp_path / "run" / "rerun" / "results.json").read_text())
    assert repeated["protocol"]["starts_from"] == record["protocol"]["starts_from"]
    assert repeated["protocol"]["trained_in"] == "fp32"
    assert repeated["backbone"]["sha256"] != repeated["protocol"]["starts_from"]


def test_interrupted_equals_uninterrupted(tiny, tmp_path, interrupts):
    """Jitter, drop path and the samples of anchors and proposals included."""
    config = tiny(augment__flip=0.5)
    detect(config, tmp_path / "whole")
    run = tmp_path / "parts"
    interrupts(DetectionLoss, 2, 4)
    for seen in (8, 16):
        torch.manual_seed(seen)  # whatever another process begins with
        with pytest.raises(Interrupted, match=f"stopped at image {seen} of 24"):
            detect(config, run)
    detect(config, run)
    assert_equal(weights(run), weights(tmp_path / "whole"))
    one, other = (
        json.loads((path / "results.json").read_text()) for path in (run, tmp_path / "whole")
    )
    assert one["results"] == other["results"]


def test_a_frozen_backbone_is_the_one_that_was_given(tiny, exported, tmp_path):
    prefix = "detector.backbone.vit."
    states = {}
    for name, random_init in (("trained", False), ("control", True)):
        detect(tiny(model__frozen=True, model__random_init=random_init), tmp_path / name)
        found = weights(tmp_path / name)
        states[name] = {k[len(prefix) :]: v for k, v in found.items() if k.startswith(prefix)}
    given = timm.create_model(f"local-dir:{exported}", pretrained=True).state_dict()
    key = "blocks.1.mlp.fc1.weight"
    assert torch.equal(states["trained"][key], given[key])
    assert not torch.equal(states["control"][key], given[key])
    assert states["control"].keys() == states["trained"].keys()


def test_two_ranks_find_what_one_finds(tiny, tmp_path, on_ranks):
    """A finished run is graded by two ranks, each on half of the images."""
    run = tmp_path / "run"
    one = detect(tiny(system__predictions=True, system__eval_batch=1), run)
    file = run / "predictions.json"
    found = file.read_text()
    file.unlink()
    assert on_ranks(lambda: detect(run)) == ["", ""]
    assert file.read_text() == found != "[]\n"
    assert json.loads((run / "results.json").read_text())["results"] == one["results"]


def test_the_command_shows_its_plan_and_refuses_what_does_not_fit(exported, tmp_path, capsys):
    run = str(tmp_path / "run")
    how = ["--recipe", "scenes", "--run", run]
    data = ["--data", "digit-scenes:16"]
    assert cli.main(["detect", exported, *how, *data, "--frozen", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "frozen: true" in out and "trained," in out and "(3, 64, 64)" in out
    for more, sentence in (
        ([*data, "--img-size", "40"], "data.img_size 40 must be a multiple of 16"),
        ([*data, "--augment.scale", "2", "1"], "augment.scale 2 1 must be the smallest, then"),
        (["--data", "digits"], "'digits' is neither a folder in COCO's layout nor digit-scenes"),
        ([*data, "--optim.warmup-epochs", "9"], "optim.warmup_epochs 9 must be fewer"),
    ):
        assert cli.main(["detect", exported, *how, *more]) == 2
        err = capsys.readouterr().err
        assert sentence in err and len(err.splitlines()) == 1
    assert cli.main(["detect", "resnet18", *how, *data, "--random-init"]) == 2
    assert "resnet18 is no plain ViT of timm" in capsys.readouterr().err
    assert cli.main(["detect"]) == 2
    assert "ldae detect BACKBONE [--recipe NAME] ... (vitdet, scenes)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_boxes_alone_need_no_segmentation(tiny, tmp_path):
    root = tmp_path / "coco"
    for split, opener in zip(("train", "val"), scene_splits("digit-scenes:8").values()):
        (root / split).mkdir(parents=True)
        source = opener()
        content = source.dataset()
        for i, image in enumerate(content["images"]):
            image["file_name"] = f"{i}.png"
            source.image(i).save(root / split / f"{i}.png")
        for part in content["annotations"]:
            del part["segmentation"]
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"without a segmentation: --model.no-masks"):
        detect(tiny(data__source=str(root)), tmp_path / "run")
    record = detect(tiny(data__source=str(root), model__masks=False), tmp_path / "run")
    assert "box_ap50" in record["results"] and "mask_ap50" not in record["results"]


def test_a_detector_that_is_opened_finds_what_was_graded(tiny, tmp_path):
    run = tmp_path / "run"
    detect(tiny(system__predictions=True, system__eval_batch=1), run)
    source = scene_splits("digit-scenes:16")["eval"]()
    detector = load_detector(run, "cpu")
    found = [detector([source.image(i)])[0] for i in range(len(source))]
    written = json.loads((run / "predictions.json").read_text())
    assert [score for part in found for score in part.scores.tolist()] == [
        part["score"] for part in written
    ]
    assert [source.categories[name] for part in found for name in part.classes] == [
        part["category_id"] for part in written
    ]
    assert [encode(mask.numpy()) for part in found for mask in part.masks] == [
        part["segmentation"] for part in written
    ]
    with pytest.raises(InputError, match="is not a run folder"):
        load_detector(tmp_path)


def test_a_detector_that_is_opened_reads_pictures_as_the_data_are_read(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    detect(tiny(optim__epochs=0.5), run)
    detector = load_detector(run, "cpu")
    assert detector([]) == []
    seen = []
    network = detector.network.find
    monkeypatch.setattr(
        detector.network, "find", lambda x, sizes: seen.append(x) or network(x, sizes)
    )
    grey = np.arange(32 * 32).reshape(32, 32) // 4
    eight, sixteen = (
        detector([Image.fromarray((grey * scale).astype(kind))])[0]
        for scale, kind in ((1, np.uint8), (257, np.uint16))
    )
    assert torch.equal(*seen)
    for found in (eight, sixteen):
        found.boxes.add_(1)  # outside of torch's inference mode


def test_a_detector_whose_backbone_was_replaced_is_refused(exported, tmp_path):
    backbone = shutil.copytree(exported, tmp_path / "backbone")
    detect(detect_config(backbone, "scenes", TINY | {"optim.epochs": 0.5}), tmp_path / "run")
    config = json.loads((backbone / "config.json").read_text())
    config["model_args"]["depth"] += 1
    (backbone / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="backbone is not the one that .*run began with: its arch"):
        load_detector(tmp_path / "run")
