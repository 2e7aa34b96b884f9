"""The loss of masked runs against a slow loop written from the equations, in float64."""

import pytest
import torch

from ldae import draws, masking, trajectory
from ldae.errors import InputError
from ldae.method import build
from ldae.models import DENOISERS
from ldae.models.contract import Denoiser

N, D = 16, 192  # tokens and pixels of a patch, of the images of 32 x 32
ROWS = [row.name for row in trajectory.ALL]


def gradients(method, images, positions, labels):
    """Return the loss, and the gradients of the denoiser."""
    loss = method(images, positions, labels)
    loss = loss[0] if isinstance(loss, tuple) else loss  # of a feature target
    loss.backward()
    found = {name: part.grad for name, part in method.denoiser.named_parameters()}
    method.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("row", ROWS)
def test_without_dropped_tokens_a_row_is_the_row_bit_for_bit(row, method, images):
    """Also when the ratio is so small that it drops no token."""
    batch = images, torch.arange(8), torch.arange(8) % 5
    expected, of_weights = gradients(method(row, 5, masking__ratio=0.0), *batch)
    for ratio, kept_weight in ((0.0, 0.2), (0.01, 0.0)):
        one = method(row, 5, masking__ratio=ratio, masking__kept_weight=kept_weight)
        loss, found = gradients(one, *batch)
        assert torch.equal(loss, expected) and found.keys() == of_weights.keys()
        assert all(torch.equal(found[name], of_weights[name]) for name in found)


def predict(denoiser, seen, t, kept):
    """Return DiT's output (N, out_dim) for one image: visible tokens, then all, by a loop."""
    c = denoiser.condition(t[None])
    x = torch.stack([denoiser.embed(seen[i]) + denoiser.pos_embed[i] for i in kept])[None]
    for block in denoiser.encoder:
        x = block(x, c)
    visible = dict(zip(kept, x[0], strict=True))
    tokens = [
        visible[i] if i in visible else denoiser.mask_token + denoiser.pos_embed[i]
        for i in range(N)
    ]
    x = torch.stack(tokens)[None]
    for block in denoiser.decoder:
        x = block(x, c)
    return denoiser.final(x, c)[0]


def patches_of(method, image):
    """Return the patches (N, D) of one uint8 image, normalised."""
    tokenizer, p = method.tokenizer, method.tokenizer.patch_size
    x = image.double() / 255 - tokenizer.pixel_mean[:, None, None]
    x = x / tokenizer.pixel_std[:, None, None]
    corners = [(i, j) for i in range(0, 32, p) for j in range(0, 32, p)]
    return torch.stack([x[:, i : i + p, j : j + p].reshape(-1) for i, j in corners])


def error_of(method, target, patch, output):
    """Return the weighted square error of a token's output, by a loop over axes or pixels."""
    tokenizer, d = method.tokenizer, method.tokenizer.dim
    if target == "normalized":
        mean = sum(patch) / D
        variance = sum((value - mean) ** 2 for value in patch) / (D - 1)
        wanted = (patch - mean) / (variance + 1e-6) ** 0.5
        return sum((wanted - output) ** 2) / D
    if target == "image":
        r = tokenizer.basis @ (patch - output)
    else:  # whitened
        r = tokenizer.basis @ (patch - tokenizer.patch_mean)
        level = 1 / (255 * tokenizer.pixel_std.repeat_interleave(D // 3))  # of grey, per pixel
        for axis, variance in enumerate(tokenizer.variances):
            rounding = (tokenizer.basis[axis] ** 2 * level**2 / 12).sum()
            r[axis] = r[axis] / max(variance, rounding) ** 0.5 - output[axis]
    return sum((1.0 if i < d else 0.1) * r[i] ** 2 for i in range(D)) / D


def reference_loss(method, target, images, positions, kept_weight) -> float:
    """Compute the loss of l_dae with another target by loops over images, tokens and axes."""
    tokenizer, d = method.tokenizer, method.tokenizer.dim
    steps = draws.timesteps(method.seed, positions, 1000)
    all_kept = masking.kept_tokens(method.seed, positions, N, method.num_kept).tolist()
    total = 0.0
    for image, t, position, kept in zip(images, steps, positions, all_kept, strict=True):
        sigma = 2**0.5 * int(t) / 999
        patches = patches_of(method, image)
        axes, mean = tokenizer.basis[:d], tokenizer.patch_mean
        eps = draws.normal(method.seed, position[None], (N, d))[0].double()
        seen = torch.stack([
            axes.T @ (axes @ (patch - mean) + sigma * e / tokenizer.scales) + mean
            for patch, e in zip(patches, eps, strict=True)
        ])  # fmt: skip
        output = predict(method.denoiser, seen, t, kept)
        errors, weights = [], []
        for token in range(N):
            errors.append(error_of(method, target, patches[token], output[token]))
            weights.append(kept_weight if token in kept else 1.0)
        mean_error = sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
        total += float(mean_error) / (1 + sigma**2) / len(images)
    return total


@pytest.mark.parametrize(
    "target, kept_weight",
    [("image", 1.0), ("image", 0.2), ("image", 0.0), ("normalized", 0.0), ("whitened", 0.2)],
)
def test_the_loss_of_a_masked_row_is_its_equation(target, kept_weight, tiny, images, awake, fitted):
    changes = {"masking__ratio": 0.75, "masking__kept_weight": kept_weight}
    method = build(tiny("l_dae", objective__target=target, **changes)).double()
    fitted(method.tokenizer)
    awake(method.denoiser)
    assert method.num_kept == 4
    positions = torch.tensor([0, 2**33 + 1])
    with torch.no_grad():
        actual = method(images[:2], positions).item()
        expected = reference_loss(method, target, images[:2], positions, kept_weight)
    assert actual == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("row", [row for row in ROWS if row != "ddpm"])
def test_every_row_of_a_transformer_can_be_masked(row, method, images):
    """Also the rows whose tokens are latents of a convolutional tokenizer."""
    one = method(row, 5, masking__ratio=0.75)
    loss, found = gradients(one, images, torch.arange(8), torch.arange(8) % 5)
    assert loss.isfinite() and found["mask_token"].abs().sum() > 0


def test_features_do_not_depend_on_the_ratio(method, images):
    one, other = (method(masking__ratio=ratio) for ratio in (0.75, 0.5))
    other.load_state_dict(one.state_dict())
    x = one.tokenizer.normalize(images)
    assert torch.equal(one.features(x, 10), other.features(x, 10))
    plain = method()
    plain.load_state_dict({n: v for n, v in one.state_dict().items() if "mask" not in n})
    assert torch.equal(one.features(x, 10), plain.features(x, 10))


@pytest.mark.parametrize("ratio", [0.97, 1.0])
def test_a_ratio_that_leaves_no_token_is_refused(ratio, tiny):
    with pytest.raises(InputError, match="^masking.ratio .* keeps none of the 16 tokens"):
        build(tiny(masking__ratio=ratio))


def test_a_denoiser_that_needs_all_tokens_is_refused(tiny, monkeypatch):
    class Whole(DENOISERS["dit"]):
        add_mask_token = Denoiser.add_mask_token

    monkeypatch.setitem(DENOISERS, "dit", Whole)
    build(tiny())
    with pytest.raises(InputError, match="^masking.ratio must be 0: Whole needs all tokens$"):
        build(tiny(masking__ratio=0.5))
