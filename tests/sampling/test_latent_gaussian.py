"""The Gaussian of a run's latents, compared to the latents in NumPy and float64."""

import numpy as np
import pytest
import torch

from ldae.data.image import BadImage
from ldae.data.open import open_source
from ldae.data.transforms import CropTransform
from ldae.errors import InputError
from ldae.method import build
from ldae.runs.layout import LATENTS
from ldae.sampling import latent_gaussian
from ldae.sampling.latent_gaussian import LatentGaussian, fit_gaussian, load_or_fit_gaussian

CPU = torch.device("cpu")
DATA = "scattered-digits:64"


@pytest.fixture
def encoded(tiny):
    """encoded(row, **changes): a configuration, its method, and z_0 of all images, (64, N, d)."""

    def make(row="l_dae", **changes):
        config = tiny(row, **changes)
        method = build(config)
        source, crop = open_source(DATA, "train"), CropTransform(32)
        images = torch.stack([crop(source.image(i), None) for i in range(64)])
        method.tokenizer.fit([images])
        z_0 = method.encode(method.tokenizer.normalize(images)).double().numpy()
        return config, method, z_0

    return make


def test_moments_match_the_latents(encoded):
    config, method, z_0 = encoded()
    gaussian = fit_gaussian(DATA, config, method, CPU)
    assert gaussian.record == {"source": DATA, "images": "64"}
    np.testing.assert_allclose(gaussian.mean, z_0.mean(0), atol=1e-5)
    for axis in range(z_0.shape[2]):
        expected = np.cov(z_0[:, :, axis], rowvar=False, bias=True)
        np.testing.assert_allclose(gaussian.covariance[axis], expected, atol=1e-5)


@pytest.mark.parametrize("gamma, sigma", [(1.0, 1.4), (0.6, 0.8), (1.0, 0.0)])
def test_samples_have_the_moments_of_noised_latents(encoded, gamma, sigma):
    config, method, z_0 = encoded()
    gaussian = fit_gaussian(DATA, config, method, CPU)
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(20_000, *z_0.shape[1:], generator=generator)
    z_t = gaussian.sample_noised(normals, gamma, sigma).numpy()
    spread = z_t.std(0).max()
    assert np.abs(z_t.mean(0) - gamma * z_0.mean(0)).max() < 0.04 * spread
    for axis in range(z_0.shape[2]):
        expected = gamma**2 * np.cov(z_0[:, :, axis], rowvar=False, bias=True)
        expected += sigma**2 * np.eye(len(expected))
        error = np.abs(np.cov(z_t[:, :, axis], rowvar=False) - expected).max()
        assert error < 0.05 * expected.diagonal().max()


def test_pixels_of_a_token_stay_correlated_in_samples(encoded):
    """Pixels are not principal axes: without the rotation, each would be sampled by itself."""
    config, method, z_0 = encoded("dae")
    gaussian = fit_gaussian(DATA, config, method, CPU)
    normals = torch.randn(4000, *z_0.shape[1:], generator=torch.Generator().manual_seed(0))
    sampled = gaussian.sample_noised(normals, 1.0, 0.0).double().numpy()
    correlation = lambda z: np.corrcoef((z - z.mean(0)).reshape(-1, z.shape[2]), rowvar=False)  # noqa: E731
    expected, actual = correlation(z_0), correlation(sampled)
    assert np.abs(expected - np.eye(192)).max() > 0.9
    assert np.abs(actual - expected).mean() < 0.03


def test_gaussian_is_stored_and_fitted_again_when_outdated(encoded, tmp_path, monkeypatch):
    config, method, _ = encoded()
    first = load_or_fit_gaussian(tmp_path, config, method, CPU)
    calls, original = [], latent_gaussian.fit_gaussian

    def counted(spec, *args):
        calls.append(spec)
        return original(spec, *args)

    monkeypatch.setattr(latent_gaussian, "fit_gaussian", counted)
    again = load_or_fit_gaussian(tmp_path, config, method, CPU)
    assert calls == [] and torch.equal(again.covariance, first.covariance)
    assert again.record == first.record
    load_or_fit_gaussian(tmp_path, config, method, CPU, data=DATA)
    assert calls == []
    load_or_fit_gaussian(tmp_path, config, method, CPU, data="scattered-digits:70")
    assert calls == ["scattered-digits:70"]
    kept = load_or_fit_gaussian(tmp_path, config, method, CPU)
    assert calls[1:] == [] and kept.record["source"] == "scattered-digits:70"
    method.tokenizer.scales.mul_(2)
    load_or_fit_gaussian(tmp_path, config, method, CPU)
    assert calls[1:] == [DATA]
    (tmp_path / LATENTS).write_bytes(b"half")
    with pytest.raises(InputError, match="latents.safetensors is damaged"):
        LatentGaussian.load(tmp_path / LATENTS)


def test_bad_images_that_the_training_skipped_are_left_out(encoded, tmp_path):
    source, folder = open_source(DATA, "train"), tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        source.image(i).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    config, method, _ = encoded(data__bad_images="skip")
    found = fit_gaussian(str(folder), config, method, CPU)
    (folder / "3.png").unlink()
    wanted = fit_gaussian(str(folder), config, method, CPU)
    assert found.record["images"] == wanted.record["images"] == "7"
    torch.testing.assert_close(found.covariance, wanted.covariance)
    (folder / "3.png").write_bytes(b"no image")
    config, method, _ = encoded()
    with pytest.raises(BadImage, match="3.png"):
        fit_gaussian(str(folder), config, method, CPU)


def test_a_run_that_cannot_be_written_to_is_sampled(encoded, tmp_path, capsys):
    config, method, _ = encoded()
    (tmp_path / LATENTS).mkdir()  # root can write into any folder, but not here
    fitted = load_or_fit_gaussian(tmp_path, config, method, CPU)
    assert fitted.record["source"] == DATA
    printed = capsys.readouterr().out
    assert f"{LATENTS} cannot be written: " in printed and "fitted again next time" in printed


def test_gaussian_is_fitted_on_as_many_images_as_the_tokenizer(encoded):
    config, method, _ = encoded(tokenizer__fit_images=20)
    assert fit_gaussian(DATA, config, method, CPU).record["images"] == "20"
