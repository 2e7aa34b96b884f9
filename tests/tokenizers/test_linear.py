import math

import pytest
import torch

from ldae import tokenizers
from ldae.errors import InputError
from ldae.patches import patchify
from ldae.tokenizers import PatchAE, PatchPCA, PatchVAE
from ldae.tokenizers.losses import LossWeights, TokenizerLoss


def make_tokenizer(kind, images, scale="per-axis", dim=6):
    torch.manual_seed(0)
    tokenizer = kind(32, 8, 3, dim, scale).double()
    tokenizer.fit_pixels([images])
    return tokenizer


@pytest.mark.parametrize("kind", [PatchAE, PatchVAE])
def test_project_and_inverse_are_affine_and_equal_encode_and_decode(kind, images):
    tokenizer = make_tokenizer(kind, images)
    tokenizer.fit_latents([images])
    patches = patchify(tokenizer.normalize(images), 8)
    z = tokenizer.project(patches)
    torch.testing.assert_close(tokenizer.encode(tokenizer.normalize(images)), z)
    torch.testing.assert_close(
        patchify(tokenizer.decode(z), 8), tokenizer.inverse(z), rtol=0, atol=1e-12
    )
    a, b = torch.randn(2, 5, 192, dtype=torch.double)
    c, d = torch.randn(2, 5, 6, dtype=torch.double)
    for affine, (one, other) in ((tokenizer.project, (a, b)), (tokenizer.inverse, (c, d))):
        middle = 0.3 * affine(one) + 0.7 * affine(other)
        torch.testing.assert_close(affine(0.3 * one + 0.7 * other), middle)


def test_encode_with_eps_is_mean_plus_std_eps_in_the_networks_units(images):
    tokenizer = make_tokenizer(PatchVAE, images)
    tokenizer.fit_latents([images])
    x = tokenizer.normalize(images)
    eps = torch.randn(8, 16, 6, dtype=torch.double)
    weight, bias = tokenizer.encoder.weight, tokenizer.encoder.bias
    for image in (0, 5):
        for token, patch in enumerate(patchify(x, 8)[image]):
            for axis in range(6):
                mean = weight[axis] @ patch + bias[axis]
                std = math.exp(0.5 * float((weight[6 + axis] @ patch + bias[6 + axis]).detach()))
                h = mean + std * eps[image, token, axis]
                z = (h - tokenizer.latent_mean[axis]) * tokenizer.scales[axis]
                actual = tokenizer.encode(x, eps)[image, token, axis]
                assert actual.item() == pytest.approx(z.item(), rel=1e-9)


def test_log_variance_is_clamped(images):
    tokenizer = make_tokenizer(PatchVAE, images)
    with torch.no_grad():
        tokenizer.encoder.bias[6:9], tokenizer.encoder.bias[9:] = 1e4, -1e4
    log_variance = tokenizer.posterior(tokenizer.normalize(images)).log_variance
    assert log_variance[..., :3].unique().tolist() == [20] and log_variance[
        ..., 3:
    ].unique().tolist() == [-30]


@pytest.mark.parametrize("kind", [PatchAE, PatchVAE])
@pytest.mark.parametrize("scale", ["raw", "global", "per-axis"])
def test_latents_have_the_variance_of_their_scale(kind, scale, images):
    """Samples have mean 0 and the variance of their scale; raw latents are unchanged."""
    tokenizer = make_tokenizer(kind, images, scale)
    tokenizer.fit_latents(images.split([3, 1, 4]))
    posterior = tokenizer.posterior(tokenizer.normalize(images))
    h = posterior.mean.flatten(0, 1)
    variance = h.var(0, unbiased=False)
    if kind is PatchVAE:
        variance = variance + posterior.log_variance.exp().flatten(0, 1).mean(0)
    z = tokenizer.encode(tokenizer.normalize(images)).flatten(0, 1)
    spread = variance * tokenizer.scales**2
    if scale == "raw":
        assert torch.equal(z, h)
        return
    assert z.mean(0).abs().max() < 1e-6
    expected = torch.ones(6).double()
    if scale == "global":
        spread, expected = spread.mean(), expected[0]
    torch.testing.assert_close(spread, expected, rtol=1e-6, atol=0)


def test_linear_autoencoder_reaches_the_error_of_pca(images):
    """Its optimum spans the principal axes (Baldi and Hornik 1989)."""
    pca = PatchPCA(32, 8, 3, 6, "raw").double()
    pca.fit([images])
    tokenizer = make_tokenizer(PatchAE, images)
    loss = TokenizerLoss(tokenizer, LossWeights())
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=400, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        value, _ = loss(images, torch.arange(8))
        value.backward()
        return value

    optimizer.step(step)
    expected = 16 * pca.variances[6:].sum().item()  # an image has 16 patches
    assert expected < step().item() < 1.02 * expected


def test_large_kl_weight_pulls_the_posterior_to_the_prior(images):
    """The posterior becomes N(0, I), and the scales do not amplify its empty axes."""
    tokenizer = make_tokenizer(PatchVAE, images)
    loss = TokenizerLoss(tokenizer, LossWeights(kl=1e6))
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        value, _ = loss(images, torch.arange(8))
        value.backward()
        return value

    optimizer.step(step)
    posterior = tokenizer.posterior(tokenizer.normalize(images))
    assert posterior.mean.abs().max() < 0.05 and posterior.log_variance.abs().max() < 0.05
    tokenizer.fit_latents([images])
    assert (tokenizer.scales - 1).abs().max() < 0.05


@pytest.mark.parametrize("kind", [PatchAE, PatchVAE])
def test_saved_tokenizer_loads_unchanged(kind, images, tmp_path):
    saved = make_tokenizer(kind, images)
    saved.fit_latents([images])
    tokenizers.save(saved, tmp_path / "tokenizer.safetensors")
    loaded = kind(32, 8, 3, 6, "per-axis").double()
    tokenizers.load(loaded, tmp_path / "tokenizer.safetensors")
    x = saved.normalize(images)
    assert torch.equal(loaded.encode(x), saved.encode(x))
    other = PatchAE if kind is PatchVAE else PatchVAE
    with pytest.raises(InputError, match="tokenizer.safetensors has name patch_.*ae, this run"):
        tokenizers.load(other(32, 8, 3, 6, "per-axis"), tmp_path / "tokenizer.safetensors")
    with pytest.raises(InputError, match="has img_size 32, this run 64"):
        tokenizers.load(kind(64, 8, 3, 6, "per-axis"), tmp_path / "tokenizer.safetensors")


def test_fitting_on_no_images_is_refused():
    with pytest.raises(InputError, match="no image"):
        PatchAE(32, 8, 3, 6, "raw").fit_latents([])
