import pytest

from ldae.detection import recipes
from ldae.train.optim import peak_lr

# The published constants of ViTDet, written a second time by hand: epochs, layer decay, drop path.
PUBLISHED = {"B": (100, 0.7, 0.1), "L": (100, 0.8, 0.4), "H": (75, 0.9, 0.5)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_vitdet_has_the_published_constants(size):
    config = recipes.RECIPES.config("vitdet", size)
    model, optim = config.model, config.optim
    assert (optim.epochs, model.layer_decay, model.drop_path) == PUBLISHED[size]
    assert peak_lr(optim) == pytest.approx(1e-4) and optim.weight_decay == 0.1
    assert (optim.batch_size, optim.betas) == (64, (0.9, 0.999))
    assert config.augment.scale == (0.1, 2.0) and config.augment.flip == 0.5
    assert (model.dim, model.rpn_convs, model.box_convs, model.box_dim) == (256, 2, 4, 1024)
