"""The distance of two sets of images: the same however they are stored, batched and shared."""

import contextlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from ldae import cli
from ldae.backbones.open import load_backbone
from ldae.backbones.preprocessing import preprocessing
from ldae.backbones.run import load_method
from ldae.commands.fid import FIDSettings, fid
from ldae.commands.sample import sample
from ldae.data.open import open_source
from ldae.errors import InputError
from ldae.evals import dit_fid
from ldae.evals.features import Encoder
from ldae.evals.image_sets import RunImages
from ldae.files import file_hash, state_hash
from ldae.method import build
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import to_yaml
from ldae.sampling.settings import SamplingSettings

DIM = 64  # of test_vit's features
SETUP = FIDSettings(features="test_vit", random_init=True, img_size=32, workers=0, device="cpu")


def waves(count: int, seed: int) -> np.ndarray:
    """Images with structure, uint8 (count, 32, 32, 3)."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(0, 6, 32)
    a, b, c = rng.normal(size=(3, count, 1, 1, 3))
    waves = np.sin(a * axis[:, None, None] + b * axis[:, None] + c + 0.3 * seed)
    return (128 + 100 * waves + rng.normal(size=(count, 32, 32, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Two sets as arrays, and the same as a flat folder of PNGs each, in the current folder."""
    monkeypatch.chdir(tmp_path)
    arrays = {"a": waves(90, 0), "b": waves(75, 1)}
    for name, images in arrays.items():
        Path(name).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(f"{name}/{number:04d}.png")
        np.savez(f"{name}.npz", images)
    return arrays


def distance(images: str, reference: str, **changes) -> float:
    results = fid(images, reference, setup=replace(SETUP, **changes))["results"]
    return results["frechet_distance"]


def slow_distance(model: torch.nn.Module, a: np.ndarray, b: np.ndarray) -> float:
    """Of all features at once."""
    transform = preprocessing(model)
    features = []
    for images in (a, b):
        prepared = torch.stack([transform(Image.fromarray(image), None) for image in images])
        with torch.inference_mode():
            features.append(model(transform.normalize(prepared)).double().numpy())
    return frechet(*features)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The equation by NumPy's covariance and SciPy's root of a matrix, in float64."""
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    cross = scipy.linalg.sqrtm(c1 @ c2).real
    return float((m1 - m2) @ (m1 - m2) + np.trace(c1 + c2 - 2 * cross))


def test_distance_is_an_independent_computation(sets):
    model = load_backbone("test_vit", random_init=True, img_size=32)
    wanted = slow_distance(model, sets["a"], sets["b"])
    assert distance("a", "b", batch_size=90) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_batch_size_does_not_matter(sets, batch_size):
    assert distance("a", "b", batch_size=batch_size) == pytest.approx(distance("a", "b"), rel=1e-5)


def test_folder_and_npz_of_the_same_images_agree_exactly(sets):
    wanted = distance("a", "b")
    assert distance("a.npz", "b.npz") == wanted == distance("a", "b.npz")
    assert distance("a", "a.npz") < 1e-8 < wanted


def test_two_ranks_measure_what_one_measures(sets, on_ranks):
    """90 and 75 images in batches of 7: neither the ranks nor the batches come out even."""
    argv = ["fid", "a", "b", "--features", "test_vit", "--random-init", "--img-size", "32"]
    argv += ["--batch-size", "7", "--workers", "0", "--device", "cpu", "--out", "two.json"]

    def work():
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert cli.main(argv) == 0
        assert len(printed.getvalue().splitlines()) == (os.environ["RANK"] == "0")

    assert on_ranks(work) == ["", ""]
    found = json.loads(Path("two.json").read_text())
    assert found["results"]["frechet_distance"] == pytest.approx(distance("a", "b"), rel=1e-6)
    assert (found["images"]["images"], found["reference"]["images"]) == (90, 75)


def test_results_tell_what_the_number_depends_on(sets, capsys):
    record = fid("a", "b", setup=SETUP)
    path = Path("evals", "a", "fid-b-random-init-features=test_vit-img_size=32", "results.json")
    assert json.loads(path.read_text()) == record
    assert record["task"] == "frechet_distance" and "fid" not in record["results"]
    features = record["protocol"]["features"]
    assert features["network"] == "test_vit (random init)" and len(features["sha256"]) == 64
    assert features["preprocessing"]["input_size"] == [3, 32, 32]
    assert record["images"] == {
        "spec": "a",
        "split": "all",
        "images": 90,
        "fingerprint": open_source("a", "train").fingerprint(),
        "first_size": [32, 32],
        "resized_twice": False,
        "samples": None,
    }
    assert record["reference"]["spec"] == "b" and record["reference"]["images"] == 75
    assert "torch" in record["environment"]["packages"]
    line = capsys.readouterr().out
    assert line.startswith("Frechet distance in the features of test_vit (random init) of a (90 ")
    assert str(path) in line and len(line.splitlines()) == 1


def files_in(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in Path(folder).rglob("*"))


def test_nothing_is_written_into_the_users_images(sets):
    before = files_in("a", "b")
    for images in ("a", "a.npz", "scattered-digits:100"):
        fid(images, "b", setup=SETUP)
    assert files_in("a", "b") == before
    assert sorted(path.name for path in Path().iterdir()) == ["a", "a.npz", "b", "b.npz", "evals"]
    homes = ["a", "a.npz", "scattered-digits-100"]
    name = "fid-b-random-init-features=test_vit-img_size=32"
    assert sorted(Path("evals").rglob("results.json")) == [
        Path("evals", home, name, "results.json") for home in homes
    ]


def test_no_result_of_other_images_of_the_same_name_is_lost(sets):
    for place in ("x", "y"):
        for name, images in sets.items():
            Path(place).mkdir(exist_ok=True)
            np.savez(f"{place}/{name}.npz", images)
    pairs = [("x/a.npz", "x/b.npz"), ("y/a.npz", "x/b.npz"), ("x/a.npz", "y/b.npz")]
    for pair in (*pairs, *pairs):
        fid(*pair, setup=SETUP)
    records = [json.loads(path.read_text()) for path in Path("evals", "a.npz").rglob("*.json")]
    found = [(record["images"]["spec"], record["reference"]["spec"]) for record in records]
    assert sorted(found) == sorted(pairs)


def test_no_result_of_other_weights_of_the_same_name_is_lost(sets, inception, monkeypatch):
    fid("a", "b", setup=inception)
    monkeypatch.setattr("ldae.commands.fid.Inception.real", "6726825d01")
    fid("a", "b", setup=inception)
    assert len(list(Path("evals", "a").rglob("results.json"))) == 2


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(sets, monkeypatch):
    Path("evals").touch()
    monkeypatch.setattr("ldae.evals.features.eval_batches", None)  # calling it: TypeError
    with pytest.raises(InputError, match="evals/a cannot be written: evals is not a writable"):
        fid("a", "b", setup=SETUP)


def test_the_reference_is_read_first_and_its_statistics_are_kept(sets):
    """A bad file there must not cost the samples, nor bad samples the statistics."""
    Path("a", "0089.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="a/0089.png"):
        distance("a", "b", save_stats=Path("stats.npz"))
    assert distance("b", "stats.npz") < 1e-8
    Path("b", "0074.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="b/0074.png"):
        distance("a", "b")


def test_other_weights_have_another_hash(sets):
    hashes = set()
    for changes in (
        {"features": "test_vit2"},
        {},
        {},
        {"features": "pixels:4", "random_init": False, "img_size": None},
    ):
        record = fid("a", "a", setup=replace(SETUP, **changes))
        hashes.add(record["protocol"]["features"]["sha256"])
    assert len(hashes) == 3


def test_saved_statistics_stand_in_for_the_reference(sets):
    wanted = distance("a", "b", save_stats=Path("stats.npz"))
    record = fid("a", "stats.npz", setup=SETUP)
    assert record["results"]["frechet_distance"] == wanted
    assert record["reference"]["images"] == 75
    assert record["reference"]["features"] == record["protocol"]["features"]
    with pytest.raises(InputError, match="holds statistics already"):
        distance("a", "stats.npz", save_stats=Path("more.npz"))
    with pytest.raises(InputError, match="stats.npz are those of other features: sha256 is"):
        distance("a", "stats.npz", features="test_vit2")
    pixels = {"random_init": False, "img_size": None}
    distance("a", "b", features="pixels:4", save_stats=Path("stats.npz"), **pixels)
    with pytest.raises(InputError, match="stats.npz are those of other features: preprocessing is"):
        distance("a", "stats.npz", features="pixels:3", **pixels)


@pytest.fixture
def inception(monkeypatch):
    """A network in Inception's place that gives the means of the quarters of an image."""

    class Quarters(torch.nn.Module):
        dim, real = 12, "6726825d"

        def __init__(self, weights):
            super().__init__()
            self.file, self.sha256 = weights.name, self.real if weights.name == "real" else "00"

        def forward(self, images):
            assert images.dtype == torch.uint8
            return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)

    monkeypatch.setattr("ldae.commands.fid.Inception", Quarters)
    return FIDSettings(weights=Path("real"), workers=0, device="cpu")


def quarters(images: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    return torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)


def test_inception_sees_the_pixels_and_its_distance_is_called_fid(sets, inception, capsys):
    record = fid("a", "b", setup=inception)
    assert record["task"] == "fid" and set(record["results"]) == {"fid"}
    # Their means and products need more digits than float32 has.
    wanted = frechet(*(quarters(sets[name]).numpy() for name in "ab"))
    assert record["results"]["fid"] == pytest.approx(wanted, rel=1e-10)
    assert record["protocol"]["features"]["preprocessing"]["img_size"] == 32
    assert capsys.readouterr().out.startswith("FID of a (90 images) to b (75 images): ")
    fid("a", "b", setup=replace(inception, weights=Path("mine")))
    assert "FID (by mine, which is not the published file)" in capsys.readouterr().out


def test_saved_statistics_of_inception_stand_in_for_the_reference(sets, inception):
    wanted = fid("a", "b", setup=replace(inception, save_stats=Path("stats.npz")))
    assert fid("a", "stats.npz", setup=inception)["results"] == wanted["results"]


def test_sizes_that_differ_are_cropped_to_the_first_images(sets, inception):
    wide = np.pad(sets["b"], ((0, 0), (0, 0), (8, 8), (0, 0)))  # the crop takes the middle
    np.savez("wide.npz", wide)
    assert (
        fid("a", "wide.npz", setup=inception)["results"]
        == fid("a", "b", setup=inception)["results"]
    )
    record = fid("wide.npz", "a", setup=replace(inception, img_size=16))
    assert record["protocol"]["features"]["preprocessing"]["img_size"] == 16
    assert record["images"]["first_size"] == [48, 32]


def test_statistics_of_an_unknown_network_are_taken_for_inceptions(sets, inception):
    rows = quarters(sets["b"]).numpy()
    np.savez("adm.npz", sets["a"][:1], mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    record = fid("a", "adm.npz", setup=inception)
    assert record["reference"]["images"] is None and "not stated" in record["reference"]["features"]
    assert record["results"]["fid"] == pytest.approx(
        fid("a", "b", setup=inception)["results"]["fid"]
    )
    # For any other network its images count, of which there are too few here.
    with pytest.raises(InputError, match="adm.npz has 1 images, fewer than the 64 dimensions"):
        distance("a", "adm.npz")
    np.savez("small.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match="small.npz are of 3 features, not 12"):
        fid("a", "small.npz", setup=inception)


@pytest.fixture
def run(tiny, sets):
    from ldae.commands.pretrain import pretrain

    pretrain(tiny("patch_pca"), Path("run"), "patch_pca")
    return "run"


def test_a_runs_samples_are_drawn_as_ldae_sample_draws_them(run):
    how = SamplingSettings(steps=3, seed=5)
    setup = replace(SETUP, images=70, batch_size=16)
    record = fid(run, setup=setup, sampling=how)
    assert record["reference"]["spec"] == "scattered-digits:64"  # what the run was trained on
    assert record["images"]["images"] == 70 and record["images"]["samples"]["seed"] == 5
    name = (
        "fid-scattered-digits-64-random-init-images=70-features=test_vit-img_size=32-steps=3-seed=5"
    )
    assert list(Path(run, "evals").rglob("*.json")) == [Path(run, "evals", name, "results.json")]
    sample(Path(run), 70, Path("drawn"), batch_size=16, workers=0, device="cpu", sampling=how)
    again = fid("drawn", "scattered-digits:64", setup=replace(setup, images=None))
    assert again["results"] == record["results"]
    assert again["images"]["samples"] == json.loads(json.dumps(record["images"]["samples"]))
    argv = ["--features", "test_vit", "--random-init", "--img-size", "32", "--device", "cpu"]
    argv += ["--images", "70", "--batch-size", "16", "--steps", "3", "--seed", "5"]
    assert cli.main(["fid", run, *argv, "--out", "cli.json"]) == 0
    assert json.loads(Path("cli.json").read_text())["results"] == record["results"]
    method, state = load_method(Path(run))
    samples = record["images"]["samples"]
    assert samples["weights"] == state_hash(method.state_dict())
    assert samples["images_seen"] == state["images_seen"] > 0
    other = fid(run, setup=setup, sampling=replace(how, seed=6))
    assert other["results"] != record["results"]


def test_ranks_draw_each_sample_once(run, monkeypatch):
    encoder = Encoder(load_backbone("pixels:4"), torch.device("cpu"), batch_size=2)
    samples = RunImages(Path(run), 11, SamplingSettings(steps=2), encoder.device, workers=0)
    parts = []
    for world_size, rank in ((1, 0), (2, 0), (2, 1)):
        monkeypatch.setattr("ldae.distributed.world_size", lambda: world_size)
        monkeypatch.setattr("ldae.distributed.rank", lambda: rank)
        parts.append(torch.cat(list(samples.features(encoder))))
    whole, even, odd = parts
    assert torch.equal(whole[::2], even) and torch.equal(whole[1::2], odd)


@pytest.fixture
def dit(tiny, fitted, awake, sets, monkeypatch):
    """dit(row): a run folder whose FID can be DiT's, of 40 samples; and adm.npz, as ADM's file."""
    monkeypatch.setattr(dit_fid, "IMAGES", 40)
    rows = quarters(sets["b"]).numpy()
    statistics = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}
    np.savez("adm.npz", sets["b"][:1], **statistics)
    np.savez("adm16.npz", sets["b"][:1, :16, :16], **statistics)
    np.savez("statistics.npz", **statistics)

    def make(row="dit", **changes):
        changes = {"tokenizer__perceptual_weight": 1.0, "optim__ema": 0.9999} | changes
        config = tiny(row, **changes)
        classes = list("0123456789") if config.model.class_conditional else []
        method = build(config, num_classes=len(classes))
        fitted(method.tokenizer)
        awake(method.denoiser)
        folder = Path(f"run-{row}")
        folder.mkdir()
        (folder / "config.yaml").write_text(to_yaml(config, "pretraining"))
        weights = method.state_dict()
        state = {"images_seen": 8, "model": weights, "optimizer": {}}
        state |= {"average": weights if config.optim.ema else None}
        state["describe"] = {"row": row, "images": 64, "classes": classes}
        Checkpoints(folder).save(state)
        return str(folder)

    return make


def few_features(self, encoder):
    """Features of RunImages without sampling."""
    yield torch.rand(self.count, encoder.dim)


DIT_FLAGS = {"sampler": "ddpm", "steps": 250, "random_labels": True}


def test_fid_as_dit_reports_it_has_a_name(dit, inception, capsys):
    run, setup = dit(), replace(inception, protocol="dit")
    record = fid(run, "adm.npz", setup=setup)
    name = "FID-50K (DiT's protocol with fixed variances, against adm.npz)"
    assert record["protocol"]["name"] == name and not record["protocol"]["differs_from_dit"]
    samples = record["images"]["samples"]
    assert {key: samples[key] for key in DIT_FLAGS} == DIT_FLAGS
    assert record["reference"]["sha256"] == file_hash(Path("adm.npz"))
    assert capsys.readouterr().out.startswith(
        f"{name} of run-dit (40 images, ddpm in 250 steps, random_labels True) to adm.npz ("
    )
    (path,) = Path(run, "evals").rglob("results.json")
    assert path.parent.name == "fid-adm.npz-protocol=dit-weights=real"
    assert json.loads(path.read_text()) == record
    # The number has the name also when every setting is given, or the samples are in a file.
    sample(
        Path(run),
        40,
        Path("s.npz"),
        workers=0,
        device="cpu",
        sampling=SamplingSettings(**DIT_FLAGS),
    )
    for one in (setup, inception):
        again = fid("s.npz", "adm.npz", setup=one)
        assert again["protocol"]["name"] == name
        assert again["results"]["fid"] == pytest.approx(record["results"]["fid"], rel=1e-3)


@pytest.mark.parametrize(
    "how, setup, reference, trained, sentence",
    [
        ({"sampler": "heun"}, {}, "adm.npz", {}, "sampler is heun, not ddpm"),
        ({"steps": 50}, {}, "adm.npz", {}, "steps is 50, not 250"),
        ({"guidance": 1.5}, {}, "adm.npz", {}, "guidance is 1.5, not 1.0"),
        ({"labels": ("3",)}, {}, "adm.npz", {}, r"labels is \['3'\], not \[\]"),
        ({"precision": "bf16"}, {}, "adm.npz", {}, "precision is bf16, not fp32"),
        ({}, {"images": 30}, "adm.npz", {}, "images is 30, not 40"),
        ({}, {"img_size": 16}, "adm.npz", {}, "img_size is 16, not 32"),
        ({}, {"weights": Path("mine")}, "adm.npz", {}, "the features are not those of the"),
        ({}, {}, None, {}, "the reference is no file like ADM's"),
        ({}, {}, "a", {}, "the reference is no file like ADM's"),
        ({}, {}, "statistics.npz", {}, "the reference is no file like ADM's"),
        ({}, {}, "adm16.npz", {}, "the reference is no file like ADM's .* for 32 pixels"),
        ({}, {}, "adm.npz", {"optim__ema": 0.999}, "ema is 0.999, not 0.9999"),
        ({}, {}, "adm.npz", {"optim__ema": 0.0}, "ema is 0.0, not 0.9999"),
        ({}, {}, "adm.npz", {"optim__ema_warmup": True}, "ema_warmup is True, not False"),
    ],
)
def test_what_contradicts_dits_fid_is_refused_and_has_another_name(
    how, setup, reference, trained, sentence, dit, inception, monkeypatch
):
    run, how = dit(**trained), SamplingSettings(**how)
    monkeypatch.setattr(RunImages, "features", None)  # refused before the work
    with pytest.raises(InputError, match=f"protocol dit: {sentence}"):
        fid(run, reference, setup=replace(inception, protocol="dit", **setup), sampling=how)
    monkeypatch.setattr(RunImages, "features", few_features)
    how = dit_fid.sampling_of_dit(how, class_conditional=True)
    setup = replace(inception, **{"images": 40} | setup)
    protocol = fid(run, reference, setup=setup, sampling=how)["protocol"]
    assert protocol["name"].startswith("FID") and "DiT" not in protocol["name"]
    assert len(protocol["differs_from_dit"]) == 1


def test_dits_fid_of_other_rows_and_of_other_images_is_called_what_it_is(
    dit, inception, monkeypatch, capsys
):
    setup = replace(inception, protocol="dit")
    monkeypatch.setattr(RunImages, "features", few_features)
    record = fid(dit("unconditional"), "adm.npz", setup=setup)
    title = "FID-50K (DiT's protocol with fixed variances, against adm.npz, but of {})"
    assert record["protocol"]["name"] == title.format("row unconditional")
    assert not record["images"]["samples"]["random_labels"]
    changed = dit("dit", noise__schedule="cosine")
    name = fid(changed, "adm.npz", setup=setup)["protocol"]["name"]
    assert name == title.format("no row of the paper")
    capsys.readouterr()
    fid(changed, "a", setup=replace(inception, images=50), sampling=SamplingSettings(guidance=2.5))
    line = "FID of run-dit (50 images, ddim in 50 steps, guidance 2.5) to a (90 images): "
    assert capsys.readouterr().out.startswith(line)
    with pytest.raises(InputError, match="protocol dit: the images have no record of the run"):
        fid("a", "adm.npz", setup=setup)


def test_what_does_not_fit_a_run_or_a_folder_is_told(run):
    with pytest.raises(InputError, match="has 10 images, fewer than the 64 dimensions"):
        fid(run, setup=replace(SETUP, images=10))
    with pytest.raises(InputError, match="has 10 images, fewer than the 2,048 dimensions"):
        fid(run, setup=FIDSettings(images=10, weights=Path("not-there.pth")))  # before it is opened
    with pytest.raises(InputError, match="guidance needs a run with model.class_conditional"):
        fid(run, setup=SETUP, sampling=SamplingSettings(guidance=2.5))
    with pytest.raises(InputError, match="eta is a setting of ddim"):
        fid(run, setup=SETUP, sampling=SamplingSettings("heun", eta=1))
    with pytest.raises(InputError, match="steps is for samples of a run, and a is no run folder"):
        fid("a", "b", setup=SETUP, sampling=SamplingSettings(steps=3))
    with pytest.raises(InputError, match="images is for samples of a run"):
        fid("a", "b", setup=replace(SETUP, images=70))
    with pytest.raises(
        InputError, match="the reference run is a run: name a folder of its samples"
    ):
        fid("a", run, setup=SETUP)
    with pytest.raises(InputError, match="say what to compare a with: ldae fid a REFERENCE"):
        fid("a", setup=SETUP)


def test_fewer_images_than_dimensions_are_told_before_the_work(sets, monkeypatch):
    np.savez("few.npz", sets["a"][: DIM - 1])
    np.savez("enough.npz", sets["a"][:DIM])
    assert distance("a", "enough.npz") > 0
    monkeypatch.setattr("ldae.evals.features.eval_batches", None)  # calling it: TypeError
    for pair in (("few.npz", "a"), ("a", "few.npz")):
        with pytest.raises(
            InputError, match=f"few.npz has {DIM - 1} images, fewer than the {DIM} "
        ):
            distance(*pair)


@pytest.mark.parametrize(
    "argv, told",
    [
        (["none", "b"], "no folder, archive or built-in data set is named 'none'"),
        (["a", "none.npz"], "named 'none.npz'"),
        (["a", "b", "--features", "test_vitt"], "test_vit"),
        (
            ["many.npz", "b", "--features", "inception", "--weights", "none.pth"],
            "no checkpoint file none.pth",
        ),
        (["a", "b", "--weights", "none.pth"], "weights are Inception's"),
        (["a", "b", "--features", "inception"], "random_init is for a backbone"),
        (["a", "b", "--batch-size", "0"], "batch_size must be at least 1"),
        (["a", "b", "--out", "a.npz/x.json"], "cannot be written"),
        (["a", "b", "--out", "a"], "out a is a folder, not a file"),
        (["a", "b", "--save-stats", "b"], "save_stats b is a folder"),
        (["a", "b", "--save-stats", "stats"], "save_stats stats must end in .npz"),
        (["a", "b", "--save-stats", "b.npz/s.npz"], "b.npz cannot be written"),
    ],
)
def test_wrong_input_is_told_in_a_sentence(sets, argv, told, capsys):
    np.savez("many.npz", np.zeros((2048, 1, 1, 3), np.uint8))
    inception_file = "--weights" in argv and "--features" in argv
    random = [] if inception_file else ["--random-init"]
    common = ["--workers", "0", "--device", "cpu"]
    features = [] if "--features" in argv else ["--features", "test_vit"]
    assert cli.main(["fid", *argv, *features, *random, *common]) == 2
    told_lines = capsys.readouterr().err.strip().splitlines()[-1]
    assert told in told_lines
