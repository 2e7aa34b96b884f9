"""A run in Python shows what the commands write."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import ldae
from ldae.data.image import decode
from ldae.runs import kinds
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import to_yaml


def test_samples_are_those_of_the_command(run, tmp_path):
    folder = run()
    how = ldae.SamplingSettings(steps=3, seed=2)
    files = sorted(ldae.sample(folder, 3, tmp_path / "samples", sampling=how).glob("*.png"))
    wanted = np.stack([np.asarray(Image.open(file)) for file in files])
    opened = ldae.load_run(folder)
    assert np.array_equal(opened.sample(3, how).movedim(1, -1).numpy(), wanted)
    assert np.array_equal(opened.sample(3, how, batch_size=2).movedim(1, -1).numpy(), wanted)


def test_more_noise_is_further_from_the_image(run):
    opened = ldae.load_run(run())
    images = opened.images(4)
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8
    errors = []
    for t in (0, 100, 900):
        clean, noised, denoised = opened.denoise(images, t)
        torch.testing.assert_close(clean, images / 255, atol=1e-5, rtol=0)
        assert denoised.shape == clean.shape
        errors.append((noised - clean).square().mean())
    assert errors == sorted(errors) and errors[0] < errors[2]


def test_pictures_are_cropped_as_evaluation_images_are(run):
    opened = ldae.load_run(run())
    images = opened.images(2)
    pictures = [Image.fromarray(image.movedim(0, -1).numpy()) for image in images]
    for one, other in zip(opened.denoise(images, 10), opened.denoise(pictures, 10), strict=True):
        assert torch.equal(one, other)
    large = [picture.resize((80, 64)) for picture in pictures]
    assert opened.denoise(large, 10).clean.shape == (2, 3, 32, 32)


def test_a_run_is_pickled_without_its_network(run):
    opened = ldae.load_run(run(), "cpu")
    seen = opened.images_seen  # the network is read
    for other in (pickle.loads(pickle.dumps(opened)), copy.deepcopy(opened)):
        assert (other.folder, other.device) == (opened.folder, "cpu")
        assert other.images_seen == seen


def test_a_folder_may_be_relative_or_at_home(run, monkeypatch):
    folder = run()
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder)
    (folder / "metrics.jsonl").write_text('{"images": 8, "loss": 0.5}\n')
    for name in (".", f"~/{folder.name}"):
        opened = ldae.load_run(name)
        with monkeypatch.context() as patch:
            patch.chdir("/")
            assert len(opened.metrics()) == 1
    exported = ldae.export(f"~/{folder.name}", "~/exported")
    assert exported == folder.parent / "exported" and exported.is_dir()
    assert ldae.load_backbone("~/exported").num_features == 32
    assert kinds.settings_and_folder(opened.config, "~/new", kinds.pretrainings())[2] == (
        folder.parent / "new"
    )


def test_pictures_are_read_as_files_are(run, tmp_path):
    """Turned upright, and 16 bits by their range."""
    opened = ldae.load_run(run())
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.random.default_rng(0).integers(0, 65536, (40, 48), dtype=np.uint16)
    Image.fromarray(grey >> 8).convert("L").convert("RGB").save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    for file in sorted(tmp_path.glob("*.png")):
        read = Image.fromarray(np.asarray(decode(file, file.name)))  # decode leaves the EXIF tags
        one, other = (opened.denoise([picture], 10).clean for picture in (Image.open(file), read))
        assert torch.equal(one, other)
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((tmp_path / "deep.png").read_bytes()[:500])
    with pytest.raises(ldae.InputError, match="cannot be decoded: "):
        opened.denoise([Image.open(damaged)], 10)


def test_a_run_shows_its_settings_metrics_and_backbone(run, tiny):
    folder = run()
    opened = ldae.load_run(str(folder))
    assert opened.config == tiny() and opened.kind == "pretraining" and opened.row == "l_dae"
    assert opened.images_seen == 8 and opened.classes == [] and opened.metrics() == []
    damaged = '[1]\n{"images": "x"}\n{"images": 9, "loss": null}\n{"images": 16, "lo'
    (folder / "metrics.jsonl").write_text('{"images": 8, "loss": 0.5}\n' + damaged)
    assert opened.metrics() == [{"images": 8, "loss": 0.5}]
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        kept = ldae.load_backbone(folder)(x)
        assert torch.equal(opened.backbone()(x), kept)
    Checkpoints(folder).save({"images_seen": 16, "model": {}, "average": None, "optimizer": {}})
    with torch.no_grad():  # the checkpoint that is kept
        assert torch.equal(opened.backbone()(x), kept)
    assert opened.backbone().images_seen == 8
    assert opened._loaded[1].keys() == {"images_seen", "describe", "average"}  # nothing large
    assert not any(parameter.requires_grad for parameter in opened.method.parameters())
    assert str(folder) in repr(opened)


def test_what_does_not_fit_is_refused(run):
    opened = ldae.load_run(run())
    for images, t, message in (
        (torch.zeros(2, 3, 32, 32), 0, r"uint8 of shape \(B, 3, 32, 32\), not torch.float32"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), 0, "of shape"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 0, "of shape"),
        (opened.images(1), 1000, r"t 1000 is not in 0 \.\. 999"),
        (opened.images(1), 0.5, r"t 0.5 is not in 0 \.\. 999"),
        (opened.images(1), True, r"t True is not in 0 \.\. 999"),
        ([], 0, r"a tensor or a list of Pillow pictures, not \[\]"),
        ("photo.png", 0, "a list of Pillow pictures, not 'photo.png'"),
        (Image.new("L", (32, 32)), 0, "a list of Pillow pictures, not <PIL.Image"),
        ([*opened.images(2)], 0, r"a list of Pillow pictures, not '\[tensor"),
    ):
        with pytest.raises(ldae.InputError, match=message):
            opened.denoise(images, t)
    with pytest.raises(ldae.InputError, match="images must be at least 1"):
        opened.sample(0)
    with pytest.raises(ldae.InputError, match="sampler must be"):
        opened.sample(1, ldae.SamplingSettings(sampler="huen"))


def test_a_rival_does_not_denoise_and_a_tokenizer_is_no_pre_training(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(ldae.config("mae"), "mae"))
    opened = ldae.load_run(tmp_path)
    assert opened.kind == "mae" and json.dumps(opened.metrics()) == "[]"
    for call in (lambda: opened.sample(1), lambda: opened.denoise([], 0)):
        with pytest.raises(ldae.InputError, match="holds an MAE pre-training run, not a denoising"):
            call()
    with pytest.raises(ldae.InputError, match="has no checkpoint yet"):
        _ = opened.method
    (tmp_path / "config.yaml").write_text(to_yaml(ldae.Config(), "tokenizer"))
    with pytest.raises(ldae.InputError, match="holds a tokenizer run, not a pre-training run"):
        ldae.load_run(tmp_path)
    assert not Checkpoints(tmp_path).paths()
