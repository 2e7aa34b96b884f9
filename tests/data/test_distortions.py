"""Each distortion obeys a law or equals a reference implementation."""

import colorsys
import inspect
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ldae.data import distortions
from ldae.data.corruptions import NAMES, constants, corrupt

KEEP_FLAT = [  # these do not change a flat image
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform",
    "pixelate",
]  # fmt: skip


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def x():
    return np.random.default_rng(0).random((48, 56, 3))


def point(side: int = 65) -> np.ndarray:
    image = np.zeros((side, side, 1))
    image[side // 2, side // 2] = 1
    return image


def test_every_constant_is_a_parameter():
    for name in NAMES:
        parameters = list(inspect.signature(getattr(distortions, name)).parameters)[2:]
        assert parameters == list(constants(name, 1, 224)) == list(constants(name, 1, 32))


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("name", KEEP_FLAT)
def test_a_flat_image_stays_flat(name, side):
    flat = np.broadcast_to(np.array([30, 120, 250], np.uint8), (side, side, 3))
    assert (corrupt(flat, name, 5, 1) == flat).all()


def test_noise_has_the_right_moments(rng):
    grey = np.full((300, 300, 1), 0.5)
    noisy = distortions.gaussian_noise(grey, rng, 0.1)
    assert noisy.mean() == pytest.approx(0.5, abs=2e-3)
    assert noisy.std() == pytest.approx(0.1, rel=0.02)
    shot = distortions.shot_noise(grey, rng, 12)
    assert shot.mean() == pytest.approx(0.5, abs=5e-3)
    assert shot.var() == pytest.approx(0.5 / 12, rel=0.03)
    salted = distortions.impulse_noise(grey, rng, 0.2)
    assert (salted == 0).mean() == pytest.approx(0.1, abs=5e-3) == (salted == 1).mean()
    assert (salted == 0.5).mean() == pytest.approx(0.8, abs=5e-3)


def test_defocus_spreads_a_point_evenly_over_a_disk(rng):
    result = distortions.defocus_blur(point(), rng, 8, 0.1)[..., 0]
    rows, columns = np.indices(result.shape) - 32
    distance = np.hypot(rows, columns)
    assert result.sum() == pytest.approx(1)
    assert result[distance < 7] == pytest.approx(1 / (np.pi * 64), rel=0.01)
    assert abs(result[distance > 9]).max() < 1e-9


def test_motion_spreads_a_point_to_one_side_along_a_line(rng):
    for angle in (0, 30, -45, -90):
        result = distortions._blur_along(point(), 10, 3, angle)[..., 0]
        rows, columns = (result * (positions - 32) for positions in np.indices(result.shape))
        direction = np.degrees(np.arctan2(rows.sum(), columns.sum()))
        # A point spreads against the direction in which colours are taken, hence modulo 180.
        assert min((direction - angle) % 180, (angle - direction) % 180) < 8  # whole pixels
        half = np.exp(-0.5 * (np.arange(21) / 3) ** 2)
        assert result.sum() == pytest.approx(1)
        if angle % 90 == 0:  # at other angles, several steps may end in one pixel
            assert np.sort(result.ravel())[::-1][:21] == pytest.approx(half / half.sum())
        assert np.hypot(rows.sum(), columns.sum()) == pytest.approx(
            (half * np.arange(21)).sum() / half.sum(), rel=0.1
        )


def test_glass_moves_colours_of_the_image(rng):
    """Without blur, every colour is a colour of the image; a small reach moves few colours."""
    x = np.random.default_rng(1).random((40, 40, 1))
    result = distortions.glass_blur(x, rng, 1e-3, 2, 1)[..., 0]
    assert (result != x[..., 0]).mean() > 0.5
    assert set(result.ravel()) <= set(x.ravel())
    assert (distortions.glass_blur(x, rng, 1e-3, 0.3, 1)[..., 0] != x[..., 0]).mean() < 0.4


def test_zoom_enlarges_the_middle():
    ramp = np.tile(np.linspace(0, 1, 64)[None, :, None], (64, 1, 1))
    result = distortions._zoom(ramp, 1.25)[32, :, 0]
    slopes = np.diff(result[4:-4])
    assert slopes == pytest.approx(1 / 63 / 1.25, rel=1e-3)
    assert result[31:33].mean() == pytest.approx(0.5)


def test_brightness_raises_the_value_of_hsv(x, rng):
    x[0, 0] = 0
    result = distortions.brightness(x, rng, 0.3)
    for row, column in [(0, 0), (5, 7), (20, 30), (40, 50)]:
        hue, saturation, value = colorsys.rgb_to_hsv(*x[row, column])
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))
        assert result[row, column] == pytest.approx(expected)


def test_contrast_keeps_means_and_shrinks_deviations(x, rng):
    result = distortions.contrast(x, rng, 0.3)
    assert result.mean((0, 1)) == pytest.approx(x.mean((0, 1)))
    assert result.std((0, 1)) == pytest.approx(0.3 * x.std((0, 1)))


def test_elastic_transform_moves_pixels_by_smoothed_noise(x, rng):
    assert distortions.elastic_transform(x, rng, 0, 3, 0) == pytest.approx(x)
    ramp = np.tile(np.arange(64.0)[:, None, None], (1, 64, 1))
    moved = distortions.elastic_transform(ramp, np.random.default_rng(0), 20, 4, 0) - ramp
    same_rng = np.random.default_rng(0)
    same_rng.uniform(0, 1, 6)  # the three points
    noise = same_rng.uniform(-1, 1, (64, 64))
    shifts = 20 * ndimage.gaussian_filter(noise, 4, mode="reflect", truncate=8)
    assert moved[8:-8, 8:-8, 0] == pytest.approx(shifts[8:-8, 8:-8], abs=1e-3)


def test_elastic_transform_maps_three_points_affinely(rng):
    """Ramps show where each pixel comes from: the moved points come from the original points."""
    rows, columns = np.indices((61, 61)).astype(float)
    result = distortions.elastic_transform(
        np.stack([rows, columns], 2), np.random.default_rng(2), 0, 1, 5
    )
    points = 30 + 20 * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = points + np.random.default_rng(2).uniform(-5, 5, (3, 2))
    for original, point in zip(points, moved):
        planes = result.transpose(2, 0, 1)
        source = [ndimage.map_coordinates(plane, point[:, None], order=1)[0] for plane in planes]
        assert source == pytest.approx(original, abs=1e-6)


def test_pixelate_averages_blocks(rng):
    x = np.random.default_rng(0).random((64, 64, 3))
    result = distortions.pixelate(x, rng, 0.25)
    assert result == pytest.approx(
        np.kron(x.reshape(16, 4, 16, 4, 3).mean((1, 3)), np.ones((4, 4, 1))), abs=1e-6
    )


def test_jpeg_equals_pillows_at_the_same_quality(x, rng):
    pixels = np.rint(x * 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=10)
    result = distortions.jpeg_compression(pixels / 255, rng, 10)
    assert (np.rint(result * 255) == np.asarray(Image.open(file))).all()


def test_weather_brightens(x, rng):
    dark = 0.4 * x
    assert (distortions.frost(dark, rng, 0.7, 0.7) >= 0.7 * dark).all()
    snow = constants("snow", 3, 48)
    assert (distortions.snow(dark, rng, **snow) >= dark - 1e-9).all()
    cloud = distortions.plasma(48, 56, 1.5, rng)
    assert cloud.shape == (48, 56) and cloud.min() == 0 and cloud.max() == pytest.approx(1)
    foggy = distortions.fog(dark, rng, 2.0, 1.5)
    assert foggy.std() < dark.std() + 0.2 and 0 <= foggy.min() and foggy.max() <= dark.max() + 1e-9


def test_clouds_with_larger_decay_are_smoother():
    rough, smooth = (
        np.abs(np.diff(distortions.plasma(64, 64, decay, np.random.default_rng(0)))).mean()
        for decay in (1.2, 3.0)
    )
    assert smooth < rough / 2
