"""A folder appears only if timm reads back the model that was written."""

import pytest
import timm
import torch

from ldae.backbones.open import adapt_cfg
from ldae.backbones.timm_folder import write_timm_folder
from ldae.errors import InputError


def test_a_folder_that_timm_reads_as_another_network_does_not_appear(tmp_path):
    torch.manual_seed(0)
    args = {"img_size": 16, "num_classes": 2}
    model = timm.create_model("test_vit", **args).eval()
    adapt_cfg(model, 3, 16)
    write_timm_folder(tmp_path / "same", model, args)
    opened = timm.create_model(f"local-dir:{tmp_path / 'same'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(opened(images), model(images))
    model.blocks[0].mlp.act = torch.nn.ReLU()  # neither the weights nor the arguments have it
    with pytest.raises(InputError, match="other is not written: timm reads back another network"):
        write_timm_folder(tmp_path / "other", model, args)
    assert [path.name for path in tmp_path.iterdir()] == ["same"]
