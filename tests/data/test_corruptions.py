"""Corruptions increase with severity and depend on image, name and seed only."""

import numpy as np
import pytest

from ldae.data.corruptions import NAMES, SEVERITIES, constants, corrupt, resolve_names
from ldae.errors import InputError

# Severities after which the published constants reduce the distance to the clean image, as they do
# on photographs. The reasons are fewer passes, less of the image under the same ice, the same fog
# in finer clouds, and local shifts in place of a large warp.
NEARER = {
    224: {"glass_blur": {1, 3}, "frost": {3}, "fog": {3}, "elastic_transform": {2}},
    32: {
        "glass_blur": {1, 2, 4},
        "motion_blur": {3},
        "frost": {3, 4},
        "elastic_transform": {1, 2, 3, 4},
    },
}


def texture(side: int, chans: int = 3, seed: int = 0) -> np.ndarray:
    """Edges, waves and grain, uint8 (side, side, chans)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((side, side)) / side

    def waves() -> np.ndarray:
        phases = rng.normal(0, 20, (chans, 3))
        return np.stack([np.sin(rows * a + columns * b + c) for a, b, c in phases], 2)

    grain = rng.normal(0, 0.2, (side, side, chans))
    return (128 + 45 * (waves() + np.sign(waves()) + grain)).clip(0, 255).astype(np.uint8)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(((first / 255 - second / 255) ** 2).mean())


@pytest.mark.parametrize("side", [224, 32])
@pytest.mark.parametrize("name", NAMES)
def test_severity_raises_the_distance_to_the_clean_image(name, side):
    images = [texture(side, seed=seed) for seed in range(3 if side == 224 else 12)]
    distances = [
        np.mean([distance(corrupt(x, name, severity, i), x) for i, x in enumerate(images)])
        for severity in SEVERITIES
    ]
    assert distances[0] > 1e-5
    for step in SEVERITIES[:-1]:
        if step not in NEARER[side].get(name, ()):
            assert distances[step] > distances[step - 1], f"severity {step + 1}: {distances}"


@pytest.mark.parametrize("side", [224, 32])
def test_frost_correlates_less_with_the_image_at_higher_severity(side):
    """The correlation decreases also where the distance to the image does not increase."""
    x = texture(side)
    correlations = [
        np.corrcoef(corrupt(x, "frost", severity, 0).ravel(), x.ravel())[0, 1]
        for severity in SEVERITIES
    ]
    assert correlations == sorted(correlations, reverse=True) and len(set(correlations)) == 5


@pytest.mark.parametrize("name", NAMES)
def test_corrupted_copies_depend_on_image_name_and_seed_only(name):
    x = texture(64)
    before = x.copy()
    first = corrupt(x, name, 3, 5)
    np.random.default_rng(0).random()
    assert first.dtype == np.uint8 and first.shape == x.shape
    assert (x == before).all() and (corrupt(x, name, 3, 5) == first).all()
    is_random = name not in (
        "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"
    )  # fmt: skip
    assert (corrupt(x, name, 3, 6) != first).any() == is_random


@pytest.mark.parametrize("shape", [(40, 48, 1), (48, 40, 5), (64, 96, 3), (8, 8, 3), (9, 11, 2)])
def test_any_shape_and_number_of_channels_is_kept(shape):
    x = np.resize(texture(96, shape[2]), shape)
    for name in NAMES:
        for severity in (1, 5):
            assert corrupt(x, name, severity, 0).shape == shape


def test_constants_are_the_published_ones_and_lengths_scale_with_the_image():
    assert constants("defocus_blur", 5, 224) == {"radius": 10, "alias": 0.5}
    assert constants("defocus_blur", 5, 448)["radius"] == 20
    assert constants("motion_blur", 1, 32) == {"radius": 6, "sigma": 1}
    assert constants("gaussian_noise", 5, 384) == {"std": 0.38}
    assert constants("gaussian_noise", 5, 63) == {"std": 0.1}
    assert constants("elastic_transform", 3, 112)["alpha"] == pytest.approx(12.2 / 4)
    assert len(NAMES) == 15


def test_wrong_names_and_severities_are_refused():
    with pytest.raises(InputError, match="'gausian_noise'; the nearest is 'gaussian_noise'"):
        corrupt(texture(32), "gausian_noise", 1, 0)
    with pytest.raises(InputError, match="nearest is 'fog'"):
        resolve_names(["snow", "fogg"])
    with pytest.raises(InputError, match="severity must be 1, 2, 3, 4 or 5, not 6"):
        constants("fog", 6, 224)
    assert resolve_names(["all"]) == NAMES and resolve_names(["snow", "fog", "snow"]) == (
        "snow",
        "fog",
    )
    assert resolve_names([]) == ()
