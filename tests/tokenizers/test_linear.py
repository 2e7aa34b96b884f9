import math

import pytest
import torch

from ldae.patches import patchify
from ldae.tokenizers import PatchAE, PatchPCA, PatchVAE
from ldae.tokenizers.losses import TokenizerLoss, Weights


def made(kind, images, scale="per-axis", dim=6):
    torch.manual_seed(0)
    tokenizer = kind(32, 8, 3, dim, scale).double()
    tokenizer.fit_pixels([images])
    return tokenizer


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
