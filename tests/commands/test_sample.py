"""The samples of a run are reproducible, and their files are complete or absent."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import ldae
from ldae import cli, draws, files, tree
from ldae.backbones.open import load_classifier
from ldae.backbones.preprocessing import preprocessing
from ldae.commands.pretrain import pretrain
from ldae.commands.sample import sample
from ldae.distributed import process_group
from ldae.errors import InputError
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.layout import LATENTS
from ldae.sampling import album
from ldae.sampling.album import Album
from ldae.sampling.latent_gaussian import LatentGaussian
from ldae.sampling.settings import SamplingSettings

FEW = {"steps": 6}
KINDS = {
    "l_dae": ("l_dae", {}, FEW),
    "labels": (
        "patch_pca",
        {"model.class_conditional": True},
        FEW | {"guidance": 2.0, "eta": 0.5},
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(row, **changes): a run folder, trained once."""
    runs = {}

    def make(row="l_dae", **changes):
        given = {name.replace("__", "."): value for name, value in changes.items()}
        key = (row, *given.items())
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp(row) / "run"
            pretrain(
                tree.replace(ldae.config(row), TINY | {"optim.epochs": 10} | given), runs[key], row
            )
        return runs[key]

    return make


@pytest.fixture
def run(trained):
    return trained()


def draw(run, out, images=10, batch_size=64, **how):
    how = SamplingSettings(**FEW | how)
    return sample(run, images, out, batch_size=batch_size, workers=0, device="cpu", sampling=how)


def read_images(folder):
    """Return the images of a folder in order, int (N, H, W[, C])."""
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_size_does_not_matter(kind, trained, tmp_path):
    row, changes, how = KINDS[kind]
    run = trained(row, **{name.replace(".", "__"): value for name, value in changes.items()})
    whole = read_images(draw(run, tmp_path / "whole", **how))
    assert whole.shape == (10, 32, 32, 3) and whole.std() > 5
    for batch_size in (1, 3, 7):
        images = read_images(draw(run, tmp_path / str(batch_size), batch_size=batch_size, **how))
        assert np.abs(images - whole).max() <= 1
    other = read_images(draw(run, tmp_path / "seed", **how | {"seed": 1}))
    assert np.abs(other - whole).max(axis=(1, 2, 3)).min() > 1
    assert np.abs(whole[1:] - whole[:-1]).max(axis=(1, 2, 3)).min() > 1


def test_two_ranks_equal_one(run, tmp_path, on_ranks):
    """Seven images in batches of two do not divide evenly. Both ranks fit the Gaussian."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for name in ("samples", LATENTS):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def work():
        with process_group(torch.device("cpu")):
            for place in (tmp_path / "folder", tmp_path / "one.npz", None):
                draw(copy, place, 7, batch_size=2)

    assert on_ranks(work) == ["", ""]
    expected = read_images(draw(run, tmp_path / "one rank", 7))
    shared, single = (LatentGaussian.load(path / LATENTS) for path in (copy, run))
    torch.testing.assert_close(shared.covariance, single.covariance)
    assert np.abs(read_images(tmp_path / "folder") - expected).max() <= 1
    assert np.abs(np.load(tmp_path / "one.npz")["arr_0"].astype(int) - expected).max() <= 1
    (grid,) = (copy / "samples").iterdir()
    expected = np.asarray(Image.open(draw(run, None, 7)))
    assert np.abs(np.asarray(Image.open(grid)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["folder", "file.npz"])
def test_interrupted_equals_uninterrupted(name, run, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    draw(run, tmp_path / "whole" / name, batch_size=4)
    save, kept = Album.save, []

    def stop(self, number, picture):
        if len(kept) == 5:
            raise KeyboardInterrupt
        save(self, number, picture)
        kept.append(number)

    monkeypatch.setattr(Album, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        draw(run, tmp_path / "parts" / name, batch_size=4)
    assert not (tmp_path / "parts" / "file.npz").exists()

    def resume(self, number, picture):
        assert number not in kept, "generated twice"
        save(self, number, picture)

    monkeypatch.setattr(Album, "save", resume)
    draw(run, tmp_path / "parts" / name, batch_size=4)
    if name == "folder":
        one, other = (read_images(tmp_path / part / name) for part in ("whole", "parts"))
    else:
        one, other = (np.load(tmp_path / part / name)["arr_0"] for part in ("whole", "parts"))
        assert os.listdir(tmp_path / "parts") == [name]
    assert len(one) == 10 and np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_existing_images_are_not_generated_again(run, tmp_path, monkeypatch):
    draw(run, tmp_path / "folder", 4)
    draw(run, tmp_path / "file.npz", 4)
    before = read_images(tmp_path / "folder")
    monkeypatch.setattr(Album, "save", lambda *_: pytest.fail("generated again"))
    draw(run, tmp_path / "folder", 4)
    draw(run, tmp_path / "file.npz", 4)
    monkeypatch.undo()
    draw(run, tmp_path / "folder", 6)
    assert np.array_equal(read_images(tmp_path / "folder")[:4], before)
    assert len(read_images(tmp_path / "folder")) == 6


def test_an_npz_file_has_the_format_of_the_adm_suite(trained, run, tmp_path):
    with np.load(draw(run, tmp_path / "file.npz")) as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].shape == (10, 32, 32, 3) and file["arr_0"].dtype == np.uint8
        pixels = file["arr_0"]
    assert np.array_equal(read_images(draw(run, tmp_path / "folder")), pixels)
    labelled = trained("patch_pca", model__class_conditional=True)
    with np.load(draw(labelled, tmp_path / "labels.npz", 5, labels=("7", "2"))) as file:
        assert file["arr_1"].tolist() == [7, 2, 7, 2, 7] and file["arr_1"].dtype == np.int64
    with np.load(draw(labelled, tmp_path / "random.npz", 40, random_labels=True)) as file:
        assert file["arr_1"].tolist() == draws.labels(0, torch.arange(40), 10).tolist()


def test_samples_of_an_earlier_version_are_continued(run, tmp_path):
    """A setting that their record lacks was at its default."""
    record = draw(run, tmp_path, 2) / album.RECORD
    written = json.loads(record.read_text())
    del written["random_labels"], written["training"]
    record.write_text(json.dumps(written))
    draw(run, tmp_path, 3)
    assert len(read_images(tmp_path)) == 3
    record.write_text("[]")
    with pytest.raises(InputError, match="holds other images, without their settings"):
        draw(run, tmp_path, 4)


def test_the_name_of_a_grid_holds_its_settings(trained, run):
    path = draw(run, None, 12)
    assert path == run / "samples" / "ddim-6-at=640.png"
    assert Image.open(path).size[0] > 8 * 64
    assert draw(run, None, 2, seed=3, sampler="heun").name == "heun-6-seed=3-at=640.png"
    labelled = trained("patch_pca", model__class_conditional=True)
    path = draw(labelled, None, 6, labels=("7", "2", "1"), guidance=1.5)
    assert path.name == "ddim-6-guidance=1.5-labels=7-2-1-at=640.png"
    width, height = Image.open(path).size
    assert 3 * 64 < width < 4 * 64 and 2 * 64 < height < 3 * 64  # a column for each class
    many = draw(labelled, None, 1, labels=("7", "2", "1") * 60)
    assert len(many.name) < 200 and many.exists()


def test_samples_of_different_settings_are_not_mixed(run, tmp_path):
    draw(run, tmp_path / "folder", 2)
    with pytest.raises(InputError, match="folder holds other samples: seed is 0 there, 1 here"):
        draw(run, tmp_path / "folder", 2, seed=1)
    other = shutil.copytree(run, tmp_path / "copies" / run.name)
    (newest,) = Checkpoints(other).paths()[-1:]
    state = torch.load(newest, weights_only=True)
    state["model"]["denoiser.final.linear.bias"] += 1
    torch.save(state, newest)
    with pytest.raises(InputError, match="folder holds other samples: weights is"):
        draw(other, tmp_path / "folder", 3)  # with the same name and the same images seen
    draw(run, tmp_path / "file.npz", 2)
    with pytest.raises(InputError, match="file.npz holds other samples: images is 2 there, 3 here"):
        draw(run, tmp_path / "file.npz", 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="mine is not empty and holds no samples.json"):
        draw(run, tmp_path / "mine", 2)
    (tmp_path / "mine" / "samples.json").write_text("{")
    with pytest.raises(InputError, match="mine holds other images, without their settings"):
        draw(run, tmp_path / "mine", 2)
    np.savez(tmp_path / "other.npz", np.zeros(3))
    with pytest.raises(InputError, match="other.npz holds other images, without their settings"):
        draw(run, tmp_path / "other.npz", 2)


@pytest.mark.parametrize("name", ["folder", "file.npz", None])
def test_a_full_disk_is_reported(name, run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if name == "file.npz":
        monkeypatch.setattr(album.np.lib.format, "write_array_header_1_0", full)
    else:
        monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        draw(run, name and tmp_path / name, 2)
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    assert draw(run, name and tmp_path / name, 2).exists()


def test_grey_images_and_other_numbers_of_channels(trained, tmp_path):
    grey = trained(data__in_chans=1)
    assert read_images(draw(grey, tmp_path / "grey", 2)).shape == (2, 32, 32)
    many = tmp_path / "images"
    many.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        np.save(many / f"{number}.npy", rng.integers(0, 255, (32, 32, 5), dtype=np.uint8))
    five = trained(data__in_chans=5, data__source=str(many))
    with pytest.raises(InputError, match="1 or 3 channels, this run 5: name an --out .npz"):
        draw(five, tmp_path / "five", 2)
    assert np.load(draw(five, tmp_path / "five.npz", 2))["arr_0"].shape == (2, 32, 32, 5)
    assert draw(five, None, 2).exists()


def test_a_single_noise_level_takes_one_step(trained, tmp_path):
    single = trained("l_dae_single")
    assert sample(single, 3, workers=0, device="cpu").name == "ddim-1-at=640.png"
    with pytest.raises(InputError, match="steps 2 is more than the 1 noise level"):
        draw(single, None, steps=2)


def test_a_saved_linear_probe_guides_to_its_classes(trained, tmp_path, capsys):
    """The probe recognises the requested classes in the samples."""
    run = str(trained("patch_pca", optim__epochs=30))
    data, probe = "scattered-digits:300", str(tmp_path / "probe")
    how = ["--workers", "0", "--device", "cpu", "--out", str(tmp_path / "results")]
    argv = ["--data", data, "--eval-data", data, "--epochs", "10", "--save", probe, *how]
    assert cli.main(["linear", "test_vit", "--random-init", "--img-size", "32", *argv]) == 0
    classifier = load_classifier(probe)
    transform = preprocessing(classifier)
    agreement = []
    for scale in ("0", "3"):
        out = str(tmp_path / f"{scale}.npz")
        argv = ["--classifier", probe, "--classifier-scale", scale, "--labels", "3", "7"]
        argv += ["--images", "16", "--steps", "10", "--out", out, "--device", "cpu"]
        assert cli.main(["sample", run, *argv]) == 0
        with np.load(out) as file:
            assert file["arr_1"].tolist() == [3, 7] * 8
            pixels, labels = torch.tensor(file["arr_0"]).movedim(-1, 1), torch.tensor(file["arr_1"])
        logits = classifier(transform.normalize(pixels)).log_softmax(-1)
        agreement.append(float(logits.gather(1, labels[:, None]).mean()))
    assert agreement[1] > agreement[0] + 0.1
    argv = ["--classifier", probe, "--labels", "ten", "--device", "cpu"]
    assert cli.main(["sample", run, *argv]) == 2
    assert "'ten' is none of the 10 classes of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["nowhere"], "nowhere is not a run folder"),
        (["RUN", "--guidance", "3"], "guidance needs a run with model.class_conditional"),
        (["RUN", "--labels", "3"], "labels need a run with model.class_conditional"),
        (["RUN", "--steps", "2000"], "steps 2000 is more than the 1000 noise levels"),
        (["RUN", "--steps", "0"], "steps must be at least 1, not 0"),
        (["RUN", "--eta", "1.5"], "eta must be at least 0 and at most 1, not 1.5"),
        (["RUN", "--eta", "0.5", "--sampler", "heun"], "eta is a setting of ddim, not of heun"),
        (["RUN", "--images", "0"], "images must be at least 1, not 0"),
        (["RUN", "--out", "grid.png"], "grid.png must be a folder, or a file that ends in .npz"),
        (["RUN", "--classifier-scale", "2"], "classifier_scale needs a --classifier"),
        (["RUN", "--classifier", "pixels"], "pixels has no classifier"),
        (["RUN", "--classifier", "RUN"], "has no classifier"),
        (["RUN", "--classifier", "resnet1"], "no timm model of that name; the nearest is 'resnet"),
    ],
)
def test_wrong_input_is_refused(argv, sentence, run, capsys):
    argv = [str(run) if word == "RUN" else word for word in argv]
    capsys.readouterr()
    assert cli.main(["sample", *argv, "--device", "cpu", "--workers", "0"]) == 2
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1
