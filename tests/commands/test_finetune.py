"""A fine-tuning: its exactness, its files and its refusals."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from written import assert_equal, lines, weights

from ldae import cli, tree
from ldae.backbones.open import load_backbone, load_classifier
from ldae.backbones.preprocessing import preprocessing
from ldae.commands.finetune import finetune
from ldae.data.open import open_source
from ldae.downstream.training import DownstreamTraining, prepare_downstream
from ldae.errors import InputError
from ldae.finetuning import recipes
from ldae.finetuning.network import ClassificationLoss
from ldae.finetuning.settings import FinetuneConfig
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import settings_of
from ldae.train.interrupt import Interrupted
from ldae.train.plan import plan_run

TINY = {
    "data.source": "digits",
    "augment.mix_images": 4,
    "augment.min_area": 0.5,
    "optim.batch_size": 64,
    "optim.blr": 0.01,
    "optim.epochs": 1,
    "optim.warmup_epochs": 0.2,
    "system.device": "cpu",
    "system.precision": "fp32",
    "system.workers": 0,
    "system.log_every": 7,
}
WITHOUT_AUGMENTATION = {
    "augment__policy": "",
    "augment__erasing": 0.0,
    "augment__mixup": 0.0,
    "augment__cutmix": 0.0,
    "augment__flip": 0.0,
    "augment__min_area": 1.0,
}


@pytest.fixture
def tiny(exported):
    """tiny(recipe, **changes): settings of a short fine-tuning; a__b stands for a.b."""

    def make(name: str = "mae", **changes) -> FinetuneConfig:
        given = {key.replace("__", "."): value for key, value in changes.items()}
        return tree.replace(recipes.RECIPES.config(name), TINY | {"backbone": exported} | given)

    return make


def top1(network):
    """Top-1 accuracy on the evaluation split of digits, in percent."""
    source, transform = open_source("digits", "eval"), preprocessing(network)
    rng = np.random.default_rng(0)
    images = torch.stack([transform(source.image(i), rng) for i in range(len(source))])
    with torch.no_grad():
        predicted = network(transform.normalize(images)).argmax(1)
    return 100 * (predicted == torch.from_numpy(source.labels)).double().mean().item()


def assert_same_state(one, other):
    states = [Checkpoints(run).load() for run in (one, other)]
    for part in ("model", "average"):
        assert_equal(*(state[part] or {} for state in states))


def test_a_fine_tuning_learns_and_writes_its_files(tiny, exported, tmp_path, capsys):
    """Without augmentation, the network learns in a few steps.

    The head's first weights decide how fast, and torch versions draw them differently: with three
    seeds on torch 2.10 and 2.14, the last top-1 was 48 to 58 % and the loss fell by 0.60 to 0.80.
    """
    run = tmp_path / "run"
    learning = {"optim__epochs": 5, "optim__blr": 0.04, "model__layer_decay": 0.9}
    config = tiny(**learning, **WITHOUT_AUGMENTATION)
    record = finetune(config, run)
    left = {path.name for path in run.iterdir()}
    assert left == {
        "config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "results.json",
        "classifier",
    }  # fmt: skip
    assert settings_of(run, "fine-tuning") == config
    curve = lines(run)
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.3
    tops = [record["top1"] for record in curve if "top1" in record]
    assert len(tops) == 5 and tops[-1] > 35 and tops[-1] > tops[0]
    assert "top-1" in capsys.readouterr().out

    on_disk = json.loads((run / "results.json").read_text())
    assert on_disk == json.loads(json.dumps(record))
    assert on_disk["results"]["top1"] == pytest.approx(tops[-1])
    protocol = on_disk["protocol"]
    assert (protocol["name"], protocol["version"], protocol["size"]) == ("mae", 2, "B")
    assert protocol["optim"]["min_lr"] == 1e-6 and "optim.epochs=5.0" in protocol["modified"]

    opened = load_classifier(run).eval()
    assert opened.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    transform = preprocessing(opened)
    assert transform.mean == (0.1, 0.2, 0.3) and transform.input_size == (3, 32, 32)
    assert on_disk["results"]["top1"] == pytest.approx(top1(opened))
    assert load_backbone(run).num_classes == 0  # what evaluators grade

    before = (run / "classifier" / "model.safetensors").stat().st_mtime_ns
    finetune(config, run)  # a finished run is left as it is
    assert lines(run) == curve
    assert (run / "classifier" / "model.safetensors").stat().st_mtime_ns == before


def test_the_written_folder_has_the_logits_of_the_average(tiny, tmp_path):
    run = tmp_path / "run"
    finetune(tiny("ldae", optim__ema=0.5, optim__epochs=0.5), run)
    opened = timm.create_model(f"local-dir:{run / 'classifier'}", pretrained=True).eval()
    state = Checkpoints(run).load()["average"]
    for name, value in opened.state_dict().items():
        assert torch.equal(value, state[f"network.{name}"]), name
    card = (run / "classifier" / "README.md").read_text()
    assert "| recipe | ldae, version 2, size B |" in card and "fine-tuned from vit" in card
    assert "pypi.org" not in card


def test_the_license_of_the_classifier_is_the_users_choice(tiny, tmp_path, monkeypatch):
    """The license of the backbone's weights is not passed on, nor is any other claimed."""
    from ldae.commands import finetune as module

    original = module.build_network

    def licensed(*args):
        network = original(*args)
        network.pretrained_cfg["license"] = "apache-2.0"
        return network

    monkeypatch.setattr(module, "build_network", licensed)
    short = {"optim__epochs": 0.1, "optim__warmup_epochs": 0.01}
    for license in ("", "cc-by-nc-4.0"):
        folder = tmp_path / f"run-{license}" / "classifier"
        finetune(tiny(license=license, **short), folder.parent)
        cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        assert cfg.get("license", "") == license
        head = (folder / "README.md").read_text().split("---")[1]
        assert ("license:" in head) == bool(license) and license in head
    shutil.rmtree(folder)
    finetune(tiny(license="mit", **short), folder.parent)  # it may change when a run resumes
    assert "license: mit" in (folder / "README.md").read_text()


def test_the_average_and_the_weights_are_graded_in_float32(tiny, tmp_path):
    """A network that is trained in bfloat16 too, whose logits would tie.

    Without its warm-up, the average is still near the first weights, so that the two differ: with
    three seeds, the weights were 14 to 18 points ahead.
    """
    run = tmp_path / "run"
    learning = {"optim__epochs": 2, "optim__blr": 0.03, "optim__ema_warmup": False}
    config = tiny("ldae", system__precision="bf16", **learning, **WITHOUT_AUGMENTATION)
    record = finetune(config, run)
    assert record["protocol"]["precision"] == "fp32"
    assert record["protocol"]["trained_in"] == "bf16"
    results, last, state = record["results"], lines(run)[-1], Checkpoints(run).load()
    assert results.keys() == {"top1", "top5", "weights_top1", "weights_top5"}
    assert results["weights_top1"] > results["top1"] + 5
    network = timm.create_model(f"local-dir:{run / 'classifier'}", pretrained=True).eval()
    for part, prefix in (("average", ""), ("model", "weights_")):
        weights = {name.removeprefix("network."): w for name, w in state[part].items()}
        network.load_state_dict(weights)
        assert results[f"{prefix}top1"] == pytest.approx(top1(network))
        assert results[f"{prefix}top1"] == pytest.approx(last[f"{prefix}top1"])


def test_a_run_of_a_former_version_resumes_with_its_constants(
    tiny, exported, tmp_path, interrupts, capsys
):
    """The same command continues it, though the recipe has a new version."""
    config = tree.replace(tiny("ldae", optim__ema_warmup=False), {"version": 1})
    finetune(config, tmp_path / "whole")
    run = tmp_path / "parts"
    interrupts(ClassificationLoss, 1)
    with pytest.raises(Interrupted):
        finetune(config, run)
    with pytest.raises(InputError, match="version is 1 there, 2 here.*ema_warmup is False there"):
        finetune(tiny("ldae"), run)
    command = ["finetune", exported, "--recipe", "ldae", "--run", str(run)]
    for name, value in TINY.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main([*command, "--optim.ema-warmup"]) == 2
    assert "optim.ema_warmup is False there, True here" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert settings_of(run, "fine-tuning") == config
    assert_same_state(run, tmp_path / "whole")


def test_a_resumed_run_records_the_weights_that_it_began_with(tiny, exported, tmp_path, interrupts):
    """The backbone may be a pre-training that goes on meanwhile."""
    backbone = shutil.copytree(exported, tmp_path / "backbone")
    config = tiny(backbone=str(backbone))
    whole, run = finetune(config, tmp_path / "whole"), tmp_path / "parts"
    interrupts(ClassificationLoss, 1)
    with pytest.raises(Interrupted):
        finetune(config, run)
    weights = load_file(backbone / "model.safetensors")
    save_file({name: 2 * w for name, w in weights.items()}, backbone / "model.safetensors")
    resumed = finetune(config, run)
    assert resumed["protocol"]["starts_from"] == whole["protocol"]["starts_from"]
    assert resumed["results"] == whole["results"]


def test_interrupted_equals_uninterrupted(tiny, tmp_path, interrupts):
    """RandAugment, erasing, mixup, CutMix, drop path and the moving average included."""
    config = tiny(
        "ldae", optim__ema=0.9, model__drop_path=0.5, augment__erasing=0.5, optim__epochs=0.6
    )
    finetune(config, tmp_path / "whole")
    run = tmp_path / "parts"
    interrupts(ClassificationLoss, 3, 8)
    for seen in (192, 512):
        torch.manual_seed(seen)  # whatever another process begins with
        np.random.seed(seen)
        with pytest.raises(Interrupted, match=f"stopped at image {seen} of 832"):
            finetune(config, run)
    finetune(config, run)
    assert_same_state(run, tmp_path / "whole")
    results = [
        json.loads((path / "results.json").read_text()) for path in (run, tmp_path / "whole")
    ]
    assert results[0]["results"] == results[1]["results"]


def test_the_division_into_micro_batches_is_exact_without_drop_path(tiny, tmp_path):
    """Images, erasing and mixing are the same; only the order of the sums differs."""
    for name, share in (("whole", 0), ("parts", 16)):
        config = tiny(
            model__drop_path=0.0, augment__erasing=0.5, optim__epochs=0.2,
            optim__warmup_epochs=0.1, optim__blr=1e-3, system__device_batch=share,
        )  # fmt: skip
        finetune(config, tmp_path / name)
    whole, parts = (weights(tmp_path / name) for name in ("whole", "parts"))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=2e-5, msg=name)
    losses = [lines(tmp_path / name)[-1]["loss"] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_search_for_micro_batches_keeps_whole_groups_and_changes_nothing(
    tiny, tmp_path, monkeypatch
):
    """Memory for 13 images is planted, and a group has 8: 12 would fit, but are no whole groups."""
    forward = ClassificationLoss.forward

    def small(self, images, positions, labels):
        if self.training and len(images) > 13:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images, positions, labels)

    monkeypatch.setattr(ClassificationLoss, "forward", small)
    changes = dict(optim__batch_size=48, augment__mix_images=8, augment__erasing=0.5)
    changes |= dict(optim__epochs=0.1, optim__warmup_epochs=0.05, system__eval_every=0.0)
    finetune(tiny(system__device_batch=8, **changes), tmp_path / "given")
    searched = functools.partial(dataclasses.replace, searched=True)  # as on a GPU
    planned = "ldae.downstream.training.plan_run"
    monkeypatch.setattr(planned, lambda *args: searched(plan_run(*args)))
    finetune(tiny(**changes), tmp_path / "searched")
    assert Checkpoints(tmp_path / "searched").load()["division"]["micro_batches"] == 6
    assert_same_state(tmp_path / "searched", tmp_path / "given")


def test_one_seed_beside_several_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="without --seed"):
        finetune(tiny(seed=5), tmp_path / "run", seeds=(0, 1))


@pytest.mark.parametrize(
    "precision, bf16, found",
    [("auto", False, "fp32"), ("auto", True, "bf16"), ("tf32", False, "tf32")],
)
def test_a_record_has_the_precision_that_auto_meant(precision, bf16, found, tiny):
    config = tiny(system__precision=precision)
    training = DownstreamTraining("", config, None, None, "hash", None, bf16)
    assert training.facts == {"starts_from": "hash", "trained_in": found}


@pytest.mark.parametrize("most, at_once", [(8, 8), (64, 64)])
def test_grading_takes_no_more_images_at_a_time_than_training(most, at_once, tiny, tmp_path):
    config = tiny(system__device_batch=most)
    with prepare_downstream("finetune", recipes.RECIPES, config, tmp_path / "run") as training:
        assert training.evaluation.encoder().batch_size == at_once


def test_the_seed_changes_the_run(tiny, tmp_path):
    for seed in (0, 1):
        changes = dict(seed=seed, optim__epochs=0.1, optim__warmup_epochs=0.01)
        finetune(tiny(system__eval_every=0.0, **changes), tmp_path / str(seed))
    losses = [lines(tmp_path / str(seed))[-1]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny, tmp_path, capsys):
    facts = finetune(tiny(optim__epochs=3), tmp_path / "run", dry_run=True)
    out = capsys.readouterr().out
    for part in ("mae, version 2, size B; changed: ", "optim.epochs=3", "10 classes", "parameters"):
        assert part in out
    assert facts["recipe"] in out and facts["parameters"] in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"data__source": ""}, "name their source with --data"),
        ({"backbone": "no_such_model"}, "no timm model of that name"),
        ({"backbone": "pixels:8"}, "pixels:8 is not a timm model, so it cannot be fine-tuned"),
        ({"data__img_size": 30}, "data.img_size 30 does not fit .*patches have 8 x 8 pixels"),
        ({"data__in_chans": 4}, "takes 3 channels"),
        ({"augment__policy": "rnad-m9"}, "'rnad-m9' is not a RandAugment policy"),
        ({"augment__mix_images": 48}, "micro batch of 64 images .*augment.mix_images 48"),
        ({"optim__warmup_epochs": 5}, "optim.warmup_epochs 5 must be fewer than optim.epochs 1"),
        ({"model__layer_decay": 0.0}, "model.layer_decay must be above 0"),
        ({"model__drop_path": 1.0}, "model.drop_path must be .* below 1"),
        ({"system__eval_every": -1.0}, "system.eval_every must be at least 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(changes, sentence, tiny, tmp_path):
    with pytest.raises(InputError, match=sentence):
        finetune(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrong_images_are_refused(tiny, tmp_path):
    flat, strange = str(tmp_path / "flat"), str(tmp_path / "strange")
    for name in ("flat/0", "flat/1", "strange/cat/0", "strange/dog/0"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9)).save(path)
    with pytest.raises(InputError, match="has no labels"):
        finetune(tiny(data__source=flat, data__eval_source="digits"), tmp_path / "run")
    with pytest.raises(InputError, match="class '0' of digits is not among the classes"):
        finetune(tiny(data__source=strange, data__eval_source="digits"), tmp_path / "run")
    with pytest.raises(InputError, match="no evaluation split"):
        finetune(tiny(data__source=strange), tmp_path / "run")


def test_a_run_does_not_go_on_with_other_labels(tiny, tmp_path):
    source = open_source("digits", "train")
    lines = [f"{i}.png,{source.labels[i]}" for i in range(64)]
    for i in range(64):
        source.image(i).save(tmp_path / f"{i}.png")
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(lines))
    config = tiny(data__source=str(labels), data__eval_source="digits")
    finetune(config, tmp_path / "run")
    labels.write_text("\n".join(["0.png,9", *lines[1:]]))
    with pytest.raises(InputError, match="the hash of the labels was .* then, and is .* now"):
        finetune(config, tmp_path / "run")


def test_a_folder_of_another_run_is_refused(tiny, tmp_path):
    run = tmp_path / "run"
    finetune(tiny(optim__epochs=0.1, optim__warmup_epochs=0.01), run)
    with pytest.raises(InputError, match="holds another run: optim.epochs is 0.1 there, 2.0 here"):
        finetune(tiny(optim__epochs=2.0, optim__warmup_epochs=0.01), run)
    (run / "config.yaml").write_text("noise: {steps: 3}\n")
    with pytest.raises(InputError, match="config.yaml: there is no setting 'noise.steps'"):
        finetune(tiny(), run)
    (run / "config.yaml").write_text("kind: pretraining\nnoise: {steps: 3}\n")
    with pytest.raises(InputError, match="run holds a denoising pre-training run, not a fine"):
        finetune(tiny(), run)


def test_the_command_line_uses_the_recipe_of_the_size(exported, tmp_path, capsys):
    argv = ["finetune", exported, "--data", "digits", "--run", str(tmp_path / "run"), "--dry-run"]
    own = ["--augment.mix-images", "8", "--system.workers", "0"]
    assert cli.main([*argv, "--recipe", "ldae", *own]) == 0
    out = capsys.readouterr().out
    assert "layer_decay: 0.85" in out and "ema: 0.9999" in out
    assert "ldae, version 2, size B; changed: augment.mix_images=8" in out
    assert cli.main([*argv, "--recipe", "ldae", "--size", "L"]) == 0
    assert "layer_decay: 0.65" in capsys.readouterr().out
    for wrong, sentence in (
        ([*argv, "--recipe", "mea"], "no recipe 'mea'; the nearest is 'mae'"),
        (argv, "name a backbone and a recipe: ldae finetune BACKBONE --recipe NAME"),
        ([*argv[2:], "--recipe", "mae"], "name a backbone and a recipe"),
    ):
        assert cli.main(["finetune", *wrong[wrong[0] == "finetune" :]]) == 2
        error = capsys.readouterr().err
        assert sentence in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_every_setting_is_read_by_some_code():
    from test_settings import unread

    assert unread(FinetuneConfig()) == []
