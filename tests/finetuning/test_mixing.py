import numpy as np
import pytest
import torch

from ldae.backbones.preprocessing import EvalTransform
from ldae.data.workers import Batch
from ldae.errors import InputError
from ldae.finetuning.mixing import Mixing
from ldae.finetuning.settings import AugmentSettings

CPU = torch.device("cpu")
MEAN, STD = (0.2, 0.4, 0.6), (0.5, 0.3, 0.2)
PLAIN = dict(erasing=0.0, mixup=0.0, cutmix=0.0, mix_images=4)


def mixing(seed=0, **changes):
    transform = EvalTransform((3, 16, 16), "bicubic", 1.0, "center", MEAN, STD)
    return Mixing(AugmentSettings(**(PLAIN | changes)), transform, 5, seed, CPU)


def batch(first=0, count=8):
    """Return images first .. first + count - 1 of an endless sequence."""
    images, labels = [], []
    for n in range(first, first + count):
        rng = np.random.default_rng(n)
        images.append(torch.from_numpy(rng.integers(0, 256, (3, 16, 16), dtype=np.uint8)))
        labels.append(n % 5)
    positions = torch.arange(first, first + count)
    return Batch(torch.stack(images), torch.tensor(labels), positions, [])


def normalised(images):
    mean, std = (torch.tensor(part)[:, None, None] for part in (MEAN, STD))
    return (images.double() / 255 - mean) / std


def smooth(labels, smoothing):
    return (1 - smoothing) * torch.eye(5, dtype=torch.float64)[labels] + smoothing / 5


def test_without_augmentation_images_are_normalised_and_labels_smoothed():
    actual = mixing(label_smoothing=0.1)(batch())
    torch.testing.assert_close(
        actual.images.double(), normalised(batch().images), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(actual.targets.double(), smooth(batch().targets, 0.1))
    assert torch.equal(actual.positions, batch().positions)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_are_mixed_with_the_mirrored_image_of_their_group(kind):
    """The partner has the same share of the targets as of the pixels."""
    plain, labels = normalised(batch(count=400).images), batch(count=400).targets
    output = mixing(label_smoothing=0.1, **{kind: 0.8})(batch(count=400))
    shares = []
    for first in range(0, 400, 4):
        group = slice(first, first + 4)
        original, partner = plain[group], plain[group].flip(0)
        targets = smooth(labels[group], 0.1)
        # The share of the first image, whose partner is of another class: 3 classes apart.
        lam = (output.targets[first, labels[first]].item() - 0.02) / 0.9
        shares.append(lam)
        torch.testing.assert_close(
            output.targets[group].double(), lam * targets + (1 - lam) * targets.flip(0),
            atol=1e-6, rtol=0,
        )  # fmt: skip
        mixed = output.images[group].double()
        if kind == "mixup":
            torch.testing.assert_close(
                mixed, lam * original + (1 - lam) * partner, atol=1e-5, rtol=0
            )
        else:
            kept = (mixed - original).abs().amax(1) < 1e-5
            cut = (mixed - partner).abs().amax(1) < 1e-5
            assert (kept | cut).all()
            assert cut.double().mean().item() == pytest.approx(1 - lam, abs=0.01)
    # Beta(0.8, 0.8) has mean 1/2 and variance 1 / 10.4. Of a box of side r around a uniform center,
    # r - r^2 / 4 lies in the image on average, on each axis.
    shares_of_boxes = np.random.default_rng(0).beta(0.8, 0.8, 100_000)
    side = np.sqrt(shares_of_boxes)
    expected = 0.5 if kind == "mixup" else 1 - np.mean((side - side**2 / 4) ** 2)
    assert np.mean(shares) == pytest.approx(expected, abs=0.1)
    if kind == "mixup":
        assert np.var(shares) == pytest.approx(1 / 10.4, abs=0.03)


def test_erasing_replaces_rectangles_by_normal_noise():
    output = mixing(erasing=0.5, mix_images=2)(batch(count=400)).images.double()
    plain = normalised(batch(count=400).images)
    changed = (output - plain).abs().amax(1) > 1e-4
    erased = changed.flatten(1).any(1)
    assert erased.double().mean().item() == pytest.approx(0.5, abs=0.08)
    values = output.movedim(1, -1)[changed]
    assert values.mean().abs() < 0.05 and values.std() == pytest.approx(1, abs=0.05)
    assert changed.flatten(1).double().mean(1)[erased].max() <= 0.4  # a third, and rounding


@pytest.mark.parametrize("pieces", [2, 4])
def test_mixing_does_not_depend_on_the_division_of_a_batch(pieces):
    mix = mixing(erasing=0.25, mixup=0.8, cutmix=1.0)
    undivided = mix(batch(16, 16))
    size = 16 // pieces
    parts = [mix(batch(16 + size * piece, size)) for piece in reversed(range(pieces))]
    assert torch.equal(torch.cat([part.images for part in reversed(parts)]), undivided.images)
    assert torch.equal(torch.cat([part.targets for part in reversed(parts)]), undivided.targets)


def test_mixing_depends_only_on_seed_and_position():
    mix = mixing(mixup=0.8, erasing=1.0)
    torch.manual_seed(5)
    next_draw = torch.rand(1)
    torch.manual_seed(5)
    first = mix(batch())
    assert torch.equal(torch.rand(1), next_draw)
    assert torch.equal(mix(batch()).images, first.images)
    assert not torch.equal(mixing(1, mixup=0.8, erasing=1.0)(batch()).targets, first.targets)
    assert not torch.equal(mix(batch(8))[1][:, 0], first.targets[:, 0])


def test_micro_batches_that_split_a_group_are_refused():
    mixing(mixup=1.0).check(8)
    with pytest.raises(InputError, match="micro batch of 6 images .* augment.mix_images 4"):
        mixing(mixup=1.0).check(6)
    with pytest.raises(InputError, match="even number, not 3"):
        mixing(mixup=1.0, mix_images=3).check(6)
