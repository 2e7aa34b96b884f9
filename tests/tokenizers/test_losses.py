"""The loss against slow references from its equation in float64, and who learns from which term."""

import math

import pytest
import torch

from ldae import noise
from ldae.tokenizers.conv import ConvTokenizer
from ldae.tokenizers.linear import PatchAE, PatchVAE
from ldae.tokenizers.losses import TokenizerLoss, Weights

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
def test_patch_rows_are_their_equation(kind, kl, images):
    """|x - U^T V x|^2 + KL[V x | N(0, 1)], one patch and one number at a time."""
    torch.manual_seed(0)
    tokenizer = kind(32, 8, 3, 6, "raw").double()
    tokenizer.fit_pixels([images])
    loss = TokenizerLoss(tokenizer, Weights(kl=kl), seed=4)
    found, parts = loss(images[:3], POSITIONS)
    error = divergence = 0.0
    for image, position in zip(images[:3], POSITIONS):
        x = normalised(tokenizer, image)
        eps = noise.normal(4, position[None], (16, 6), noise.POSTERIOR)[0].double()
        for token in range(16):
            i, j = 8 * (token // 4), 8 * (token % 4)
            patch = x[:, i : i + 8, j : j + 8].reshape(-1)
            code = tokenizer.encoder.weight @ patch + tokenizer.encoder.bias
            if kind is PatchVAE:
                for axis in range(6):
                    mean, log_variance = float(code[axis].detach()), float(code[6 + axis].detach())
                    divergence += 0.5 * (mean**2 + math.exp(log_variance) - 1 - log_variance)
                code = code[:6] + (0.5 * code[6:]).exp() * eps[token]
            made = tokenizer.decoder.weight @ code + tokenizer.decoder.bias
            error += float((patch - made).detach().square().sum())
    assert found.item() == pytest.approx((error + kl * divergence) / 3, rel=1e-9)
    assert parts["reconstruction"].item() == pytest.approx(error / 3, rel=1e-9)
    assert parts.get("kl", torch.zeros(())).item() == pytest.approx(divergence / 3, rel=1e-9)


def distance(one, other):
    """A stand-in for a perceptual network."""
    return (one.mean((2, 3)) - other.mean((2, 3))).square().sum(1)


@pytest.mark.parametrize("codes", [0, 16])
def test_conv_rows_are_their_equation(codes, images):
    tokenizer = conv(images, codes).double()
    weights = Weights(kl=0.01, perceptual=0.5, adversarial=0.3)
    loss = TokenizerLoss(tokenizer, weights, distance, seed=4).double()
    found, parts = loss(images[:3], POSITIONS)
    network, numbers = tokenizer.network, 3 * 32 * 32
    error = divergence = apart = 0.0
    made, clean, quantisation = [], [], []
    for image, position in zip(images[:3], POSITIONS):
        x = normalised(tokenizer, image)[None]
        if codes:
            decoded = network.decode(network.encode(x).latents)
            quantisation.append(decoded.commit_loss)
        else:
            posterior = network.encode(x).latent_dist
            eps = noise.normal(4, position[None], (16, 8), noise.POSTERIOR).double()
            eps = eps.reshape(4, 4, 2, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, 2, 8, 8)
            decoded = network.decode(posterior.mean + posterior.std * eps)
            divergence += posterior.kl().sum().item()
        made.append(decoded.sample)
        clean.append(x)
        error += (decoded.sample - x).abs().sum() / 3
        pixels = [part * tokenizer.pixel_std[:, None, None] for part in (decoded.sample, x)]
        apart += distance(*pixels).sum() / 3
    made, clean = torch.cat(made), torch.cat(clean)
    likeness = error + 0.5 * numbers * apart
    generator = -loss.discriminator(made).mean()
    last = network.decoder.conv_out.weight
    norms = [
        torch.autograd.grad(part, last, retain_graph=True)[0].norm()
        for part in (likeness, generator)
    ]
    weight = min(float(norms[0] / (norms[1] + 1e-4)), 1e4)
    real, fake = loss.discriminator(clean), loss.discriminator(made)
    own = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    wanted = likeness + 0.3 * weight * generator + own
    if codes:
        wanted = wanted + numbers * sum(quantisation) / 3
        assert parts["codebook"].item() == pytest.approx(float(sum(quantisation).detach()) / 3)
        assert "kl" not in parts
    else:
        wanted = wanted + 0.01 * divergence / 3
        assert parts["kl"].item() == pytest.approx(divergence / 3)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, value in (
        ("reconstruction", error), ("perceptual", apart), ("adversarial", generator),
        ("discriminator", own),
    ):  # fmt: skip
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-6), name
    assert parts["adaptive_weight"].item() == pytest.approx(weight, rel=1e-4)


def gradients(loss, images, weights):
    loss.zero_grad()
    loss.weights = weights
    loss(images, torch.arange(8))[0].backward()
    return {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}


def test_each_player_learns_from_its_own_term_alone(images):
    """The tokenizer's gradients are those of a loss without the discriminator's term; the
    discriminator's are those of its hinge loss, whatever weight the generator's term has."""
    loss = TokenizerLoss(conv(images).double(), Weights(adversarial=0.3)).double()
    found = gradients(loss, images, Weights(adversarial=0.3))
    stronger = gradients(loss, images, Weights(adversarial=0.9))
    alone = gradients(loss, images, Weights(adversarial=1e-12))
    x = loss.tokenizer.normalize(images)
    made = loss.tokenizer.reconstruct(x, noise.normal(0, torch.arange(8), (16, 8), 3).to(x)).images
    real, fake = loss.discriminator(x), loss.discriminator(made.detach())
    own = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    names, parameters = zip(*loss.discriminator.named_parameters())
    for name, wanted in zip(names, torch.autograd.grad(own, parameters), strict=True):
        torch.testing.assert_close(found[f"discriminator.{name}"], wanted)
        assert torch.equal(stronger[f"discriminator.{name}"], found[f"discriminator.{name}"])
    plain = TokenizerLoss(loss.tokenizer, Weights())
    bare = gradients(plain, images, Weights())
    for name, wanted in bare.items():
        torch.testing.assert_close(alone[name], wanted, rtol=1e-6, atol=1e-8)
        # adversarial * weight * gradient of -D: thrice the weight is thrice the difference
        pulled, thrice = found[name] - wanted, stronger[name] - wanted
        torch.testing.assert_close(thrice, 3 * pulled, rtol=1e-4, atol=1e-6)
    last = "tokenizer.network.decoder.conv_out.weight"
    ratio = (found[last] - bare[last]).norm() / bare[last].norm()
    assert ratio.item() == pytest.approx(0.3, rel=1e-2)  # what the adaptive weight is for


def test_before_the_start_the_discriminator_is_there_and_does_not_move(images):
    loss = TokenizerLoss(conv(images), Weights(adversarial=0.5), adversarial_start=3, batch_size=8)
    before = [p.clone() for p in loss.discriminator.parameters()]
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-2, weight_decay=0.0)
    names, moved = [], []
    for step in range(5):
        optimizer.zero_grad()
        found, parts = loss(images, torch.arange(8) + 8 * step)
        found.backward()
        assert all(p.grad is not None for p in loss.parameters())
        optimizer.step()
        names.append(sorted(parts))
        now = list(loss.discriminator.parameters())
        moved.append(not all(torch.equal(a, b) for a, b in zip(now, before)))
        if not moved[-1]:
            assert found.item() == parts["reconstruction"].item()
    assert moved == [False] * 3 + [True] * 2
    assert names == names[:1] * 5


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("first", [0, 20, 60])
def test_the_start_is_found_by_reading_few_positions(first, micro_batches, images):
    """From wherever a run resumes, and without waiting for the device in every step."""
    loss = TokenizerLoss(
        conv(images), Weights(adversarial=0.5), adversarial_start=50, batch_size=30
    )
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


def test_a_weight_of_zero_builds_nothing(images):
    loss = TokenizerLoss(conv(images), Weights(), perceptual=distance)
    assert loss.discriminator is None and loss.perceptual is None
    _, parts = loss(images, torch.arange(8))
    assert set(parts) == {"reconstruction", "kl"}


def test_draws_are_functions_of_the_position(images):
    loss = TokenizerLoss(conv(images).double(), Weights(), seed=4)
    together = loss(images, torch.arange(8))[0]
    alone = [loss(images[i : i + 1], torch.tensor([i]))[0] for i in range(8)]
    torch.testing.assert_close(torch.stack(alone).mean(), together)
    assert loss(images, torch.arange(8) + 1)[0] != together


@pytest.mark.parametrize("codes", [0, 16])
def test_a_tiny_autoencoder_learns_one_batch(codes, images):
    loss = TokenizerLoss(conv(images, codes), Weights(kl=0.0 if codes else 1e-6))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=3e-3, betas=(0.5, 0.9), weight_decay=0.0)
    found = []
    for step in range(35):
        optimizer.zero_grad()
        value, parts = loss(images, torch.arange(8) + 8 * step)
        value.backward()
        optimizer.step()
        found.append(parts["reconstruction"].item())
    assert found[-1] < 0.85 * found[0]


def test_bf16_changes_little(images):
    whole, half = (
        TokenizerLoss(conv(images, codes=16), Weights(), bf16=bf16)(images, torch.arange(8))
        for bf16 in (False, True)
    )
    assert half[0].dtype == torch.float32
    assert half[0].item() == pytest.approx(whole[0].item(), rel=0.02)
