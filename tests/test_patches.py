import pytest
import torch
from torch import nn

from ldae.patches import grid_side, is_sincos, patchify, sincos_positions, unpatchify


def test_unpatchify_is_the_inverse_of_patchify():
    images = torch.randn(3, 5, 24, 24)
    assert torch.equal(unpatchify(patchify(images, 4), 4, 5), images)


def test_a_linear_on_tokens_is_a_convolution_with_the_same_weight():
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    weight = torch.randn(7, 3 * 4 * 4, dtype=torch.float64)
    convolved = nn.functional.conv2d(images, weight.reshape(7, 3, 4, 4), stride=4)
    tokens = patchify(images, 4) @ weight.T
    torch.testing.assert_close(tokens, convolved.flatten(2).transpose(1, 2))


def test_positions_equal_a_loop_over_the_definition():
    dim, side = 16, 3
    positions = sincos_positions(dim, side)
    for row in range(side):
        for column in range(side):
            for half, coordinate in enumerate((column, row)):
                for i in range(dim // 4):
                    angle = torch.tensor(coordinate / 10_000 ** (i / (dim // 4)))
                    values = positions[row * side + column]
                    torch.testing.assert_close(values[half * dim // 2 + i], angle.sin())
                    torch.testing.assert_close(values[half * dim // 2 + dim // 4 + i], angle.cos())


def test_a_grid_has_a_side_only_if_it_is_square():
    assert [grid_side(count) for count in (0, 1, 15, 16, 17)] == [0, 1, 0, 4, 0]


def test_constant_positions_are_known_to_within_a_tolerance():
    positions = sincos_positions(8, 3)
    assert is_sincos(positions) and is_sincos(positions.half())
    positions[4, 2] += 1e-4
    assert is_sincos(positions) and not is_sincos(positions, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (8, 8), (9, 6), (9, 8)])
def test_other_positions_are_not_the_constant_ones(shape):
    assert not is_sincos(torch.zeros(shape))
