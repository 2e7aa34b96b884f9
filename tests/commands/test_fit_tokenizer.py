"""`ldae fit-tokenizer`: its files, resuming and its refusals."""

import json
import shutil

import diffusers
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from written import assert_equal, lines

from ldae import tree
from ldae.backbones.run import load_method
from ldae.commands.fit_tokenizer import fit_tokenizer
from ldae.commands.pretrain import pretrain
from ldae.data.open import open_source
from ldae.errors import InputError
from ldae.method import LDAE
from ldae.pretraining import tokenizer as fitting
from ldae.runs import kinds
from ldae.runs.checkpoints import Checkpoints
from ldae.train.interrupt import Interrupted

UNTRAINED = {
    "config.yaml", "environment.json", "tokenizer.safetensors", "reconstruction.json",
    "reconstructed.png",
}  # fmt: skip


def weights(run):
    return load_file(run / "tokenizer.safetensors")


def results(run):
    return json.loads((run / "reconstruction.json").read_text())["results"]


@pytest.fixture
def perceptual(tmp_path):
    """A small random backbone in timm's format."""
    torch.manual_seed(0)
    path = tmp_path / "classifier"
    timm.models.save_for_hf(timm.create_model("resnet10t", num_classes=0), str(path))
    return str(path)


@pytest.mark.parametrize("row", ["l_dae", "dae"])
def test_a_fit_in_one_pass_writes_its_files(row, tiny, tmp_path):
    fit_tokenizer(tiny(row), tmp_path / "run", row)
    assert {path.name for path in (tmp_path / "run").iterdir()} == UNTRAINED
    found = results(tmp_path / "run")
    assert set(found) == {"psnr", "images"} and found["images"] == 64
    assert 10 < found["psnr"] < 40 if row == "l_dae" else found["psnr"] > 90
    assert Image.open(tmp_path / "run" / "reconstructed.png").size == (12 * 66, 2 * 66)


@pytest.mark.parametrize(
    "row, parts",
    [
        ("patch_ae", set()),
        ("patch_vae", {"kl"}),
        ("no_adversarial", {"kl"}),
        ("vqvae", {"codebook"}),
    ],
)
def test_a_training_writes_its_files(row, parts, tiny, tmp_path, capsys):
    run = tmp_path / "run"
    config = tiny(row, tokenizer__optim__epochs=4, system__log_every=8)
    fit_tokenizer(config, run, row)
    left = {path.name for path in run.iterdir()}
    assert left == UNTRAINED | {"checkpoints", "metrics.jsonl"}
    records = lines(run)
    assert parts | {"loss", "reconstruction"} <= set(records[0])
    assert records[-1]["reconstruction"] < 0.95 * records[0]["reconstruction"]
    out = capsys.readouterr().out
    assert "psnr" in out and "over 64 images of scattered-digits:64" in out
    found = results(run)
    assert found["psnr"] > 5
    if row == "vqvae":
        assert 1 / 16 <= found["codes_used"] <= 1
        assert 1 <= found["code_perplexity"] <= 16 * found["codes_used"] + 1e-9
        assert "codes_used" in out
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.png")}
    state = weights(run)
    fit_tokenizer(config, run, row)  # a finished fit is left as it is
    assert_equal(weights(run), state)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.png")}
    assert lines(run) == records


@pytest.mark.parametrize("row", ["dit", "vqgan"])
def test_all_terms_train_together_end_to_end(row, tiny, perceptual, tmp_path):
    """The pre-training of these rows first trains the tokenizer."""
    run = tmp_path / "run"
    config = tiny(
        row, tokenizer__perceptual_weight=0.1, tokenizer__perceptual_net=perceptual,
    )  # fmt: skip
    pretrain(config, run, row)
    records = lines(run / "tokenizer")
    assert {"perceptual", "adversarial", "discriminator", "adaptive_weight"} <= set(records[0])
    # 8 steps of 8 images; the adversary joins in the fifth.
    assert [record["adaptive_weight"] > 0 for record in records] == 4 * [False] + 4 * [True]
    assert f"perceptual({perceptual})" in results(run / "tokenizer")
    assert_equal(weights(run), weights(run / "tokenizer"))
    state = Checkpoints(run / "tokenizer").load()["model"]
    assert not [name for name in state if not name.startswith(("tokenizer.", "discriminator."))]
    trained = Checkpoints(run).load()["model"]
    for name, value in weights(run).items():
        assert torch.equal(trained[f"tokenizer.{name}"], value)
    assert (run / "denoised.png").exists() and not (run / "filters.png").exists()
    before = trained
    pretrain(config, run, row)
    assert_equal(Checkpoints(run).load()["model"], before)


@pytest.mark.parametrize("row", ["dit", "vqvae", "patch_vae"])
def test_interrupted_equals_uninterrupted(row, tiny, tmp_path, interrupts):
    config = tiny(row, system__log_every=3, tokenizer__optim__ema=0.5)
    fit_tokenizer(config, tmp_path / "whole", row)
    run = tmp_path / "parts"
    interrupts(fitting.TokenizerLoss, 2, 5)
    for seen in (16, 40):
        with pytest.raises(Interrupted, match=f"stopped at image {seen} of 64"):
            fit_tokenizer(config, run, row)
    fit_tokenizer(config, run, row)
    assert_equal(weights(run), weights(tmp_path / "whole"))
    whole, parts = (Checkpoints(path).load() for path in (tmp_path / "whole", run))
    assert_equal(parts["model"], whole["model"])
    assert results(run) == results(tmp_path / "whole")
    for name, value in weights(run).items():  # the moving average is saved
        if name not in ("latent_mean", "scales"):
            assert torch.equal(value, whole["average"][f"tokenizer.{name}"]), name


def test_a_pretraining_stopped_in_its_tokenizer_resumes_there(tiny, tmp_path, interrupts):
    config, run = tiny("patch_vae"), tmp_path / "run"
    calls = interrupts(fitting.TokenizerLoss, 3)
    with pytest.raises(Interrupted, match="stopped at image 24 of 64"):
        pretrain(config, run, "patch_vae")
    assert not (run / "tokenizer.safetensors").exists()
    # Only settings of the pre-training, which has not begun, may still change.
    with pytest.raises(InputError, match="tokenizer.dim is 6 there, 5 here"):
        pretrain(tiny("patch_vae", tokenizer__dim=5), run, "patch_vae")
    pretrain(tiny("patch_vae", optim__blr=2e-3, model__depth=1), run, "patch_vae")
    assert len(calls) == 8
    fit_tokenizer(config, tmp_path / "alone", "patch_vae")
    assert_equal(weights(run), weights(tmp_path / "alone"))


@pytest.mark.parametrize("row, folders", [("l_dae", ["run"]), ("patch_vae", ["tokenizer", "run"])])
def test_a_pretraining_writes_a_new_tokenizer_once_into_each_folder(
    row, folders, tiny, tmp_path, monkeypatch
):
    saved, save = [], fitting.tokenizers.save
    monkeypatch.setattr(
        fitting.tokenizers,
        "save",
        lambda tokenizer, path: saved.append(path.parent.name) or save(tokenizer, path),
    )
    pretrain(tiny(row), tmp_path / "run", row)
    pretrain(tiny(row), tmp_path / "run", row)
    assert saved == folders


def test_a_fit_that_was_killed_before_its_report_writes_the_report(tiny, tmp_path):
    run = tmp_path / "run"
    fit_tokenizer(tiny("patch_vae"), run, "patch_vae")
    found = results(run)
    (run / "reconstruction.json").unlink()
    (run / "tokenizer.safetensors").unlink()  # after the last step, before the statistics
    fit_tokenizer(tiny("patch_vae"), run, "patch_vae")
    assert results(run) == found


def test_two_gloo_ranks_equal_one(tiny, tmp_path, on_ranks):
    """This covers statistics, draws, gradients and the report, to fp32 tolerance."""
    config = tiny("patch_vae", tokenizer__optim__blr=1e-2)
    assert on_ranks(lambda: fit_tokenizer(config, tmp_path / "two", "patch_vae")) == ["", ""]
    fit_tokenizer(config, tmp_path / "one", "patch_vae")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=name)
    record, expected = lines(tmp_path / "two")[-1], lines(tmp_path / "one")[-1]
    for name in ("loss", "reconstruction", "kl"):
        assert record[name] == pytest.approx(expected[name], rel=1e-4)
    assert results(tmp_path / "two")["images"] == 64
    psnr = results(tmp_path / "one")["psnr"]
    assert results(tmp_path / "two")["psnr"] == pytest.approx(psnr, abs=1e-3)


def test_accumulation_equals_the_full_batch(tiny, tmp_path):
    for run, size in (("whole", 0), ("parts", 2)):
        config = tiny("patch_vae", tokenizer__optim__blr=1e-2, system__device_batch=size)
        fit_tokenizer(config, tmp_path / run, "patch_vae")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert other["kl"] == pytest.approx(one["kl"], rel=1e-4)


def test_system_compile_is_of_the_pretraining_alone(tiny, tmp_path, monkeypatch):
    """The gradients that an adversary takes in the forward pass cannot be compiled."""
    monkeypatch.setattr("ldae.train.parallel.compile_parts", None)  # calling it: TypeError
    config = tiny("patch_vae", system__compile="on")
    fit_tokenizer(config, tmp_path / "fit", "patch_vae")
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        pretrain(config, tmp_path / "run", "patch_vae")
    assert weights(tmp_path / "run")  # its tokenizer was trained before


def test_a_pretraining_uses_a_fitted_tokenizer(tiny, tmp_path):
    fit_tokenizer(tiny("no_adversarial"), tmp_path / "fit", "no_adversarial")
    path = str(tmp_path / "fit" / "tokenizer.safetensors")
    pretrain(tiny("linear_gamma2", tokenizer__path=path), tmp_path / "run", "linear_gamma2")
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "fit"))
    assert not (tmp_path / "run" / "tokenizer").exists()
    with pytest.raises(InputError, match="has width 8, this run 16"):
        config = tiny("linear_gamma2", tokenizer__path=path, tokenizer__width=16)
        pretrain(config, tmp_path / "other", "linear_gamma2")
    assert not (tmp_path / "other").exists()
    with pytest.raises(
        InputError, match="fit holds a tokenizer run, not a denoising pre-training run"
    ):
        load_method(tmp_path / "fit")


def test_a_pretraining_resumes_with_its_own_copy_of_a_tokenizer(tiny, tmp_path, interrupts):
    fit_tokenizer(tiny("no_adversarial"), tmp_path / "fit", "no_adversarial")
    path = tmp_path / "fit" / "tokenizer.safetensors"
    config = tiny("linear_gamma2", tokenizer__path=str(path))
    interrupts(LDAE, 3)
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "run", "linear_gamma2")
    path.unlink()
    pretrain(config, tmp_path / "run", "linear_gamma2")
    assert lines(tmp_path / "run")[-1]["images"] == 64
    with pytest.raises(InputError, match="there is no tokenizer file"):
        pretrain(config, tmp_path / "other", "linear_gamma2")


def test_a_finished_fit_is_not_replaced_by_another(tiny, tmp_path):
    fit_tokenizer(tiny(), tmp_path / "run", "l_dae")
    before = (tmp_path / "run" / "tokenizer.safetensors").read_bytes()
    fit_tokenizer(tiny(), tmp_path / "run", "l_dae")
    with pytest.raises(InputError, match="another run: tokenizer.dim is 6 there, 4 here"):
        fit_tokenizer(tiny(tokenizer__dim=4), tmp_path / "run", "l_dae")
    assert (tmp_path / "run" / "tokenizer.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("none.safetensors", "there is no tokenizer file .*none.safetensors"),
        ("other.safetensors", "other.safetensors is not a tokenizer file of ldae"),
        ("half.safetensors", "half.safetensors is damaged"),
        (".", "is damaged .*"),
    ],
)
def test_a_wrong_tokenizer_file_is_refused_before_anything_is_written(
    name, sentence, tiny, tmp_path
):
    save_file({"a": torch.ones(3)}, tmp_path / "other.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:40])
    with pytest.raises(InputError, match=sentence):
        pretrain(tiny(tokenizer__path=str(tmp_path / name)), tmp_path / "run", "l_dae")
    assert not (tmp_path / "run").exists()


def test_a_published_autoencoder_needs_no_training(tiny, tmp_path):
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
    )
    network.save_pretrained(tmp_path / "vae")
    config = tiny("dit", tokenizer__pretrained=str(tmp_path / "vae"), tokenizer__dim=16)
    fit_tokenizer(config, tmp_path / "fit", "dit")
    assert {path.name for path in (tmp_path / "fit").iterdir()} == UNTRAINED
    state = weights(tmp_path / "fit")
    for name, value in network.state_dict().items():
        assert torch.equal(state[f"network.{name}"], value)
    assert state["pixel_mean"].tolist() == [0.5] * 3
    pretrain(config, tmp_path / "run", "dit")
    assert not (tmp_path / "run" / "tokenizer").exists()
    assert_equal(weights(tmp_path / "run"), state)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny, tmp_path, capsys):
    fit_tokenizer(tiny("no_adversarial"), tmp_path / "run", "no_adversarial", dry_run=True)
    out = capsys.readouterr().out
    assert (
        "8 of 8 images, 64 images seen" in out and "tokens per image  16, each of 8 numbers" in out
    )
    fit_tokenizer(tiny(), tmp_path / "run", "l_dae", dry_run=True)
    assert "one pass over 64 images" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_each_pass_of_a_fit_gives_the_same_images(workers, tiny, tmp_path):
    source = open_source("scattered-digits:64", "train")
    config = tiny(system__workers=workers, tokenizer__fit_images=40, data__crop="random")
    fit = fitting.prepare(config, source, torch.device("cpu"), tmp_path)
    images = fitting._first_images(fit)
    first, second = list(images), list(images)
    assert sum(map(len, first)) == 40
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("row", ["l_dae", "patch_ae"])
def test_a_fit_names_the_images_that_it_skips(row, tiny, pictures, tmp_path):
    source, folder = pictures(16), tmp_path / "images"
    folder.mkdir()
    for i in range(16):
        source.image(i).save(folder / f"{i:02}.png")
    (folder / "05.png").write_bytes(b"")
    config = tiny(row, data__source=str(folder), data__bad_images="skip")
    fit_tokenizer(config, tmp_path / "run", row)
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert skipped.keys() == {"05.png"} and "05.png cannot be decoded" in skipped["05.png"]


def test_given_pixel_statistics_are_kept(tiny, tmp_path):
    given = {"data__mean": (0.5, 0.4, 0.3), "data__std": (0.2, 0.2, 0.1)}
    fit_tokenizer(tiny("patch_ae", **given), tmp_path / "run", "patch_ae")
    assert weights(tmp_path / "run")["pixel_std"].tolist() == pytest.approx([0.2, 0.2, 0.1])


@pytest.mark.parametrize(
    "row, changes, sentence",
    [
        ("patch_vae", {"perceptual_weight": 1.0}, "perceptual_weight is a setting of conv_vae"),
        ("patch_ae", {"adversarial_weight": 1.0}, "adversarial_weight is a setting of conv_vae"),
        ("l_dae", {"codes": 8}, "tokenizer.codes is a setting of conv_vae, not of patch_pca"),
        ("l_dae", {"pretrained": "x"}, "tokenizer.pretrained is a setting of conv_vae"),
        ("l_dae", {"kl_weight": 0.1}, "kl_weight is a setting of patch_vae and conv_vae, not of p"),
        ("vqvae", {"kl_weight": 0.1}, "kl_weight needs a Gaussian posterior, .*tokenizer.codes"),
        ("dit", {"adversarial_start": 8}, "adversarial_start 8 is never reached in the 8 steps"),
        ("dit", {"dim": 6}, "tokenizer.dim 6 is not a multiple of 4"),
        ("dit", {"path": "x.safetensors"}, "tokenizer.path names a fitted tokenizer"),
        ("dit", {"optim__batch_size": 9}, "9, cannot be cut into 2 equal parts"),
        (
            "patch_ae",
            {"optim__warmup_epochs": 1},
            "tokenizer.optim.warmup_epochs 1 must be fewer than tokenizer.optim.epochs 1",
        ),
    ],
)
def test_wrong_settings_are_refused(row, changes, sentence, tiny, tmp_path):
    changes = {f"tokenizer__{name}": value for name, value in changes.items()}
    config = tiny(row, system__device_batch=8, **changes)
    with pytest.raises(InputError, match=sentence):
        fit_tokenizer(config, tmp_path / "run", row)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [fit_tokenizer, pretrain])
def test_a_half_done_training_with_a_long_warm_up_resumes(command, tiny, tmp_path):
    """Older versions began such trainings."""
    config = tiny("patch_ae", system__keep=0, system__save_minutes=0)
    run = tmp_path / "run"
    command(config, run, "patch_ae")
    folder = run / "tokenizer" if command is pretrain else run
    if command is pretrain:
        shutil.rmtree(run / "checkpoints")
        (run / "tokenizer.safetensors").unlink()
    (folder / "tokenizer.safetensors").unlink()
    for path in Checkpoints(folder).paths()[4:]:
        path.unlink()
    longer = {"tokenizer.optim.warmup_epochs": 2}
    before = tree.replace(kinds.settings_of(folder, "tokenizer"), longer)
    (folder / "config.yaml").write_text(kinds.to_yaml(before, "tokenizer"))
    command(tree.replace(config, longer), run, "patch_ae")
    assert lines(folder)[-1]["images"] == 64 and weights(folder)
    assert lines(folder)[-1]["lr"] == pytest.approx(0.1 * 8 / 256 * 56 / 128)


@pytest.mark.parametrize("function", [fit_tokenizer, pretrain])
def test_missing_perceptual_weights_are_refused_before_anything_is_written(
    function, tiny, tmp_path, monkeypatch
):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    config = tiny("dit", tokenizer__perceptual_weight=1.0)
    with pytest.raises(InputError, match="VGG16 cannot be downloaded .* vgg16@FILE"):
        function(config, tmp_path / "run", "dit")
    assert not (tmp_path / "run").exists()


def test_pixel_statistics_of_published_weights_cannot_be_changed(tiny, tmp_path):
    config = tiny("dit", tokenizer__pretrained="x", data__stats="imagenet")
    with pytest.raises(InputError, match="takes pixels in .-1, 1."):
        fit_tokenizer(config, tmp_path / "run", "dit")
