"""A pre-training from cached latents sees what it would encode, up to the rounding of float16."""

import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldae import tokenizers
from ldae.backbones.run import load_method
from ldae.commands.cache import cache
from ldae.commands.fit_tokenizer import fit_tokenizer
from ldae.commands.pretrain import pretrain
from ldae.data.cache_file import open_cache
from ldae.data.cached import copy_latents
from ldae.data.image import BadImage
from ldae.data.loader import train_batches
from ldae.data.open import open_source
from ldae.data.transforms import CropTransform
from ldae.errors import InputError
from ldae.method import LDAE, build, build_tokenizer
from ldae.pretraining.latents import LatentEncoder, open_latents
from ldae.runs.checkpoints import Checkpoints
from ldae.train.interrupt import Interrupted
from ldae.tree import replace

CPU = torch.device("cpu")
CLASSES = 10


@pytest.fixture
def cached(tiny, fitted, tmp_path):
    """cached(row, source): settings of a run from cached latents; the tokenizer is not trained."""

    def write(row="dit", source="scattered-digits:64", bad_images="stop", **changes):
        name = f"{row}-{len(list(tmp_path.iterdir()))}"
        tokenizer = tmp_path / f"{name}.tokenizer.safetensors"
        latents = tmp_path / f"{name}.latents.safetensors"
        config = tiny(row, data__source=source, **changes)
        tokenizers.save(fitted(build_tokenizer(config)), tokenizer)
        cache(source, latents, latents=tokenizer, workers=0, bad_images=bad_images)
        return replace(config, {"tokenizer.path": str(tokenizer), "data.latents": str(latents)})

    return write


def weights(run):
    return Checkpoints(run).load()["model"]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("posterior", ["sample", "mean"])
@pytest.mark.parametrize("row, scale", [
    ("dit", "global"), ("dit", "per-axis"), ("dit", "raw"), ("vqvae", "global"),
])  # fmt: skip
def test_cached_latents_are_those_of_the_images(row, scale, posterior, tiny, images, fitted):
    """Within a thousandth of their deviation, or of themselves beyond it. Draws are by position.

    Except for raw latents, a large mean in the network's own units does not count.
    """
    config = tiny(row, tokenizer__scale=scale, tokenizer__posterior=posterior)
    method = build(config, CLASSES)
    network, channels = method.tokenizer.network, config.tokenizer.dim // 4
    with torch.no_grad():
        network.quant_conv.bias[:channels] += 50
    if method.tokenizer.stochastic:  # standard deviations from e^-2 to e^-1
        with torch.no_grad():
            network.quant_conv.bias[channels:] = torch.linspace(-4, -2, channels)
    fitted(method.tokenizer)
    rows = torch.from_numpy(LatentEncoder(method.tokenizer, CPU)(images))
    assert rows.dtype == torch.float16 and rows.shape == (8, 2 if row == "dit" else 1, 16, 8)
    positions = torch.tensor([3, 2**33, 0, 7, 5, 6, 11, 2])
    found = method.encode(method.read(rows), positions)
    z_0 = method.encode(method.read(images), positions)
    error = (found - z_0).abs()
    assert (error <= 1e-3 * z_0.abs().clamp(min=z_0.std())).all()
    assert scale == "raw" or error.square().mean().sqrt() < 3e-4 * z_0.std()
    other = method.encode(method.read(rows), positions + 1)
    assert torch.equal(found, other) == (posterior == "mean" or row == "vqvae")


@pytest.mark.parametrize("row", ["dit", "vqvae", "linear_gamma2"])
def test_the_loss_from_cached_latents_is_that_from_images(row, method, images):
    """Its gradients too. No part of the tokenizer is called."""
    one = method(row, num_classes=CLASSES).train()
    rows = torch.from_numpy(LatentEncoder(one.tokenizer, CPU)(images))
    positions, labels = torch.arange(8), torch.arange(8)
    found = []
    for batch in (images, rows):
        loss = one(batch, positions, labels)
        loss.backward()
        found.append((loss, {n: p.grad for n, p in one.named_parameters() if p.requires_grad}))
        one.zero_grad()

        def refuse(*_):
            raise AssertionError("the tokenizer encodes")

        for module in one.tokenizer.modules():
            if [*module.parameters(recurse=False)]:  # diffusers may share the others globally
                module.register_forward_pre_hook(refuse)
    (loss, gradients), (from_cache, others) = found
    assert from_cache != loss and from_cache.item() == pytest.approx(loss.item(), rel=1e-3)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-2 * gradient.norm(), name


def test_batches_are_the_latents_of_the_images_batches(cached):
    """On any ranks, with any workers and after a resume; labels and positions are the images'."""
    config = cached(source="scattered-digits:100")
    source = open_source(config.data.source, "train")
    tokenizer = tokenizers.open_fitted(config.tokenizer.path)
    latents, encode = open_latents(config, tokenizer, source), LatentEncoder(tokenizer, CPU)

    def stream(source, transform, **how):
        how = {"seed": 3, "start": 0, "stop": 220, "batch_size": 12} | how
        return list(train_batches(source, transform, **how))

    for how in (
        {}, {"workers": 2}, {"start": 96, "rank": 1, "world_size": 3, "micro_batches": 2},
    ):  # fmt: skip
        for one, other in zip(
            stream(source, CropTransform(32), **how | {"workers": 0}),
            stream(latents, copy_latents, **how),
            strict=True,
        ):
            assert one.positions.equal(other.positions) and one.targets.equal(other.targets)
            expected = torch.from_numpy(encode(one.images))
            torch.testing.assert_close(other.images, expected, rtol=2e-3, atol=1e-5)


def test_a_killed_run_ends_as_an_undisturbed_one(cached, fork, tmp_path):
    """Bit for bit, with a data worker."""
    config = replace(cached(), {"system.save_minutes": 0, "system.workers": 1, "optim.ema": 0.9})
    pretrain(config, tmp_path / "whole", "dit")

    def work():
        calls, original = [], LDAE.forward

        def forward(*arguments):
            calls.append(1)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        LDAE.forward = forward
        pretrain(config, tmp_path / "killed", "dit")

    process = fork.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 0 < Checkpoints(tmp_path / "killed").load()["images_seen"] < 64
    pretrain(config, tmp_path / "killed", "dit")
    whole, killed = (Checkpoints(tmp_path / run).load() for run in ("whole", "killed"))
    assert_equal(killed["model"], whole["model"])
    assert_equal(killed["average"], whole["average"])
    assert (tmp_path / "killed" / "denoised.png").read_bytes()
    load_method(tmp_path / "killed")


def test_two_ranks_train_on_what_one_does(cached, tmp_path, on_ranks):
    config = replace(cached(), {"optim.blr": 1e-3, "system.device_batch": 2})
    pretrain(config, tmp_path / "one", "dit")
    assert on_ranks(lambda: pretrain(config, tmp_path / "two", "dit")) == ["", ""]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_run_stays_with_images_or_with_latents(cached, tmp_path, interrupts):
    """Their latents differ by rounding. The file of the latents may move."""
    config = cached()
    on_images = replace(config, {"data.latents": ""})
    pretrain(config, tmp_path / "whole", "dit")
    interrupts(LDAE, 3, 6)
    for name, settings in (("latents", config), ("images", on_images)):
        with pytest.raises(Interrupted):
            pretrain(settings, tmp_path / name, "dit")
    with pytest.raises(InputError, match="data.latents is '/.*safetensors' there, '' here; name"):
        pretrain(on_images, tmp_path / "latents", "dit")
    with pytest.raises(InputError, match="data.latents is '' there, '/.*safetensors' here; name"):
        pretrain(config, tmp_path / "images", "dit")
    moved = tmp_path / "moved.safetensors"
    os.rename(config.data.latents, moved)
    pretrain(replace(config, {"data.latents": str(moved)}), tmp_path / "latents", "dit")
    assert_equal(weights(tmp_path / "latents"), weights(tmp_path / "whole"))


def test_a_run_does_not_go_on_with_latents_of_another_tokenizer(
    cached, fitted, tmp_path, interrupts
):
    """Its tokenizer and its latents are replaced under their names."""
    config = cached()
    interrupts(LDAE, 3)
    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "run", "dit")
    tokenizer, latents = Path(config.tokenizer.path), Path(config.data.latents)
    tokenizers.save(fitted(build_tokenizer(replace(config, {"seed": 1}))), tokenizer)
    latents.unlink()
    cache(config.data.source, latents, latents=tokenizer, workers=0)
    with pytest.raises(InputError, match="latents of another tokenizer than that of the run"):
        pretrain(config, tmp_path / "run", "dit")


def test_a_bad_image_is_bad_in_its_latents_too(cached, tmp_path):
    """Names of an odd length are no obstacle to numbers of two bytes."""
    source = open_source("scattered-digits:21", "train")
    (tmp_path / "images").mkdir()
    for number in range(21):
        source.image(number).save(tmp_path / "images" / f"{number:03}.png")
    (tmp_path / "images" / "007.png").write_bytes(b"")
    config = cached("unconditional", str(tmp_path / "images"), bad_images="skip")
    source = open_source(config.data.source, "train")
    latents = open_latents(config, tokenizers.open_fitted(config.tokenizer.path), source)
    assert latents.image(0).flags.aligned and not latents.image(0).flags.owndata
    how = {"seed": 0, "start": 0, "stop": 21, "batch_size": 7}
    found = list(train_batches(latents, copy_latents, **how, bad_images="skip"))
    assert [name for batch in found for name, _ in batch.bad] == ["007.png"]
    with pytest.raises(BadImage, match=r"images/007\.png could not be decoded when the cache was"):
        list(train_batches(latents, copy_latents, **how))


def test_what_does_not_fit_is_refused_before_anything_is_written(cached, tiny, fitted, tmp_path):
    config = cached()
    crops, other = tmp_path / "crops.safetensors", tmp_path / "other.safetensors"
    cache("scattered-digits:64", crops, side=32, workers=0)
    tokenizers.save(fitted(build_tokenizer(replace(config, {"seed": 1}))), other)
    for changes, message in (
        ({"data.crop": "random"}, "^data.crop random needs images, but data.latents are of center"),
        ({"data.flip": True}, "^data.flip needs images, but data.latents are of center crops"),
        ({"tokenizer.path": ""}, "^data.latents needs tokenizer.path, the tokenizer that encoded"),
        (
            {"tokenizer.path": str(other)},
            "another tokenizer than that of the run, .*other.safetens",
        ),
        (
            {"data.source": "scattered-digits:65"},
            "latents of other images than scattered-digits:65",
        ),
        ({"data.source": "scattered-digits:64:1"}, "has latents of other images than scattered"),
        ({"data.latents": str(crops)}, "crops.safetensors holds images, not latents, which `ldae"),
        ({"data.latents": str(other)}, "other.safetensors is no file of `ldae cache`"),
        ({"data.latents": str(tmp_path / "no")}, "no cannot be read: No such file"),
        ({"data.source": config.data.latents}, "holds latents, not images: name it by data.lat"),
    ):
        with pytest.raises(InputError, match=message):
            pretrain(replace(config, changes), tmp_path / "run", "dit")
    with pytest.raises(InputError, match="^data.latents needs tokenizer.name conv_vae, not patch_"):
        pretrain(tiny("patch_ae", data__latents=config.data.latents), tmp_path / "run", "patch_ae")
    with pytest.raises(InputError, match="^data.latents names latents, but a tokenizer is fitted"):
        fit_tokenizer(tiny("dit", data__latents=config.data.latents), tmp_path / "run", "dit")
    assert not (tmp_path / "run").exists()


def test_latents_of_another_size_are_refused(cached, fitted, tmp_path):
    """Published weights may have one tokenizer for all sizes."""
    config = cached()
    larger = replace(config, {"data.img_size": 64})
    source = open_source(config.data.source, "train")
    tokenizer = build_tokenizer(larger)
    tokenizer.load_state_dict(tokenizers.open_fitted(config.tokenizer.path).state_dict())
    with pytest.raises(InputError, match="latents for data.img_size 32, not 64"):
        open_latents(larger, tokenizer, source)


def test_latents_that_float16_cannot_hold_are_refused(tiny, images):
    tokenizer = build_tokenizer(tiny("dit"))
    with torch.no_grad():
        tokenizer.scales.fill_(1e9)
    with pytest.raises(InputError, match="^float16 cannot hold the latents of this tokenizer"):
        LatentEncoder(tokenizer, CPU)(images)


def test_latents_of_crops_are_those_of_the_images_or_say_that_they_are_not(cached, tmp_path):
    """Crops of another side are resized twice."""
    config, crops = cached(), tmp_path / "crops.safetensors"
    for side, twice in ((32, False), (40, True)):
        cache(config.data.source, crops, side=side, split="train", workers=0)
        latents = tmp_path / f"latents-{side}.safetensors"
        cache(str(crops), latents, latents=Path(config.tokenizer.path), workers=0)
        source = open_source(str(crops), "train")
        there, here = (open_cache(path).arrays for path in (config.data.latents, latents))
        same = (there["train"]["latents"] == here["train"]["latents"]).all()
        assert same == (not twice)
        opened = open_latents(
            replace(config, {"data.latents": str(latents)}),
            tokenizers.open_fitted(config.tokenizer.path),
            source,
        )
        assert opened.resizes_twice(copy_latents) == twice
        crops.unlink()


def test_a_picture_is_still_made_from_images(cached, tmp_path):
    pretrain(cached(optim__epochs=0.25, optim__warmup_epochs=0), tmp_path / "run", "dit")
    assert Image.open(tmp_path / "run" / "denoised.png").size[1] > 3 * 32
