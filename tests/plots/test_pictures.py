import numpy as np
import pytest
import torch
from PIL import Image

from ldae.errors import InputError
from ldae.method import build
from ldae.plots import heat_maps, pictures


def test_a_grid_has_its_pictures_in_place():
    black, white = torch.zeros(3, 3, 32, 32), torch.ones(3, 3, 32, 32)
    pixels = np.asarray(pictures.grid([black, white], gap=0))
    assert pixels.shape == (2 * 64, 3 * 64, 3)
    assert (pixels[:64] == 0).all() and (pixels[64:] == 255).all()


def test_any_number_of_channels_can_be_shown():
    for chans in (1, 2, 5):
        assert pictures.grid([torch.rand(2, chans, 8, 8)]).mode == "RGB"


def test_pictures_have_the_right_size_and_first_row(tiny, images, tmp_path):
    method = build(tiny())
    method.tokenizer.fit([images])
    pictures.save_denoising(method, images[:5], tmp_path / "denoised.png")
    pictures.save_filters(method.tokenizer, tmp_path / "filters.png", columns=4)
    pictures.save_reconstruction(method.tokenizer, images[:5], tmp_path / "reconstructed.png")
    assert Image.open(tmp_path / "reconstructed.png").size == (5 * 66, 2 * 66)
    # 3 rows of 5 images, 6 filters in 2 rows of 4; 64 pixels and a gap of 2 each.
    assert Image.open(tmp_path / "denoised.png").size == (5 * 66, 3 * 66)
    assert Image.open(tmp_path / "filters.png").size == (4 * 66, 2 * 66)
    top = np.asarray(Image.open(tmp_path / "denoised.png"))[2:66:2, 2:66:2]
    assert abs(top.transpose(2, 0, 1).astype(int) - images[0].numpy()).max() <= 1


def test_clean_pictures_are_above_reconstructed_ones(tiny, images, tmp_path):
    method = build(tiny("dae"))
    method.tokenizer.fit([images])
    pictures.save_reconstruction(method.tokenizer, images[:3], tmp_path / "pairs.png")
    pixels = np.asarray(Image.open(tmp_path / "pairs.png")).astype(int)
    clean, reconstructed = (pixels[row + 2 : row + 66 : 2, 2:66:2] for row in (0, 66))
    assert abs(clean.transpose(2, 0, 1) - images[0].numpy()).max() <= 1
    assert abs(reconstructed - clean).max() <= 1  # this tokenizer keeps all pixels


def test_a_picture_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        pictures.save_grid([torch.rand(2, 3, 8, 8)], tmp_path / "file" / "picture.png")


def test_heat_maps_share_one_colour_scale(tmp_path):
    """The darkest cell is the largest number of all maps, the lightest the smallest."""
    first = heat_maps.HeatMap("a", ["t = 0"], ["1", "2"], "blocks", [[50.0, 10.0]], framed=(0, 0))
    second = heat_maps.HeatMap("b", ["t = 0"], ["1"], "blocks", [[90.0]])
    heat_maps.save_heat_maps([first, second], tmp_path / "maps.png")
    pixels = np.asarray(Image.open(tmp_path / "maps.png")).reshape(-1, 3)
    low, high = (np.array(colour) for colour in heat_maps._COLOURS)
    shares = {
        share: tuple(np.rint(low + share * (high - low)).astype(int)) for share in (0, 0.5, 1)
    }
    counts = {share: (pixels == colour).all(1).sum() for share, colour in shares.items()}
    cell = heat_maps._CELL[0] * heat_maps._CELL[1]
    assert all(0.5 * cell < count < cell for count in counts.values()), counts
