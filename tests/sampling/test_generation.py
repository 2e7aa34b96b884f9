"""Settings resolved for a run, and the samples that they give."""

import pytest
import torch

from ldae import draws, trajectory
from ldae.errors import InputError
from ldae.precision import float32_products
from ldae.sampling import generation
from ldae.sampling.generation import (
    generate,
    generate_batches,
    highest_level,
    is_pure_noise,
    resolve,
)
from ldae.sampling.settings import SamplingSettings

CLASSES = [str(digit) for digit in range(10)]
FEW = torch.arange(4)


@pytest.fixture
def method(method):
    return lambda *args, **changes: method(*args, **changes).requires_grad_(False)


@pytest.fixture
def conditional(method):
    return method("patch_pca", num_classes=10, model__class_conditional=True)


def sampled(method, numbers=FEW, classes=CLASSES, **how):
    resolved = resolve(method, classes, SamplingSettings(**{"steps": 4} | how))
    return generate(method, resolved, None, numbers)


@pytest.mark.parametrize(
    "target, schedule, top",
    [
        ("eps", "linear_gamma2", 998), ("score", "linear_gamma2", 998),
        ("eps", "rectified_flow", 998), ("velocity", "rectified_flow", 999),
        ("latent", "linear_gamma2", 999), ("v", "linear_gamma2", 999),
        ("eps", "ddpm", 999), ("eps", "linear_sigma", 999), ("image", "linear_sigma", 999),
        ("image", "single", 0),
    ],
)  # fmt: skip
def test_sampling_starts_at_the_highest_level_that_determines_z_0(method, target, schedule, top):
    config = {"objective__target": target, "noise__schedule": schedule}
    assert highest_level(method("patch_pca", **config)) == top


@pytest.mark.parametrize("row", [row.name for row in trajectory.ALL])
def test_rows_with_pure_noise_at_the_top_start_from_noise(method, row):
    made = method(row, 10 if row == "dit" else 0)
    entry = trajectory.row(row)
    expected = (entry.number or 14) <= 9 or row in ("vqvae", "vqgan", "ddpm")
    assert is_pure_noise(made, highest_level(made)) == expected


@pytest.mark.parametrize(
    "schedule, expected",
    [("ddpm", True), ("cosine", True), ("rectified_flow", True), ("geometric", False)],
)
def test_schedule_decides_whether_sampling_starts_from_noise(method, schedule, expected):
    made = method("predict_latent", noise__schedule=schedule)
    assert is_pure_noise(made, highest_level(made)) == expected
    wide = method("predict_latent", noise__schedule="geometric", noise__max_sigma=50.0)
    assert is_pure_noise(wide, highest_level(wide))


def test_one_step_is_the_prediction_from_noise(method):
    made = method("l_dae_single")
    actual = sampled(made, steps=1, seed=5)
    start = draws.normal(5, FEW, (16, 6), draws.SAMPLING)
    t = torch.zeros(4, dtype=torch.int64)
    seen = made.tokenizer.denormalize(made.predict_image(made.sigma[0] * start, t))
    assert torch.equal(actual, (seen.clamp(0, 1) * 255).round().byte())
    assert len(resolve(made, [], SamplingSettings()).levels) == 1
    assert len(resolve(method("l_dae"), [], SamplingSettings()).levels) == 50


def test_sample_n_has_class_n_mod_their_count(conditional):
    every = sampled(conditional, torch.tensor([3, 13, 14]))
    assert torch.equal(sampled(conditional, torch.tensor([13]), labels=("3",)), every[1:2])
    assert not torch.equal(sampled(conditional, torch.tensor([13]), labels=("4",)), every[1:2])
    pair = sampled(conditional, torch.tensor([13, 14]), labels=("4", "3"))
    assert torch.equal(pair[:1], sampled(conditional, torch.tensor([13]), labels=("3",)))


def test_random_labels_are_those_of_the_sample_numbers(conditional):
    numbers = torch.arange(40)
    for requested in ((), ("4", "7", "1")):
        how = {"labels": requested, "random_labels": True, "seed": 3}
        resolved = resolve(conditional, CLASSES, SamplingSettings(steps=4, **how))
        drawn = resolved.choose(resolved.labels, numbers).tolist()
        assert set(drawn) == {int(label) for label in requested or CLASSES}
        assert drawn[7:] == resolved.choose(resolved.labels, numbers[7:]).tolist()
        assert drawn != [resolved.labels[n % len(resolved.labels)] for n in range(40)]
        one = sampled(conditional, numbers[5:6], labels=(str(drawn[5]),), seed=3)
        assert torch.equal(sampled(conditional, numbers[5:6], **how), one)


@pytest.mark.parametrize("row", ["dit", "patch_pca"])
def test_features_do_not_depend_on_labels_while_predictions_do(row, method, images):
    conditional = method(row, num_classes=10, model__class_conditional=True)
    x = conditional.tokenizer.normalize(images)
    z, t = conditional.encode(x), torch.full((8,), 300)
    one, other, null = (conditional.denoise(z, t, torch.full((8,), label)) for label in (1, 2, 10))
    assert (one - other).abs().max() > 1e-2
    torch.testing.assert_close(conditional.denoise(z, t), null)
    before = conditional.features(x, 10)
    conditional.denoiser.y_embed.weight[:10].add_(1.0)
    assert torch.equal(conditional.features(x, 10), before)


def test_every_step_draws_its_own_noise(method, monkeypatch):
    """Noise depends on seed, number and step; the start is drawn in the same way."""
    streams, original = [], draws.normal

    def normal(seed, positions, shape, stream):
        assert (seed, positions.tolist(), shape) == (9, FEW.tolist(), (16, 6))
        streams.append(stream - draws.SAMPLING)
        return original(seed, positions, shape, stream)

    monkeypatch.setattr(draws, "normal", normal)
    made = method("predict_latent")
    sampled(made, sampler="ddpm", steps=4, seed=9)
    assert streams == [0, 1, 2, 3]
    streams.clear()
    sampled(made, sampler="heun", steps=4, seed=9)
    assert streams == [0]


def test_guidance_uses_the_unconditional_network(conditional):
    plain = sampled(conditional)
    none = sampled(conditional, guidance=0.0)
    twice = sampled(conditional, guidance=2.0)
    assert not torch.equal(plain, none) and not torch.equal(plain, twice)
    conditional.denoiser.y_embed.weight[10].add_(0.5)
    assert torch.equal(sampled(conditional), plain)
    assert not torch.equal(sampled(conditional, guidance=0.0), none)


class Brightness(torch.nn.Module):
    """A classifier of 16 x 16 pixels: class 0 is dark, class 1 is bright."""

    num_classes = 2
    pretrained_cfg = {
        "input_size": (3, 16, 16), "interpolation": "bicubic", "crop_pct": 1.0,
        "mean": (0.5,) * 3, "std": (0.5,) * 3, "label_names": ["dark", "bright"],
    }  # fmt: skip

    def forward(self, x):
        assert x.shape[1:] == (3, 16, 16)
        mean = x.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


@pytest.mark.parametrize("row", ["l_dae", "predict_latent", "patch_pca"])
def test_classifier_guides_to_the_requested_class(row, method, monkeypatch):
    monkeypatch.setattr(generation, "load_classifier", lambda spec, in_chans: Brightness())
    made = method(row)
    with torch.no_grad():  # a denoiser that lets the gradient through
        made.denoiser.final.linear.weight.mul_(0.02)

    def mean(label, scale):
        actual = sampled(made, labels=(label,), classifier="any", classifier_scale=scale, steps=8)
        return float(actual.float().mean())

    plain = sampled(made, steps=8)
    unmoved = sampled(made, labels=("dark",), classifier="any", classifier_scale=0.0, steps=8)
    assert (unmoved.int() - plain.int()).abs().max() <= 1
    scale = 20.0
    assert mean("dark", scale) < float(plain.float().mean()) < mean("bright", scale)


def test_classes_of_run_and_classifier_are_matched_by_name(conditional, method, monkeypatch):
    classifier = Brightness()
    monkeypatch.setattr(generation, "load_classifier", lambda spec, in_chans: classifier)
    plain, every = method(), SamplingSettings(classifier="folder")
    two, three = (method("patch_pca", n, model__class_conditional=True) for n in (2, 3))
    both = SamplingSettings(classifier="folder", labels=("dark", "bright"))
    resolved = resolve(three, ["bright", "dark", "x"], both)
    assert resolved.labels.tolist() == [1, 0] and resolved.targets.tolist() == [0, 1]
    with pytest.raises(InputError, match="'x' is none of the 2 classes of folder"):
        resolve(three, ["bright", "dark", "x"], every)
    with pytest.raises(InputError, match="'0' is none of the 2 classes of folder"):
        resolve(two, ["0", "1"], every)  # "0" is not the first class of the classifier
    with pytest.raises(InputError, match="'blue' is none of the 2 classes of folder; the nearest"):
        resolve(plain, [], SamplingSettings(classifier="folder", labels=("blue",)))
    classifier.pretrained_cfg = Brightness.pretrained_cfg | {"label_names": None}
    assert resolve(plain, [], every).targets.tolist() == [0, 1]
    with pytest.raises(InputError, match="has 2 classes without names, but this run has 10"):
        resolve(conditional, CLASSES, every)
    plain.tokenizer.in_chans = 4
    with pytest.raises(InputError, match="takes 3 channels, but this run generates 4"):
        resolve(plain, [], every)


def test_a_target_that_does_not_determine_z_0_is_refused(method):
    made = method(objective__target="normalized")
    with pytest.raises(InputError, match="objective.target normalized cannot be sampled"):
        resolve(made, CLASSES, SamplingSettings())


@pytest.mark.parametrize("scale", ["raw", "per-axis"])
def test_clip_keeps_predicted_images_in_the_range_of_pixels(scale, method, monkeypatch):
    """The sampler sees z_0 of the clipped image, which is z_0 itself where it was in the range."""
    made, seen = method("ddpm", tokenizer__scale=scale), []
    z = 3 * torch.randn(2, 16, made.tokenizer.dim)
    monkeypatch.setattr(made, "denoise", lambda z_t, t, labels=None: z_t)
    sampler = lambda denoise, *_, **__: seen.append(denoise(z, 0)) or z  # noqa: E731
    monkeypatch.setitem(generation.SAMPLERS, "ddim", sampler)
    sampled(made, FEW[:2], [], clip=True)
    pixels = made.tokenizer.denormalize(made.decode(z))
    assert pixels.min() < 0 and pixels.max() > 1
    found = made.tokenizer.denormalize(made.decode(seen[0]))
    torch.testing.assert_close(found, pixels.clamp(0, 1))


@pytest.mark.parametrize(
    "how, message",
    [
        ({"guidance": 2.0}, "guidance needs a run with model.class_conditional"),
        ({"labels": ("3",)}, "labels need a run with model.class_conditional"),
        ({"random_labels": True}, "labels need a run with model.class_conditional"),
        ({"steps": 1001}, "steps 1001 is more than the 1000 noise levels"),
    ],
)
def test_settings_that_do_not_fit_the_run_are_refused(method, how, message):
    with pytest.raises(InputError, match=message):
        resolve(method(), CLASSES, SamplingSettings(**how))


def test_clip_needs_a_tokenizer_that_gives_latents_back(method):
    with pytest.raises(InputError, match="clip needs tokenizer.name patch_pca or pixel, not patch"):
        resolve(method("patch_ae"), [], SamplingSettings(clip=True))


def test_unknown_classes_are_refused(conditional):
    names = ["cat", "dog", "horse", *CLASSES[3:]]
    with pytest.raises(InputError, match="'hors' is none of the 10 classes .* nearest is 'horse'"):
        resolve(conditional, names, SamplingSettings(labels=("hors",)))
    with pytest.raises(InputError, match="'10' is none of the 10 classes"):
        resolve(conditional, names, SamplingSettings(labels=("10",)))
    resolved = resolve(conditional, names, SamplingSettings(labels=("dog", "2")))
    assert resolved.labels.tolist() == [1, 2]


def test_guidance_needs_a_run_trained_with_dropped_labels(method):
    never = method("patch_pca", 10, model__class_conditional=True, model__label_dropout=0.0)
    with pytest.raises(InputError, match="model.label_dropout is 0"):
        resolve(never, CLASSES, SamplingSettings(guidance=2.0))


def test_samples_that_are_not_finite_are_refused(method):
    made = method("patch_pca")
    made.denoiser.final.linear.bias[0] = torch.nan
    with pytest.raises(InputError, match="sample 0 in fp32 is not finite"):
        sampled(made)


def test_the_start_is_drawn_without_tf32_too(method):
    """Else a caller who allows TF32 gets samples that depend on the batch size."""
    precisions = []

    class Gaussian:
        def sample_noised(self, normals, gamma, sigma):
            precisions.append(torch.get_float32_matmul_precision())
            return normals

    one = method("l_dae")
    resolved = resolve(one, [], SamplingSettings(steps=2))
    with float32_products(tf32=True):
        generate(one, resolved, Gaussian(), FEW)
    assert precisions == ["highest"]


def test_too_little_memory_names_the_setting_to_lower():
    def small(numbers):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(InputError, match="cpu has too little memory for 3 samples .*--batch-size"):
        next(generate_batches(small, range(9), 3, torch.device("cpu")))
