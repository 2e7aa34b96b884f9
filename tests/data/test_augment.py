import random

import numpy as np
import pytest
import torch
from PIL import Image

from ldae.data.augment import Augmentation, seed_global_rng
from ldae.errors import InputError

POLICY = "rand-m9-mstd0.5-inc1"


def augmentation(chans=3, size=24, policy=POLICY, **changes):
    settings = dict(min_area=0.3, flip=0.5) | changes
    return Augmentation((chans, size, size), "bicubic", (0.4,) * chans, policy=policy, **settings)


def picture(chans=3):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, chans), dtype=np.uint8)
    if chans in (3, 4):
        return Image.fromarray(pixels)
    return Image.fromarray(pixels[..., 0]) if chans == 1 else pixels


def global_draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize("chans", [1, 3, 4, 5])
def test_augmentation_is_a_pure_function_of_image_and_generator(chans):
    """Earlier draws have no influence: a loader's workers augment images in another order."""
    augment, image = augmentation(chans), picture(chans)
    expected = [augment(image, np.random.default_rng([7, n])) for n in range(6)]
    for n in (5, 2, 0):
        global_draws()
        again = augmentation(chans)(image, np.random.default_rng([7, n]))
        assert torch.equal(again, expected[n])
    assert expected[0].dtype == torch.uint8 and expected[0].shape == (chans, 24, 24)
    assert len({tuple(part.flatten().tolist()) for part in expected}) == 6
    other_seed = augment(image, np.random.default_rng([8, 0]))
    assert not torch.equal(other_seed, expected[0])


def test_global_generators_are_restored():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = global_draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    augmentation()(picture(), np.random.default_rng(0))
    with pytest.raises(KeyError), seed_global_rng(np.random.default_rng(0)):
        assert global_draws() != expected
        raise KeyError
    assert global_draws() == expected


def test_channels_that_are_not_rgb_share_the_random_numbers():
    """Five equal channels stay equal."""
    equal = np.repeat(np.asarray(picture(1))[..., None], 5, axis=2)
    for n in range(8):
        augmented = augmentation(5)(equal, np.random.default_rng(n))
        assert (augmented == augmented[:1]).all()


def test_augmentation_without_randomness_keeps_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    plain = augmentation(policy="", min_area=1.0, flip=0.0)
    augmented = plain(Image.fromarray(pixels), np.random.default_rng(0))
    assert np.array_equal(augmented.permute(1, 2, 0).numpy(), pixels)
    mirrored = augmentation(policy="", min_area=1.0, flip=1.0)
    augmented = mirrored(Image.fromarray(pixels), np.random.default_rng(0))
    assert np.array_equal(augmented.permute(1, 2, 0).numpy(), pixels[:, ::-1])


@pytest.mark.parametrize("policy", ["rnad-m9", "m9", "augmix-m3", "rand-mx"])
def test_wrong_policies_are_refused(policy):
    augmentation().check()
    augmentation(policy="").check()
    with pytest.raises(InputError, match=f"{policy!r} is not a RandAugment policy"):
        augmentation(policy=policy).check()


def test_every_operation_runs_at_every_magnitude():
    """timm's posterize asks Pillow for 0 bits at the highest magnitude."""
    for magnitude in (0, 5, 10):
        transform = augmentation(policy=f"rand-m{magnitude}-p1-inc1")._transforms[0]
        ops = next(part.ops for part in transform.transforms if hasattr(part, "ops"))
        for op in ops:
            with seed_global_rng(np.random.default_rng(0)):
                assert op(picture()).size == (30, 40), op


def test_the_seed_decides_what_each_global_generator_draws():
    draws = []
    for seed in (0, 1):
        with seed_global_rng(np.random.default_rng(seed)):
            draws.append(global_draws())
    assert all(first != second for first, second in zip(*draws))


def test_the_border_of_a_rotated_image_has_the_mean_colour():
    augment = Augmentation((3, 24, 24), "bicubic", (0.2, 0.4, 0.8), 0.3, 0.5, "rand-m10-p1-inc1")
    ops = next(part.ops for part in augment._transforms[0].transforms if hasattr(part, "ops"))
    rotate = next(op for op in ops if op.name.startswith("Rotate"))
    with seed_global_rng(np.random.default_rng(0)):
        assert rotate(Image.new("RGB", (40, 40), "white")).getpixel((0, 0)) == (51, 102, 204)


def test_crops_are_resized_with_the_interpolation():
    pixels = 255 * np.random.default_rng(0).integers(0, 2, (40, 30, 3), dtype=np.uint8)
    for interpolation, mixes in (("nearest", False), ("bicubic", True)):
        augment = Augmentation((3, 24, 24), interpolation, (0.4,) * 3, 0.3, 0.5, "")
        augmented = augment(Image.fromarray(pixels), np.random.default_rng(0))
        assert bool(((augmented > 0) & (augmented < 255)).any()) == mixes
