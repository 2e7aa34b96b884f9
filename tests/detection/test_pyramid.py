import pytest
import torch

from ldae.detection.pyramid import SCALES, SimpleFeaturePyramid


@pytest.mark.parametrize("side", [4, 6, 16])
def test_maps_have_the_scales_of_the_token_map(side):
    pyramid = SimpleFeaturePyramid(dim=16, out_channels=8)
    maps = pyramid(torch.randn(2, 16, side, side))
    assert [part.shape for part in maps] == [
        (2, 8, length, length) for length in (4 * side, 2 * side, side, side // 2, -(-side // 4))
    ]
    assert len(maps) == len(SCALES)


def test_each_place_of_a_map_comes_from_the_tokens_around_it():
    """The 3x3 convolutions reach one place of their own map farther."""
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(dim=16, out_channels=8)
    tokens = torch.randn(1, 16, 16, 16)
    changed = tokens.clone()
    changed[..., 10, 10] += 1
    before, after = pyramid(tokens), pyramid(changed)
    for part, other, scale, (first, last) in zip(
        before, after, SCALES, ((39, 44), (19, 22), (9, 11), (4, 6), (2, 3))
    ):
        rows = (part != other).any(1)[0].any(1).nonzero().flatten()
        assert first <= rows.min() and rows.max() <= last, scale


def test_channels_are_normalised():
    torch.manual_seed(0)
    for part in SimpleFeaturePyramid(16, 8)(torch.randn(1, 16, 8, 8)):
        variance, mean = torch.var_mean(part, 1, correction=0)
        assert mean.abs().max() < 1e-5 and (variance - 1).abs().max() < 1e-2
