import timm.layers
import torch
from torch import nn

from ldae.models.drop_path import DropPath, set_drop_path


def test_a_share_of_the_samples_is_left_out_and_the_mean_stays():
    layer, x = DropPath(0.25).train(), torch.ones(40_000, 2, 1)
    torch.manual_seed(0)
    found = layer(x)
    assert torch.equal(found[:, 0], found[:, 1])  # a sample as a whole
    assert set(found.unique().tolist()) == {0, torch.tensor(1 / 0.75).item()}
    assert abs(found.mean() - 1) < 0.01  # its standard error is 0.003
    assert layer.eval()(x) is x and not layer.state_dict()


def test_it_takes_the_place_of_those_of_timm():
    model = nn.Sequential(nn.Sequential(timm.layers.DropPath(0.3), nn.Identity()))
    set_drop_path(model)
    (layer, other) = model[0]
    assert isinstance(layer, DropPath) and layer.rate == 0.3 and isinstance(other, nn.Identity)
