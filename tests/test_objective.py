"""Targets and weights against numbers computed by hand."""

import pytest
import torch

from ldae import draws, noise
from ldae.errors import InputError
from ldae.method import build
from ldae.objective import TARGETS, WEIGHTS, Objective
from ldae.patches import patchify

GAMMA = torch.tensor([1.0, 0.8, 0.3])
SIGMA = torch.tensor([0.1, 0.6, 0.9])


def objective(tiny, target: str, weight: str = "uniform", sigma: torch.Tensor = SIGMA) -> Objective:
    return Objective(target, weight, 0.1, 1.0, GAMMA, sigma, build(tiny()).tokenizer)


@pytest.mark.parametrize(
    "weight, expected",
    [
        ("uniform", [1.0, 1.0, 1.0]),
        ("gamma2", [1.0, 0.64, 0.09]),
        ("sigma2", [0.01, 0.36, 0.81]),
        ("inverse", [1 / 1.01, 1 / 1.36, 1 / 1.81]),
    ],
)
def test_the_weight_of_the_level_scales_the_loss(tiny, weight, expected):
    of_eps = objective(tiny, "eps", weight)
    for t, value in enumerate(expected):
        error = torch.full((1, 16, 6), 2.0)
        loss = of_eps.loss(None, error, torch.tensor([t]))
        assert loss.item() == pytest.approx(4 * value)


@pytest.mark.parametrize("schedule", noise.SCHEDULES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_level_has_a_weight(tiny, weight, schedule):
    weights = build(tiny(noise__schedule=schedule, objective__weight=weight)).objective.weights
    assert weights.isfinite().all() and (weights >= 0).all() and weights.any()


def test_a_score_weighted_by_sigma2_has_the_loss_of_eps(tiny):
    eps, guess = torch.randn(2, 3, 16, 6)
    t = torch.arange(3)
    sigma = SIGMA[:, None, None]
    as_eps = objective(tiny, "eps").loss(None, eps - guess, t)
    as_score = objective(tiny, "score", "sigma2").loss(None, (guess - eps) / sigma, t)
    torch.testing.assert_close(as_score, as_eps)


@pytest.mark.parametrize("target", ["image", "whitened"])
def test_the_residual_outside_the_kept_axes_has_its_weight(tiny, images, target):
    method = build(tiny("l_dae", objective__target=target))
    method.tokenizer.fit([images])
    basis, d = method.tokenizer.basis, method.tokenizer.dim
    axes = basis if target == "image" else torch.eye(192)
    for axis, weight in ((0, 1.0), (d - 1, 1.0), (d, 0.1), (191, 0.1)):
        error = axes[axis].expand(1, 16, -1)
        loss = method.objective.loss(method.tokenizer, error, torch.tensor([0]))
        assert loss.item() == pytest.approx(weight / 192, rel=1e-4)


@pytest.mark.parametrize("target", [name for name in TARGETS if TARGETS[name].clean])
def test_clean_recovers_z_0_from_the_target(tiny, images, target):
    """For an image, z_0 is its projection."""
    changes = {"noise__schedule": "cosine", "objective__target": target}
    method = build(tiny("l_dae", **changes)).double()
    method.tokenizer.fit([images])
    x = method.tokenizer.normalize(images)
    z_0, t = method.encode(x), torch.tensor([0, 10, 200, 500, 700, 900, 950, 990])
    eps = draws.normal(0, torch.arange(8), z_0.shape[1:]).double()
    gamma, sigma = method.level(t)
    output = method.objective.target(method.tokenizer, x, z_0, eps, gamma, sigma)
    z_t = gamma * z_0 + sigma * eps
    actual = method.objective.clean(method.tokenizer, output, z_t, gamma, sigma)
    torch.testing.assert_close(actual, z_0, atol=1e-6, rtol=1e-6)
    if target == "image":
        assert torch.equal(output, patchify(x, method.tokenizer.patch_size))


@pytest.mark.parametrize("target", [name for name in TARGETS if TARGETS[name].patches])
def test_the_target_shows_the_image_that_it_is(tiny, images, target):
    """Or its projection. Normalised patches take mean and variance from the image."""
    method = build(tiny("l_dae", objective__target=target)).double()
    method.tokenizer.fit([images])
    x = method.tokenizer.normalize(images)
    output = method.objective.target(method.tokenizer, x, method.encode(x), *3 * [None])
    patches = method.objective.patches(method.tokenizer, output, x)
    expected = method.decode(method.encode(x)) if target == "projected" else x
    torch.testing.assert_close(patches, patchify(expected, method.tokenizer.patch_size))


def test_normalized_patches_have_zero_mean_and_unit_variance(tiny, images):
    """A patch of one colour has MAE's 1e-6 instead of its variance."""
    method = build(tiny("l_dae", objective__target="normalized")).double()
    method.tokenizer.fit([images])
    images[0, :, :8, :8] = 77
    x = method.tokenizer.normalize(images)
    output = method.objective.target(method.tokenizer, x, *4 * [None])
    assert output.mean(-1).abs().max() < 1e-9
    assert (output.var(-1) - 1).abs().flatten()[1:].max() < 1e-2 and output.isfinite().all()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"tokenizer__name": "pixel", "tokenizer__dim": 12, "objective__target": "whitened"},
            "objective.target whitened needs tokenizer.name patch_pca, not pixel",
        ),
        ({"objective__target": "score"}, "score is undefined at t = 0 .*sigma 0"),
        (
            {"tokenizer__name": "patch_ae"},
            "objective.target image needs tokenizer.name patch_pca or pixel, not patch_ae",
        ),
        (
            {"tokenizer__name": "conv_vae", "tokenizer__dim": 8, "objective__input": "latent"},
            "objective.target image needs tokenizer.name patch_pca or pixel, not conv_vae",
        ),
        (
            {"tokenizer__name": "conv_vae", "tokenizer__dim": 8, "objective__target": "projected"},
            "needs tokenizer.name patch_pca or pixel or patch_ae or patch_vae, not conv_vae",
        ),
    ],
)
def test_unsuitable_targets_are_refused(tiny, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        build(tiny("l_dae", **changes))
