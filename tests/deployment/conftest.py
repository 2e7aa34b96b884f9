"""Networks of all kinds that are exported, as timm folders."""

import pytest
import timm
import torch

from ldae.backbones.open import adapt_cfg
from ldae.backbones.timm_folder import write_timm_folder

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def network(tmp_path):
    """network(name, classes, **args): the folder of a timm model with random weights."""

    def make(name: str, num_classes: int = 0, classes: list[str] | None = None, **args) -> str:
        torch.manual_seed(5)
        model = timm.create_model(name, num_classes=num_classes, **args).eval()
        for parameter in model.parameters():  # no gate, such as of LayerScale, hides a block
            parameter.data += 0.05 * torch.randn_like(parameter)
        folder = tmp_path / name
        args |= {"num_classes": num_classes}
        adapt_cfg(model, 3, args.get("img_size"))
        write_timm_folder(folder, model, args, classes=classes)
        return str(folder)

    return make


@pytest.fixture
def kinds(network, run, tmp_path):
    """kinds(kind): what is exported, and the arguments of its export."""

    def make(kind: str) -> tuple[str, dict]:
        whiten = {"whiten": "scattered-digits:64", "whiten_shrinkage": 0.01, "workers": 0}
        return {
            "ours": lambda: (str(run()), {}),
            "whitened": lambda: (str(run()), whiten),
            "classifier": lambda: (network("test_vit2", 7, list("abcdefg"), img_size=32), {}),
            "convolutions": lambda: (network("test_resnet"), {}),
            "registers": lambda: (
                network("vit_small_patch14_reg4_dinov2", img_size=56, **SMALL),
                {},
            ),
        }[kind]()

    return make
