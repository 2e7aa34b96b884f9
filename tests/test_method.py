"""Each row's loss against a slow loop written from the paper's equations, in float64."""

import math

import pytest
import torch

from ldae import noise
from ldae.errors import InputError
from ldae.method import build

T = 1000


def levels(row: int, t: int) -> tuple[float, float]:
    """gamma_t and sigma_t of the rows that run (paper, sections 4.1 to 4.4)."""
    if row <= 9:
        gamma2 = 1 - (t + 1) / T
        return math.sqrt(gamma2), math.sqrt(1 - gamma2)
    if row <= 13:
        return 1.0, math.sqrt(2) * t / (T - 1)
    return 1.0, math.sqrt(1 / 3)


def reference_loss(row, method, images, positions) -> float:
    """One image, one token, one number at a time."""
    tokenizer, p = method.tokenizer, method.tokenizer.patch_size
    basis, mean, scales = tokenizer.basis, tokenizer.patch_mean, tokenizer.scales
    d, full = tokenizer.dim, tokenizer.patch_dim
    steps = noise.timesteps(method.seed, positions, len(method.sigma))
    total = 0.0
    for image, t, position in zip(images, steps, positions):
        gamma, sigma = levels(row, int(t))
        x = image.double() / 255 - tokenizer.pixel_mean[:, None, None]
        x = x / tokenizer.pixel_std[:, None, None]
        patches = torch.stack([
            x[:, i : i + p, j : j + p].reshape(-1)
            for i in range(0, 32, p) for j in range(0, 32, p)
        ])  # fmt: skip
        z_0 = torch.stack([scales * (basis[:d] @ (patch - mean)) for patch in patches])
        eps = noise.normal(method.seed, position[None], z_0.shape)[0].double()
        z_t = gamma * z_0 + sigma * eps

        def image_of(z):
            return torch.stack([basis[:d].T @ (token / scales) + mean for token in z])

        seen = image_of(z_t) if row >= 11 else z_t
        output = method.denoiser(seen[None], t[None])[0]
        for token in range(len(patches)):
            if row <= 8:
                error = ((eps[token] - output[token]) ** 2).sum() / d
            elif row == 9:
                error = gamma**2 * ((z_0[token] - output[token]) ** 2).sum() / d
            elif row <= 11:
                error = 1 / (1 + sigma**2) * ((z_0[token] - output[token]) ** 2).sum() / d
            elif row == 12:
                target = image_of(z_0)[token]
                error = 1 / (1 + sigma**2) * ((target - output[token]) ** 2).sum() / full
            else:
                r = basis @ (patches[token] - output[token])
                weighted = sum((1.0 if i < d else 0.1) * r[i] ** 2 for i in range(full))
                error = 1 / (1 + sigma**2) * weighted / full
            total += float(error) / len(patches) / len(images)
    return total


@pytest.mark.parametrize("scale", ["raw", "global", "per-axis"])
@pytest.mark.parametrize("row", range(8, 15))
def test_the_loss_of_each_row_is_its_equation(row, scale, tiny, images, awake):
    method = build(tiny(row, tokenizer__scale=scale)).double()
    method.tokenizer.fit([images])
    awake(method.denoiser)
    positions = torch.tensor([5, 3, 2**33 + 1])
    with torch.no_grad():
        found = method(images[:3], positions).item()
        wanted = reference_loss(row, method, images[:3], positions)
    assert found == pytest.approx(wanted, rel=1e-6)


def test_row_5_is_eps_prediction_on_the_linear_gamma2_schedule(tiny, images, awake):
    """Its conv tokenizer is not built yet; schedule and objective are those of row 8."""
    five, eight = tiny("linear_gamma2"), tiny("patch_pca")
    assert (five.noise, five.objective) == (eight.noise, eight.objective)
    with pytest.raises(InputError, match="conv_vae is not built yet"):
        build(five)


@pytest.mark.parametrize("row", range(1, 8))
def test_rows_whose_tokenizer_is_not_built_say_so(row, tiny):
    with pytest.raises(InputError, match="not built yet"):
        build(tiny(row))


def test_the_same_seed_is_the_same_network(tiny):
    one, same = build(tiny()), build(tiny())
    other = build(tiny(seed=1))
    weight = one.denoiser.embed.weight
    assert torch.equal(same.denoiser.embed.weight, weight)
    assert not torch.equal(other.denoiser.embed.weight, weight)


def test_the_loss_of_a_batch_is_the_mean_over_its_images(tiny, images, awake):
    method = build(tiny())
    method.tokenizer.fit([images])
    awake(method.denoiser)
    positions = torch.arange(8)
    with torch.no_grad():
        alone = [method(images[i : i + 1], positions[i : i + 1]) for i in range(8)]
        together = method(images, positions)
    torch.testing.assert_close(torch.stack(alone).mean(), together)


@pytest.mark.parametrize("row", [8, 9, 12, 13])
def test_a_perfect_network_denoises_perfectly(row, tiny, images, monkeypatch):
    """With the row's target as the output, the picture is the image (its projection where the
    target lies in the latent)."""
    method = build(tiny(row)).double()
    method.tokenizer.fit([images])
    x = method.tokenizer.normalize(images)
    projected = method.tokenizer.decode(method.tokenizer.encode(x))
    positions = torch.arange(8)

    def perfect(z_t, t, labels=None):
        z_0 = method.tokenizer.encode(x)
        eps = noise.normal(method.seed, positions, z_0.shape[1:]).double()
        from ldae.patches import patchify

        patches = patchify(x, method.tokenizer.patch_size)
        return method.objective.target(method.tokenizer, patches, z_0, eps)

    monkeypatch.setattr(method, "predict", perfect)
    clean, _, denoised = method.denoise_images(images, positions, 500)
    wanted = x if row == 13 else projected
    expected = method.tokenizer.denormalize(wanted).clamp(0, 1)
    torch.testing.assert_close(denoised, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(clean, images.double() / 255, atol=1e-6, rtol=0)


def test_dropped_labels_become_the_null_label(tiny, images):
    config = tiny("patch_pca", model__class_conditional=True, model__label_dropout=0.5)
    method = build(config, num_classes=10)
    labels = torch.arange(1000) % 10
    kept = method.drop_labels(labels, torch.arange(1000))
    assert set(kept.tolist()) == set(range(11))
    assert torch.equal(kept[kept < 10], labels[kept < 10])
    assert 400 < (kept == 10).sum() < 600
    assert build(tiny()).drop_labels(labels, torch.arange(1000)) is None
