import math

import pytest
import torch

from ldae.patches import patchify
from ldae.tokenizers import PatchAE, PatchPCA, PatchVAE
from ldae.tokenizers.losses import TokenizerLoss


def make_tokenizer(kind, images, scale="per-axis", dim=6):
    torch.manual_seed(0)
    tokenizer = kind(32, 8, 3, dim, scale).double()
    tokenizer.fit_pixels([images])
    return tokenizer


def minimise(loss, images, steps):
    """Minimise a loss in steps of L-BFGS, and return its value at the end."""
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        value, _ = loss(images, torch.arange(8))
        value.backward()
        return value

    optimizer.step(step)
    return step().item()


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
    assert log_variance[..., :3].unique().tolist() == [20]
    assert log_variance[..., 3:].unique().tolist() == [-30]


def test_linear_autoencoder_reaches_the_error_of_pca(images):
    """Its optimum spans the principal axes (Baldi and Hornik 1989)."""
    pca = PatchPCA(32, 8, 3, 6, "raw").double()
    pca.fit([images])
    tokenizer = make_tokenizer(PatchAE, images)
    loss = TokenizerLoss(tokenizer)
    reached = minimise(loss, images, 400)
    expected = 16 * pca.variances[6:].sum().item()  # an image has 16 patches
    assert expected < reached < 1.02 * expected


def test_large_kl_weight_pulls_the_posterior_to_the_prior(images):
    """The posterior becomes N(0, I), and the scales do not amplify its empty axes."""
    tokenizer = make_tokenizer(PatchVAE, images)
    loss = TokenizerLoss(tokenizer, kl_weight=1e6)
    minimise(loss, images, 100)
    posterior = tokenizer.posterior(tokenizer.normalize(images))
    assert posterior.mean.abs().max() < 0.05 and posterior.log_variance.abs().max() < 0.05
    tokenizer.fit_latents([images])
    assert (tokenizer.scales - 1).abs().max() < 0.05
