"""The loss against slow references of its equation, and the gradients of each term."""

import math

import pytest
import torch

from ldae import draws
from ldae.tokenizers.conv import ConvTokenizer
from ldae.tokenizers.losses import TokenizerLoss
from ldae.tokenizers.patch_autoencoder import PatchAE, PatchVAE

POSITIONS = torch.tensor([7, 2, 2**33 + 5])


def conv(images, codes=0):
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(32, 8, 3, 8, "raw", 8, codes)
    tokenizer.fit_pixels([images])
    return tokenizer


def normalised(tokenizer, image):
    mean, std = tokenizer.pixel_mean[:, None, None], tokenizer.pixel_std[:, None, None]
    return (image.double() / 255 - mean) / std


@pytest.mark.parametrize("kind, kl", [(PatchAE, 0.0), (PatchVAE, 0.7)])
def test_loss_of_patch_rows_matches_its_equation(kind, kl, images):
    """|x - U^T V x|^2 + KL[V x | N(0, 1)], one patch and one number at a time."""
    torch.manual_seed(0)
    tokenizer = kind(32, 8, 3, 6, "raw").double()
    tokenizer.fit_pixels([images])
    loss = TokenizerLoss(tokenizer, kl_weight=kl, seed=4)
    actual, parts = loss(images[:3], POSITIONS)
    error = divergence = 0.0
    for image, position in zip(images[:3], POSITIONS):
        x = normalised(tokenizer, image)
        eps = draws.normal(4, position[None], (16, 6), draws.POSTERIOR)[0].double()
        for token in range(16):
            i, j = 8 * (token // 4), 8 * (token % 4)
            patch = x[:, i : i + 8, j : j + 8].reshape(-1)
            code = tokenizer.encoder.weight @ patch + tokenizer.encoder.bias
            if kind is PatchVAE:
                for axis in range(6):
                    mean, log_variance = float(code[axis].detach()), float(code[6 + axis].detach())
                    divergence += 0.5 * (mean**2 + math.exp(log_variance) - 1 - log_variance)
                code = code[:6] + (0.5 * code[6:]).exp() * eps[token]
            decoded = tokenizer.decoder.weight @ code + tokenizer.decoder.bias
            error += float((patch - decoded).detach().square().sum())
    assert actual.item() == pytest.approx((error + kl * divergence) / 3, rel=1e-9)
    assert parts["reconstruction"].item() == pytest.approx(error / 3, rel=1e-9)
    assert parts.get("kl", torch.zeros(())).item() == pytest.approx(divergence / 3, rel=1e-9)


def distance(one, other):
    """A stand-in for a perceptual network."""
    return (one.mean((2, 3)) - other.mean((2, 3))).square().sum(1)


@pytest.mark.parametrize("codes", [0, 16])
def test_loss_of_conv_rows_matches_its_equation(codes, images):
    tokenizer = conv(images, codes).double()
    weights = {"kl_weight": 0.01, "perceptual_weight": 0.5, "adversarial_weight": 0.3}
    loss = TokenizerLoss(tokenizer, distance, **weights, seed=4).double()
    actual, parts = loss(images[:3], POSITIONS)
    network, numel = tokenizer.network, 3 * 32 * 32
    error = divergence = perceptual = 0.0
    x_hat, x_all, quantisation = [], [], []
    for image, position in zip(images[:3], POSITIONS):
        x = normalised(tokenizer, image)[None]
        if codes:
            decoded = network.decode(network.encode(x).latents)
            quantisation.append(decoded.commit_loss)
        else:
            posterior = network.encode(x).latent_dist
            eps = draws.normal(4, position[None], (16, 8), draws.POSTERIOR).double()
            eps = eps.reshape(4, 4, 2, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, 2, 8, 8)
            decoded = network.decode(posterior.mean + posterior.std * eps)
            divergence += posterior.kl().sum().item()
        x_hat.append(decoded.sample)
        x_all.append(x)
        std, mean = (part[:, None, None] for part in (tokenizer.pixel_std, tokenizer.pixel_mean))
        pixels = decoded.sample * std + mean, image.double()[None] / 255
        inputs, outputs = (2 * part - 1 for part in pixels)  # LDM's pixels, in [-1, 1]
        error += (inputs - outputs).abs().sum() / 3
        perceptual += distance(*pixels).sum() / 3
    x_hat, x_all = torch.cat(x_hat), torch.cat(x_all)
    reconstruction = error + 0.5 * numel * perceptual
    generator = -loss.discriminator(x_hat).mean()
    last = network.decoder.conv_out.weight
    norms = [
        torch.autograd.grad(part, last, retain_graph=True)[0].norm()
        for part in (reconstruction, generator)
    ]
    weight = min(float(norms[0] / (norms[1] + 1e-4)), 1e4)
    real, fake = loss.discriminator(x_all), loss.discriminator(x_hat)
    hinge = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    expected = reconstruction + 0.3 * weight * generator + hinge
    if codes:
        expected = expected + numel * sum(quantisation) / 3
        assert parts["codebook"].item() == pytest.approx(float(sum(quantisation).detach()) / 3)
        assert "kl" not in parts
    else:
        expected = expected + 0.01 * divergence / 3
        assert parts["kl"].item() == pytest.approx(divergence / 3)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, value in (
        ("reconstruction", error), ("perceptual", perceptual), ("adversarial", generator),
        ("discriminator", hinge),
    ):  # fmt: skip
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-6), name
    assert parts["adaptive_weight"].item() == pytest.approx(weight, rel=1e-4)


def gradients(loss, images, adversarial_weight=0.0):
    loss.zero_grad()
    loss.adversarial_weight = adversarial_weight
    loss(images, torch.arange(8))[0].backward()
    return {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}


def test_each_network_learns_only_from_its_own_term(images):
    """The tokenizer gets no gradient of the hinge loss; the discriminator gets only that gradient.

    The discriminator's gradients do not depend on the weight of the adversarial term.
    """
    loss = TokenizerLoss(conv(images).double(), adversarial_weight=0.3).double()
    weak = gradients(loss, images, 0.3)
    strong = gradients(loss, images, 0.9)
    negligible = gradients(loss, images, 1e-12)
    x = loss.tokenizer.normalize(images)
    x_hat = loss.tokenizer.reconstruct(x, draws.normal(0, torch.arange(8), (16, 8), 3).to(x)).images
    real, fake = loss.discriminator(x), loss.discriminator(x_hat.detach())
    hinge = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    names, parameters = zip(*loss.discriminator.named_parameters())
    for name, expected in zip(names, torch.autograd.grad(hinge, parameters), strict=True):
        torch.testing.assert_close(weak[f"discriminator.{name}"], expected)
        assert torch.equal(strong[f"discriminator.{name}"], weak[f"discriminator.{name}"])
    loss_without = TokenizerLoss(loss.tokenizer)
    without = gradients(loss_without, images)
    for name, expected in without.items():
        torch.testing.assert_close(negligible[name], expected, rtol=1e-6, atol=1e-8)
        # adversarial * weight * gradient of -D: three times the weight gives three times the term
        weak_term, strong_term = weak[name] - expected, strong[name] - expected
        torch.testing.assert_close(strong_term, 3 * weak_term, rtol=1e-4, atol=1e-6)
    last = "tokenizer.network.decoder.conv_out.weight"
    ratio = (weak[last] - without[last]).norm() / without[last].norm()
    assert ratio.item() == pytest.approx(0.3, rel=1e-2)  # the purpose of the adaptive weight


def test_discriminator_does_not_change_before_its_start(images):
    loss = TokenizerLoss(conv(images), adversarial_weight=0.5, adversarial_start=3, batch_size=8)
    before = [p.clone() for p in loss.discriminator.parameters()]
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-2, weight_decay=0.0)
    names, moved = [], []
    for step in range(5):
        optimizer.zero_grad()
        value, parts = loss(images, torch.arange(8) + 8 * step)
        value.backward()
        assert all(p.grad is not None for p in loss.parameters())
        optimizer.step()
        names.append(sorted(parts))
        now = list(loss.discriminator.parameters())
        moved.append(not all(torch.equal(a, b) for a, b in zip(now, before)))
        if not moved[-1]:
            assert value.item() == parts["reconstruction"].item()
    assert moved == [False] * 3 + [True] * 2
    assert names == names[:1] * 5


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("first", [0, 20, 60])
def test_adversarial_start_is_detected_with_few_reads_of_positions(first, micro_batches, images):
    """It is detected wherever a run resumes, without waiting for the device in every step."""
    loss = TokenizerLoss(conv(images), adversarial_weight=0.5, adversarial_start=50, batch_size=30)
    reads = []

    class Counted:
        def __init__(self, value):
            self.value = value

        def __getitem__(self, index):
            reads.append(self.value)
            return self.value

    for step in range(first, 70):
        for micro in range(micro_batches):
            position = 30 * step + micro * 30 // micro_batches
            assert loss._has_started(Counted(position)) == (step >= 50)
    assert len(reads) <= (2 if micro_batches == 1 else 16)  # of up to 210 calls


def test_terms_of_weight_zero_are_not_built(images):
    loss = TokenizerLoss(conv(images), perceptual=distance)
    assert loss.discriminator is None and loss.perceptual is None
    _, parts = loss(images, torch.arange(8))
    assert set(parts) == {"reconstruction", "kl"}


def test_posterior_samples_depend_only_on_the_position(images):
    loss = TokenizerLoss(conv(images).double(), seed=4)
    together = loss(images, torch.arange(8))[0]
    one_by_one = [loss(images[i : i + 1], torch.tensor([i]))[0] for i in range(8)]
    torch.testing.assert_close(torch.stack(one_by_one).mean(), together)
    assert loss(images, torch.arange(8) + 1)[0] != together


@pytest.mark.parametrize("codes", [0, 16])
def test_tiny_autoencoder_learns_one_batch(codes, images):
    loss = TokenizerLoss(conv(images, codes), kl_weight=0.0 if codes else 1e-6)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=3e-3, betas=(0.5, 0.9), weight_decay=0.0)
    errors = []
    for step in range(35):
        optimizer.zero_grad()
        value, parts = loss(images, torch.arange(8) + 8 * step)
        value.backward()
        optimizer.step()
        errors.append(parts["reconstruction"].item())
    assert errors[-1] < 0.85 * errors[0]


def test_bf16_changes_the_loss_little(images):
    full, half = (
        TokenizerLoss(conv(images, codes=16), bf16=bf16)(images, torch.arange(8))
        for bf16 in (False, True)
    )
    assert half[0].dtype == torch.float32
    assert half[0].item() == pytest.approx(full[0].item(), rel=0.02)
