"""The transform of tensors against timm's transform of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldae.backbones.preprocessing import EvalTransform

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "side, crop_pct", [(32, 1.0), (24, 1.0), (48, 1.0), (24, 0.875), (32, 0.9)]
)
def test_transform_of_tensors_matches_timms_transform_of_images(side, crop_pct, interpolation):
    transform = EvalTransform((3, side, side), interpolation, crop_pct, "center", MEAN, STD)
    axis = np.linspace(0, 3, 32)
    waves = np.stack([np.sin(axis[:, None] + k * axis) for k in (0, 1, 2)], -1)
    image = Image.fromarray((127 + 100 * waves).astype(np.uint8))
    expected = transform.normalize(transform(image, np.random.default_rng(0))[None])
    tensor = torch.from_numpy(np.array(image)).movedim(-1, 0)[None] / 255
    actual = transform.transform_tensor(tensor)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 0.03  # Pillow rounds to 8 bits in between


def test_the_border_of_each_of_many_channels_has_its_mean():
    mean = (0.1, 0.3, 0.5, 0.7, 0.9)
    transform = EvalTransform((5, 8, 8), "bicubic", 1.0, "border", mean, (0.2,) * 5)
    image = transform(np.zeros((4, 8, 5), np.uint8), np.random.default_rng(0))
    assert not image[:, 3:5].any()
    assert image[:, 0, 0].tolist() == [round(255 * value) for value in mean]


def test_transform_of_tensors_is_differentiable_and_keeps_its_input():
    transform = EvalTransform((3, 20, 20), "bicubic", 0.9, "center", MEAN, STD)
    grey = torch.rand(2, 1, 32, 32, requires_grad=True)
    before = grey.detach().clone()
    output = transform.transform_tensor(grey)
    assert output.shape == (2, 3, 20, 20)
    output.square().sum().backward()
    assert grey.grad.abs().min(dim=-1).values[..., 8:24].min() > 0
    assert torch.equal(grey.detach(), before)
