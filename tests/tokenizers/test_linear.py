import math

import pytest
import torch

from ldae import tokenizers
from ldae.errors import InputError
from ldae.patches import patchify
from ldae.tokenizers import PatchAE, PatchPCA, PatchVAE
from ldae.tokenizers.losses import TokenizerLoss, Weights


def made(kind, images, scale="per-axis", dim=6):
    torch.manual_seed(0)
    tokenizer = kind(32, 8, 3, dim, scale).double()
    tokenizer.fit_pixels([images])
    return tokenizer


@pytest.mark.parametrize("kind", [PatchAE, PatchVAE])
def test_project_and_inverse_are_affine_and_make_encode_and_decode(kind, images):
    tokenizer = made(kind, images)
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


def test_a_draw_is_the_mean_plus_std_eps_in_the_networks_units(images):
    tokenizer = made(PatchVAE, images)
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
                found = tokenizer.encode(x, eps)[image, token, axis]
                assert found.item() == pytest.approx(z.item(), rel=1e-9)


def test_the_log_variance_is_clamped(images):
    tokenizer = made(PatchVAE, images)
    with torch.no_grad():
        tokenizer.encoder.bias[6:9], tokenizer.encoder.bias[9:] = 1e4, -1e4
    found = tokenizer.posterior(tokenizer.normalize(images)).log_variance
    assert found[..., :3].unique().tolist() == [20] and found[..., 3:].unique().tolist() == [-30]


@pytest.mark.parametrize("kind", [PatchAE, PatchVAE])
@pytest.mark.parametrize("scale", ["raw", "global", "per-axis"])
def test_scales(kind, scale, images):
    """Draws have the variance that the scale says, and no mean; raw ones are as they come."""
    tokenizer = made(kind, images, scale)
    tokenizer.fit_latents(images.split([3, 1, 4]))
    found = tokenizer.posterior(tokenizer.normalize(images))
    h = found.mean.flatten(0, 1)
    variance = h.var(0, unbiased=False)
    if kind is PatchVAE:
        variance = variance + found.log_variance.exp().flatten(0, 1).mean(0)
    z = tokenizer.encode(tokenizer.normalize(images)).flatten(0, 1)
    spread = variance * tokenizer.scales**2
    if scale == "raw":
        assert torch.equal(z, h)
        return
    assert z.mean(0).abs().max() < 1e-6
    wanted = torch.ones(6).double()
    if scale == "global":
        spread, wanted = spread.mean(), wanted[0]
    torch.testing.assert_close(spread, wanted, rtol=1e-6, atol=0)


def test_the_linear_autoencoder_reaches_the_error_of_principal_axes(images):
    """Its optimum is their span (Baldi and Hornik 1989)."""
    pca = PatchPCA(32, 8, 3, 6, "raw").double()
    pca.fit([images])
    tokenizer = made(PatchAE, images)
    loss = TokenizerLoss(tokenizer, Weights())
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=400, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        found, _ = loss(images, torch.arange(8))
        found.backward()
        return found

    optimizer.step(step)
    wanted = 16 * pca.variances[6:].sum().item()  # an image has 16 patches
    assert wanted < step().item() < 1.02 * wanted


def test_the_kl_draws_axes_that_carry_little_to_the_prior(images):
    """With an overwhelming KL the posterior becomes N(0, I), and scales do not blow up its axes."""
    tokenizer = made(PatchVAE, images)
    loss = TokenizerLoss(tokenizer, Weights(kl=1e6))
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        found, _ = loss(images, torch.arange(8))
        found.backward()
        return found

    optimizer.step(step)
    found = tokenizer.posterior(tokenizer.normalize(images))
    assert found.mean.abs().max() < 0.05 and found.log_variance.abs().max() < 0.05
    tokenizer.fit_latents([images])
    assert (tokenizer.scales - 1).abs().max() < 0.05


@pytest.mark.parametrize("kind", [PatchAE, PatchVAE])
def test_a_saved_tokenizer_loads_as_it_was(kind, images, tmp_path):
    saved = made(kind, images)
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


def test_no_images_are_told():
    with pytest.raises(InputError, match="no image"):
        PatchAE(32, 8, 3, 6, "raw").fit_latents([])
