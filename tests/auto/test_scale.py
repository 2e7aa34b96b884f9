"""The scale auto gives a run plain settings, once."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import ldae
from ldae import cli, distributed, tree
from ldae.auto import facts
from ldae.auto.scale import SETTINGS, decide, settled
from ldae.errors import InputError
from ldae.machine import hardware
from ldae.method import LDAE
from ldae.pretraining import recipes
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import KINDS, settings_of
from ldae.runs.metrics import read_records
from ldae.train.interrupt import Interrupted

DATA = "scattered-digits:200"
SMALL = {
    "data.source": DATA, "data.img_size": 16, "model.patch_size": 8, "tokenizer.dim": 6,
    "model.depth": 1, "model.embed_dim": 16, "model.num_heads": 2,
    "system.device": "cpu", "system.precision": "fp32",
}  # fmt: skip
"""What makes a run take a second."""
FLAGS = [f"--{name}={value}" for name, value in SMALL.items() if name != "data.source"]


@pytest.fixture
def speed(monkeypatch):
    """speed(images): steps of this many images a second, and idle cores; nothing is measured."""

    def fix(images: float) -> None:
        found = facts.Speed(images, 10_000, 32)
        monkeypatch.setattr(facts, "measure_step", lambda config, device, size=0: found)
        monkeypatch.setattr(facts, "decode_seconds", lambda source, config: 1e-5)
        monkeypatch.setattr(hardware, "busy_cores", lambda: 0.0)

    return fix


def weights(run):
    return Checkpoints(run).load()["model"]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("row", ["l_dae", "l_dae_masked", "dae", "patch_pca", "mae"])
def test_the_choice_fits_the_recipe_and_the_images(row, speed, tmp_path, capsys):
    speed(1000.0)
    recipe = ldae.config(row, changes={"data.source": DATA, "system.device": "cpu"})
    kind, _ = recipes.find(row)
    chosen = decide(recipe, tmp_path / "run", kind, row, hours=1)
    tree.check(chosen)
    KINDS[kind].functions().build(chosen)
    assert chosen.data.img_size == 32 and chosen.data.stats == "auto"
    assert getattr(chosen.model, "decoder_depth", None) == (
        1 if row in ("mae", "l_dae_masked") else None
    )
    assert chosen.optim.epochs == 1600 and chosen.model.depth == 2  # 200 images are few
    assert tree.difference(recipe, chosen).keys() <= {*SETTINGS}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("scale auto: 200 images, 1 hours on cpu")
    for line in lines[1:]:
        name, value, _ = re.split(r"  +", line.strip() + "  ", maxsplit=2)
        assert str(tree.flatten(chosen)[name]) == value
    assert not (tmp_path / "run").exists()


def test_a_short_run_has_the_steps_that_were_planned_and_ten_records(speed, tmp_path, capsys):
    """A sentence names the hours that would be enough for its network."""
    speed(4000.0)
    config = ldae.config("l_dae", changes=SMALL)
    ldae.pretrain(config, tmp_path / "run", scale="auto", hours=1.2e-4)
    out = capsys.readouterr().out
    (planned,) = re.findall(r"optim.batch_size +128 +(\d+) steps;", out)
    assert f" in {planned} steps, from image 0" in out
    assert 10 <= len(read_records(tmp_path / "run")) <= int(planned)
    (enough,) = re.findall(r"^hours 0.00012 are too few .*; (\S+) hours are enough$", out, re.M)
    decide(config, tmp_path / "longer", "pretraining", "l_dae", float(enough))
    assert "too few" not in capsys.readouterr().out


def test_what_the_user_names_stays_and_is_said(speed, tmp_path, capsys):
    """A value that differs from the recipe's, or one that is kept."""
    speed(1000.0)
    changes = {"data.source": DATA, "optim.epochs": 7.0, "model.embed_dim": 64, "seed": 3}
    config = ldae.config("l_dae", changes=changes)
    chosen = decide(config, tmp_path / "run", "pretraining", "l_dae", 1, keep=("optim.batch_size",))
    assert chosen.optim.epochs == 7 and chosen.model.embed_dim == 64 and chosen.seed == 3
    assert chosen.optim.batch_size == 2048 and chosen.optim.warmup_epochs == 0.7
    out = capsys.readouterr().out
    assert re.search(r"optim.epochs +7.0 +yours\n", out)
    assert re.search(r"model.embed_dim +64 +yours \(auto: 128\)", out)
    assert re.search(r"optim.batch_size +2048 +yours \(auto: 128\)", out)
    with pytest.raises(InputError, match="no setting 'optim.epoch'.*'optim.epochs'"):
        decide(config, tmp_path / "run", "pretraining", "l_dae", 1, keep=("optim.epoch",))


def test_a_timm_name_of_the_user_keeps_its_sizes(speed, tmp_path):
    speed(1000.0)
    changes = {"data.source": DATA, "model.name": "vit_tiny_patch16_224"}
    config = ldae.config("l_dae", changes=changes)
    model = decide(config, tmp_path / "run", "pretraining", "l_dae", 1).model
    assert (model.name, model.depth, model.embed_dim) == ("vit_tiny_patch16_224", 12, None)


def test_a_run_has_plain_settings_and_resumes_by_the_same_call_without_measuring(
    speed, tmp_path, interrupts, monkeypatch
):
    speed(4000.0)
    config = ldae.config("l_dae", changes=SMALL)
    auto = {"scale": "auto", "hours": 5e-4}
    interrupts(LDAE, 5)
    with pytest.raises(Interrupted):
        ldae.pretrain(config, tmp_path / "auto", **auto)
    monkeypatch.setattr(facts, "measure_step", None)  # nothing is measured again
    run = ldae.pretrain(config, tmp_path / "auto", **auto | {"hours": 2.0})
    plain = settings_of(tmp_path / "auto", "pretraining")
    assert run.config == plain and run.images_seen >= 1280 and run.row == "l_dae"
    ldae.pretrain(plain, tmp_path / "plain")
    assert_equal(weights(tmp_path / "auto"), weights(tmp_path / "plain"))
    other = tree.replace(config, {"optim.epochs": 99})
    longer = (
        "optim.epochs is .* there, 99.0 here; name another --run, .* --init-from .*auto to go on"
    )
    with pytest.raises(InputError, match=longer):
        ldae.pretrain(other, tmp_path / "auto", **auto)


def test_the_command_leads_from_a_folder_to_a_run(tmp_path, capsys):
    """Nothing is replaced here: images and steps are measured."""
    pixels = np.random.default_rng(0).integers(0, 255, (140, 40, 36, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number:03}.png")
    argv = ["pretrain", "l_dae", "--scale", "auto", "--hours", "2e-4"]
    argv += ["--data", str(tmp_path / "images"), "--run", str(tmp_path / "run")]
    argv += ["--model.patch-size", "16", "--model.depth=1", "--model.embed-dim", "16"]
    argv += ["--model.num-heads", "2", "--optim.epochs", "2", "--tokenizer.dim", "32"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "tokenizer.dim             32" in out  # the recipe's own number, but named
    assert re.search(r"tokenizer.dim +32 +yours", out)
    config = settings_of(tmp_path / "run", "pretraining")
    assert (config.data.img_size, config.model.patch_size, config.optim.epochs) == (64, 16, 2.0)
    assert cli.main(argv) == 0 and "its own settings" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["l_dae", "--hours", "0"], "hours must be above 0, not 0.0"),
        (["l_dae", "--hours", "-1"], "hours must be above 0, not -1.0"),
        (["l_dae", "--hours", "nan"], "hours must be above 0, not nan"),
        (["l_dae", "--hours", "long"], "--hours takes a number, not 'long'"),
        (["l_dae", "--scale", "small", "--hours", "2"], "--hours is for --scale auto"),
        (["l_dae", "--data", "scattered-digits:99"], "at least 128 images.* has 99"),
        (["l_dae", "--data", "nowhere"], "no folder.*nowhere"),
        (["dit"], "the tokenizer conv_vae"),
        (["patch_ae"], "the tokenizer patch_ae"),
        (["ddpm"], "model.denoiser is unet"),
        (["l_dae", "--init-from", "vit_tiny_patch16_224"], "init_from names one"),
        (["l_dae", "--hours", "1e-9", *FLAGS], "too few: at"),
    ],
)
def test_what_has_no_choice_is_refused_in_one_sentence(argv, message, speed, tmp_path, capsys):
    speed(1000.0)
    run = tmp_path / "run"
    words = ["pretrain", argv[0], "--run", str(run), *argv[1:]]
    words += [] if "--scale" in argv else ["--scale", "auto"]
    words += [] if "--data" in argv else ["--data", DATA]
    assert cli.main(words) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.search(message, sentence) and not run.exists()


def test_only_pretrain_has_the_scale_auto(tmp_path, capsys):
    for argv in (["show", "l_dae"], ["fit-tokenizer", "l_dae", "--data", DATA, "--run", "x"]):
        assert cli.main([*argv, "--scale", "auto"]) == 2
        assert "by `ldae pretrain` only" in capsys.readouterr().err
    config = ldae.config("l_dae", scale="small")
    for wrong, message in (
        ({"scale": "small"}, "scale must be auto, not 'small'"),
        ({"hours": 2}, "hours are for the scale auto"),
        ({"scale": "auto", "hours": 0}, "hours must be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            ldae.pretrain(config, tmp_path / "run", **wrong)


def test_a_bad_image_of_the_sample_is_named_or_skipped(speed, tmp_path):
    speed(1000.0)
    pixels = np.random.default_rng(0).integers(0, 255, (130, 40, 40, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number:03}.png")
    (tmp_path / "007.png").write_bytes(b"no image")
    config = ldae.config("l_dae", changes=SMALL | {"data.source": str(tmp_path)})
    with pytest.raises(InputError, match="007.png"):
        decide(config, tmp_path / "run", "pretraining", "l_dae", 1)
    skipping = tree.replace(config, {"data.bad_images": "skip"})
    assert decide(skipping, tmp_path / "run", "pretraining", "l_dae", 1).optim.epochs == 1600


def test_ranks_share_one_choice_and_one_error(tiny, tmp_path, on_ranks, monkeypatch):
    """Rank 0 alone measures."""

    def measure(config, device, size=0):
        assert not torch.distributed.is_initialized()
        return facts.Speed(1000.0 + torch.rand(()).item(), 10_000, 32)

    monkeypatch.setattr(facts, "measure_step", measure)
    changes = {"data.source": DATA, "system.device": "cpu"}
    config = ldae.config("l_dae", changes=changes)

    def check() -> None:
        with settled(config, tmp_path / "run", "pretraining", "l_dae", 0.01) as chosen:
            assert len({tree.to_yaml(found) for found in distributed.gather_values(chosen)}) == 1
            assert chosen.optim.epochs != config.optim.epochs

    assert on_ranks(check) == ["", ""]
    few = tree.replace(config, {"data.source": "scattered-digits:20"})

    def refused() -> None:
        with settled(few, tmp_path / "run", "pretraining", "l_dae", 0.01):
            pass

    errors = on_ranks(refused)
    assert all("at least 128 images" in error for error in errors)
