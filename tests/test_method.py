"""Each row's loss against a slow loop written from the paper's equations, in float64."""

import math
import re

import pytest
import torch

from ldae import draws, noise
from ldae.errors import InputError
from ldae.method import build
from ldae.objective import TARGETS
from ldae.tokenizers import TOKENIZERS

T = 1000
CLASSES = 5


def levels(row: int, t: int) -> tuple[float, float]:
    """Return gamma_t and sigma_t of a row (paper, sections 4.1 to 4.4)."""
    if row <= 4:  # DDPM: beta linear from 1e-4 to 0.02
        gamma2 = math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / (T - 1)) for s in range(t + 1))
        return math.sqrt(gamma2), math.sqrt(1 - gamma2)
    if row <= 9:
        gamma2 = 1 - (t + 1) / T
        return math.sqrt(gamma2), math.sqrt(1 - gamma2)
    if row <= 13:
        return 1.0, math.sqrt(2) * t / (T - 1)
    return 1.0, math.sqrt(1 / 3)


def draw(method, position, shape, stream=draws.NOISE):
    return draws.normal(method.seed, position[None], shape, stream)[0].double()


def clean_latents(row, method, x, patches, position):
    """Return z_0 (N, d) of one normalised image; rows 1 to 6 sample it from a posterior."""
    tokenizer, d = method.tokenizer, method.tokenizer.dim
    if row >= 8:
        axes, mean = tokenizer.basis[:d], tokenizer.patch_mean
        return torch.stack([tokenizer.scales * (axes @ (patch - mean)) for patch in patches])
    if row >= 6:
        weight, bias = tokenizer.encoder.weight, tokenizer.encoder.bias
        encoded = torch.stack([weight @ patch + bias for patch in patches])
        h, log_variance = encoded[:, :d], encoded[:, d:]
    else:
        map_ = tokenizer.network.encode(x[None]).latent_dist
        h, log_variance = (
            torch.stack([
                part[0, :, i : i + 2, j : j + 2].reshape(-1)
                for i in range(0, 8, 2) for j in range(0, 8, 2)
            ])
            for part in (map_.mean, map_.logvar)
        )  # fmt: skip
    if row <= 6:
        h = h + (log_variance / 2).exp() * draw(method, position, h.shape, draws.POSTERIOR)
    return (h - tokenizer.latent_mean) * tokenizer.scales


def reference_loss(row, method, images, positions, labels) -> float:
    """Compute the loss by loops over images, tokens and numbers."""
    tokenizer, p = method.tokenizer, method.tokenizer.patch_size
    d, full = tokenizer.dim, tokenizer.patch_dim
    steps = draws.timesteps(method.seed, positions, len(method.sigma))
    dropped = draws.dropped_labels(method.seed, positions, 0.1)
    total = 0.0
    for number, (image, t, position) in enumerate(zip(images, steps, positions)):
        gamma, sigma = levels(row, int(t))
        x = image.double() / 255 - tokenizer.pixel_mean[:, None, None]
        x = x / tokenizer.pixel_std[:, None, None]
        patches = torch.stack([
            x[:, i : i + p, j : j + p].reshape(-1)
            for i in range(0, 32, p) for j in range(0, 32, p)
        ])  # fmt: skip
        z_0 = clean_latents(row, method, x, patches, position)
        eps = draw(method, position, z_0.shape)
        z_t = gamma * z_0 + sigma * eps

        def image_of(z):
            axes, mean = tokenizer.basis[:d], tokenizer.patch_mean
            return torch.stack([axes.T @ (token / tokenizer.scales) + mean for token in z])

        seen = image_of(z_t) if row >= 11 else z_t
        label = torch.tensor([CLASSES if dropped[number] else int(labels[number])])
        output = method.denoiser(seen[None], t[None], label if row == 1 else None)[0]
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
                r = tokenizer.basis @ (patches[token] - output[token])
                weighted = sum((1.0 if i < d else 0.1) * r[i] ** 2 for i in range(full))
                error = 1 / (1 + sigma**2) * weighted / full
            total += float(error) / len(patches) / len(images)
    return total


@pytest.mark.parametrize("scale", ["raw", "global", "per-axis"])
@pytest.mark.parametrize("row", range(1, 15))
def test_the_loss_of_each_row_is_its_equation(row, scale, tiny, images, awake, fitted):
    method = build(tiny(row, tokenizer__scale=scale), num_classes=CLASSES).double()
    fitted(method.tokenizer)
    awake(method.denoiser)
    # Row 1 drops the label of position 21 and keeps the others.
    positions, labels = torch.tensor([21, 3, 2**33 + 1]), torch.tensor([4, 0, 2])
    assert draws.dropped_labels(0, positions, 0.1).tolist() == [True, False, False]
    with torch.no_grad():
        actual = method(images[:3], positions, labels).item()
        expected = reference_loss(row, method, images[:3], positions, labels)
    assert actual == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("row", ["dit", "patch_vae"])
def test_posterior_mean_encodes_the_mean(row, tiny, images, awake, fitted):
    drawn, mean = (build(tiny(row, tokenizer__posterior=how), 5) for how in ("sample", "mean"))
    for method in (drawn, mean):
        fitted(method.tokenizer)
    x, positions = drawn.tokenizer.normalize(images), torch.arange(8)
    assert torch.equal(mean.encode(x, positions), mean.tokenizer.encode(x))
    assert torch.equal(drawn.encode(x), mean.encode(x))  # without positions: evaluation
    assert not torch.equal(drawn.encode(x, positions), drawn.encode(x))


@pytest.mark.parametrize("row", ["vqvae", "vqgan", "dae"])
def test_rows_outside_the_trajectory_have_a_finite_loss(row, tiny, images, fitted):
    method = build(tiny(row))
    fitted(method.tokenizer)
    assert method(images, torch.arange(8)).isfinite()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", noise.SCHEDULES)
def test_every_schedule_works_with_every_target(schedule, target, tiny, images):
    """Or the target is undefined at a level, and the refusal names it."""
    try:
        method = build(tiny(noise__schedule=schedule, objective__target=target))
    except InputError as error:
        assert str(error).startswith(f"objective.target {target} is undefined at t = ")
        return
    method.tokenizer.fit([images])
    loss = method(images, torch.arange(8))
    assert loss.isfinite() and loss > 0


@pytest.mark.parametrize("network_input", ["latent", "image"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tokenizer_works_or_is_refused(name, target, network_input, tiny, images, fitted):
    changes = {
        "tokenizer__name": name,
        "objective__target": target,
        "objective__input": network_input,
    }
    try:
        method = build(tiny("l_dae", noise__schedule="ddpm", **changes))
    except InputError as error:
        assert re.match(rf"objective.* needs tokenizer.name .*, not {name}$", str(error))
        return
    fitted(method.tokenizer)
    assert method(images, torch.arange(8)).isfinite()
    for picture in method.denoise_images(images, torch.arange(8), 500):
        assert picture.shape == images.shape and picture.isfinite().all()


def test_the_seed_determines_the_weights(tiny):
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


def test_bf16_applies_only_to_the_network(tiny, images, awake):
    method = build(tiny(), bf16=True)
    method.tokenizer.fit([images])
    awake(method.denoiser)
    seen = []
    method.denoiser.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    z_t, t = torch.randn(8, 16, 6), torch.arange(8)
    with torch.no_grad():
        output = method.predict(z_t, t)
        assert torch.equal(seen[0], method.tokenizer.inverse(z_t))
        assert not torch.equal(output, method.denoiser(seen[0], t))


@pytest.mark.parametrize("row", [8, 9, 12, 13])
def test_a_perfect_network_denoises_perfectly(row, tiny, images, monkeypatch):
    """When the output is the row's target, the picture is the image, or its projection for targets
    in the latent space."""
    method = build(tiny(row)).double()
    method.tokenizer.fit([images])
    x = method.tokenizer.normalize(images)
    projected = method.tokenizer.decode(method.tokenizer.encode(x))
    positions = torch.arange(8)

    def perfect(z_t, t, labels=None):
        z_0 = method.tokenizer.encode(x)
        eps = draws.normal(method.seed, positions, z_0.shape[1:]).double()
        gamma, sigma = method.level(t)
        return method.objective.target(method.tokenizer, x, z_0, eps, gamma, sigma)

    monkeypatch.setattr(method, "predict", perfect)
    clean, _, denoised = method.denoise_images(images, positions, 500)
    target = x if row == 13 else projected
    expected = method.tokenizer.denormalize(target).clamp(0, 1)
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


def test_the_share_of_clean_images_has_no_noise(method, images):
    made = method(noise__clean_share=1.0, objective__input="latent")
    noised = made.add_noise(images, torch.arange(len(images)))
    assert torch.equal(noised.tokens, noised.z_0) and (noised.t == 0).all()


def test_a_schedule_of_one_level_has_no_lowest_one(tiny):
    with pytest.raises(InputError, match="^noise.clean_share must be 0: noise.schedule single has"):
        build(tiny("l_dae_single", noise__clean_share=0.5))
