import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from ldae.data.transforms import CropTransform
from ldae.errors import InputError


def picture(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image | np.ndarray:
    """Return a smooth random picture, as an array when it does not have three channels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), np.uint8)
    planes = [Image.fromarray(coarse[..., c]).resize((width, height)) for c in range(channels)]
    array = np.dstack([np.asarray(plane) for plane in planes])
    return Image.fromarray(array) if channels == 3 else array


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (32, 32), (33, 32), (64, 64), (20, 31)])
def test_center_crop_equals_resize_then_crop(size):
    image, S = picture(*size), 32
    resized = tuple(side * S // min(size) for side in size)
    left, top = ((side - S) / 2 for side in resized)
    left, top = round(left), round(top)
    slow = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + S, top + S))
    fast = CropTransform(S)(image, rng()).permute(1, 2, 0).numpy()
    assert np.abs(fast.astype(int) - np.asarray(slow)).max() <= 1


@pytest.mark.parametrize("channels", [3, 5])
def test_an_image_of_the_right_size_is_unchanged(channels):
    noise = rng().integers(0, 256, (16, 16, channels), np.uint8)
    image = Image.fromarray(noise) if channels == 3 else noise
    pixels = CropTransform(16, in_chans=channels)(image, rng())
    assert np.array_equal(pixels.permute(1, 2, 0), noise)
    wide = np.concatenate([noise * 0, noise, noise * 0], axis=1)
    wide = Image.fromarray(wide) if channels == 3 else wide
    assert torch.equal(CropTransform(16, in_chans=channels)(wide, rng()), pixels)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 700), (8, 8), (2000, 1500)])
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_every_shape_becomes_a_square(crop, size, in_chans):
    pixels = CropTransform(16, in_chans, crop, flip=True)(Image.new("RGB", size, "red"), rng())
    assert pixels.shape == (in_chans, 16, 16) and pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    if in_chans == 3:
        assert (pixels == torch.tensor([255, 0, 0]).view(3, 1, 1)).all()


def test_an_image_of_extreme_shape_is_not_enlarged_as_a_whole(monkeypatch):
    sizes, resize = [], Image.Image.resize

    def spy(image, size, *args, **kwargs):
        sizes.append(size)
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", spy)
    for crop in ("center", "random"):
        CropTransform(64, crop=crop)(Image.new("RGB", (1, 5000)), rng())
    assert sizes == [(64, 64), (64, 64)]


def test_channels_of_an_array_are_resized_like_rgb():
    image = picture(40, 30)
    six = np.dstack([np.asarray(image)] * 2)
    for crop in ("center", "random"):
        three = CropTransform(16, 3, crop)(image, rng(5))
        assert torch.equal(CropTransform(16, 6, crop)(six, rng(5)), torch.cat([three, three]))


def test_crops_are_a_pure_function_of_the_rng():
    image = picture(60, 40)
    transform = CropTransform(16, crop="random", flip=True)
    crops = [transform(image, rng(seed)) for seed in range(20)]
    assert all(torch.equal(crop, transform(image, rng(seed))) for seed, crop in enumerate(crops))
    assert len({crop.numpy().tobytes() for crop in crops}) == 20


def test_flip_mirrors_half_of_the_images():
    image, generator = picture(16, 16), rng()
    mirrored = CropTransform(16)(image, rng()).flip(-1)
    transform = CropTransform(16, flip=True)
    flipped = sum(torch.equal(transform(image, generator), mirrored) for _ in range(400))
    assert 150 < flipped < 250


def test_random_crops_have_maes_areas_and_ratios():
    # Pixel values that are coordinates show where a crop comes from.
    size = 250
    ramp = np.arange(size, dtype=np.uint8)
    x, y = np.meshgrid(ramp, ramp)
    coordinates = Image.fromarray(np.dstack([x, y, 0 * x]))
    transform, generator = CropTransform(64, crop="random"), rng()
    areas, ratios = [], []
    for _ in range(300):
        x, y, _ = transform(coordinates, generator).numpy().astype(float)
        width, height = x.max() - x.min() + 1, y.max() - y.min() + 1
        areas.append(width * height / size**2)
        ratios.append(width / height)
    assert 0.18 < min(areas) < 0.24 and 0.9 < max(areas) <= 1.01
    assert 0.72 < min(ratios) < 0.78 and 1.28 < max(ratios) < 1.38


@pytest.mark.parametrize("settings", [{"crop": "middle"}, {"img_size": 0}, {"in_chans": 0}])
def test_invalid_settings_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        CropTransform(**{"img_size": 8, **settings})


def test_clipped_crops_have_the_sides_of_maes_probe():
    """In MAE's util/crop.py each side of a single draw is clipped to the image."""

    class Spy:
        """An image that records the requested crop."""

        size = (200, 50)
        mode = "RGB"

        def resize(self, size, resample, box, reducing_gap):
            self.sides = (box[2] - box[0], box[3] - box[1])
            return Image.new("RGB", size)

    sides, expected = [], []
    for seed in range(200):
        image, draws = Spy(), rng(seed)
        CropTransform(64, 3, "random", area=(0.08, 1.0), clip=True)(image, rng(seed))
        area = 200 * 50 * draws.uniform(0.08, 1.0)
        ratio = np.exp(draws.uniform(np.log(3 / 4), np.log(4 / 3)))
        expected.append(
            (min(round((area * ratio) ** 0.5), 200), min(round((area / ratio) ** 0.5), 50))
        )
        sides.append(image.sides)
    assert sides == expected and 0 < [h for _, h in sides].count(50) < 200


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1001, 13)])
def test_an_image_too_long_for_any_crop_keeps_torchvisions_middle(size):
    boxes = []

    class Spy:
        """An image that records the requested crop."""

        mode = "RGB"

        def resize(self, size, resample, box, reducing_gap):
            boxes.append(box)
            return Image.new("RGB", size)

    Spy.size = size
    CropTransform(64, crop="random")(Spy(), rng())
    image = Image.new("L", size)
    top, left, height, width = RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
    assert boxes == [(left, top, left + width, top + height)]
