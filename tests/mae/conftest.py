"""Fixtures of the tests of MAE: small settings, networks and published files."""

import pytest
import torch
from conftest import TINY
from mae_layout import SIZES, published_state

from ldae.mae.network import MAE, build
from ldae.mae.recipes import config
from ldae.mae.settings import MAEConfig
from ldae.tree import flatten, replace


@pytest.fixture
def tiny_mae():
    """tiny_mae(**changes): settings small enough to train in a second; a__b stands for a.b."""

    def make(**changes) -> MAEConfig:
        own = flatten(MAEConfig())
        shared = {name: value for name, value in TINY.items() if name in own}
        given = {name.replace("__", "."): value for name, value in changes.items()}
        return replace(config(), shared | SIZES | {"data.stats": "auto"} | given)

    return make


@pytest.fixture
def mae(tiny_mae, awake, images):
    """mae(**changes): a network with random weights and the statistics of the images."""

    def make(**changes) -> MAE:
        network = build(tiny_mae(**changes))
        positions = network.encoder.pos_embed.clone()
        awake(network)
        with torch.no_grad():
            network.encoder.pos_embed.copy_(positions)
        network.pixels.fit_pixels([images])
        return network.eval()

    return make


@pytest.fixture
def published(tmp_path):
    """published(decoder, width, depth): NAME@FILE of a checkpoint in the published layout."""

    def make(decoder: bool = True, **sizes: int) -> str:
        file = tmp_path / f"mae-{len(list(tmp_path.iterdir()))}.pth"
        torch.save({"model": published_state(decoder, **sizes)}, file)
        return f"test_vit@{file}"

    return make
