"""Features of the averaged encoder as a target beside the row's own."""

import pytest
import torch

from ldae import masking, noise
from ldae.backbones.fold import fold, init_from
from ldae.errors import InputError
from ldae.method import build
from ldae.models import DENOISERS
from ldae.models.contract import Denoiser

N, W = 16, 32  # tokens and width
BATCH = torch.tensor([0, 5, 2**33 + 1])


@pytest.fixture
def second(method):
    """second(**changes): a method with a feature target, whose average is another encoder."""

    def make(row="l_dae", num_classes=0, **changes):
        one = method(row, num_classes, features__share=0.25, **changes)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for part in one.feature_target.parameters():
                part.copy_(0.2 * torch.randn(part.shape, generator=generator))
        return one

    return make


@pytest.mark.parametrize("ratio, kept_weight", [(0.0, 1.0), (0.75, 1.0), (0.75, 0.3), (0.75, 0.0)])
@pytest.mark.parametrize("row", ["l_dae", "predict_latent"])
def test_the_loss_is_its_equation(row, ratio, kept_weight, second, images):
    """By a loop over images and tokens, in float64; the average sees clean images at t = 10."""
    changes = {"masking__ratio": ratio, "features__kept_weight": kept_weight}
    one = second(row, **changes).double()
    loss, parts = one(images[:3], BATCH)
    noised, average = one.add_noise(images[:3], BATCH), one.feature_target.average
    output = one.denoiser(noised.tokens, noised.t, kept=noised.kept)
    x = one.tokenizer.normalize(images[:3])
    gamma = 1.0 if row == "l_dae" else (1 - 11 / 1000) ** 0.5
    total = 0.0
    for image, position in enumerate(BATCH):
        tokens = one.tokenizer.encode(x[image][None]) * gamma
        tokens = one.tokenizer.inverse(tokens) if row == "l_dae" else tokens
        features = average.encode(tokens, average.condition(torch.tensor([10])))[0]
        kept = range(N)
        if ratio:
            kept = masking.kept_tokens(0, position[None], N, 4)[0].tolist()
        errors, weights = [], []
        for token in range(N):
            mean = sum(features[token]) / W
            variance = sum((value - mean) ** 2 for value in features[token]) / W
            wanted = (features[token] - mean) / (variance + 1e-6) ** 0.5
            predicted = output[image, token, -W:]
            errors.append(sum((wanted - predicted) ** 2) / W)
            weights.append(kept_weight if token in kept else 1.0)
        weighted = sum(w * e for w, e in zip(weights, errors, strict=True))
        total += (weighted / sum(weights)).item() / len(BATCH)
    assert parts["features"].item() == pytest.approx(total, rel=1e-6)
    assert loss.item() == pytest.approx(0.75 * parts["denoising"].item() + 0.25 * total, rel=1e-6)


def test_the_other_target_has_the_loss_of_the_row(second, method, images):
    """It is predicted by the first numbers of the output, which are also what samplers see."""
    one, plain = second(masking__ratio=0.75), method(masking__ratio=0.75)
    state = {n: v for n, v in one.state_dict().items() if not n.startswith("feature_target.")}
    for name in ("denoiser.final.linear.weight", "denoiser.final.linear.bias"):
        assert len(state[name]) == 192 + W
        state[name] = state[name][:192]
    plain.load_state_dict(state)
    _, parts = one(images[:3], BATCH)
    torch.testing.assert_close(parts["denoising"], plain(images[:3], BATCH).detach())
    z, t = one.encode(one.tokenizer.normalize(images)), torch.full((8,), 300)
    torch.testing.assert_close(one.denoise(z, t), plain.denoise(z, t))
    torch.testing.assert_close(one.predict_image(z, t), plain.predict_image(z, t))


def test_without_a_share_nothing_of_it_exists(tiny):
    plain, second = build(tiny()), build(tiny(features__share=0.5))
    assert plain.feature_target is None
    added = second.state_dict().keys() - plain.state_dict().keys()
    assert added and all(name.startswith("feature_target.average.") for name in added)
    assert not any("decoder" in name or "final" in name for name in added)


def test_the_average_follows_the_encoder_without_gradients(second, images):
    one = second(features__decay=0.9)
    loss, _ = one(images, torch.arange(8))
    loss.backward()
    target, now = one.feature_target, dict(one.denoiser.named_parameters())
    before = {name: part.clone() for name, part in target.average.named_parameters()}
    one.after_step()
    for name, part in target.average.named_parameters():
        assert part.grad is None and not part.requires_grad
        torch.testing.assert_close(part, 0.9 * before[name] + 0.1 * now[name])
        assert not torch.equal(part, before[name])


def test_the_average_starts_as_the_encoder(tiny, method, images, fitted):
    """Also as the encoder of the backbone from which a run starts."""
    start = build(tiny("l_dae_masked", features__share=0.5))
    fitted(start.tokenizer)
    for backbone in (None, fold(method())):
        if backbone:
            init_from(start, backbone)
        x = start.tokenizer.normalize(images)
        of_average = start.clean_features(start.encode(x)).mean(1)
        torch.testing.assert_close(of_average, start.features(x, 10))


def test_masking_and_the_feature_target_leave_the_export_alone(second, method):
    one, plain = second(masking__ratio=0.75), method()
    state = one.state_dict()
    kept = {n: state[n] for n in plain.state_dict() if not n.startswith("denoiser.final.linear")}
    plain.load_state_dict(kept, strict=False)
    exported, expected = fold(one).state_dict(), fold(plain).state_dict()
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_conditional_rows_average_the_encoder_at_the_null_label(second, images):
    one = second("patch_pca", 10, model__class_conditional=True)
    with torch.no_grad():
        before = one.clean_features(one.encode(one.tokenizer.normalize(images)))
        one.feature_target.average.y_embed.weight[:-1].add_(1.0)
        after = one.clean_features(one.encode(one.tokenizer.normalize(images)))
    assert torch.equal(after, before)


def test_an_encoder_without_features_of_tokens_is_refused(tiny, monkeypatch):
    class Pooled(DENOISERS["dit"]):
        encoder_copy = Denoiser.encoder_copy

    monkeypatch.setitem(DENOISERS, "dit", Pooled)
    with pytest.raises(InputError, match="^features.share must be 0: Pooled has no features"):
        build(tiny(features__share=0.5))


def test_noise_levels_of_the_features_are_those_of_backbones():
    assert [noise.feature_timestep(steps) for steps in (1000, 100, 1)] == [10, 1, 0]
