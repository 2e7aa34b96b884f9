"""Fixtures of the tests of commands: a small backbone, and the file and setup of a suite."""

import pytest
import timm
import torch

from ldae.backbones.timm_folder import write_timm_folder
from ldae.evals.evaluation import Setup

SHAPE = dict(
    img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, class_token=False,
    global_pool="avg", final_norm=False, fc_norm=False, num_classes=0,
)  # fmt: skip


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A backbone of random weights in the format of `ldae export`."""
    out = tmp_path_factory.mktemp("backbone") / "vit"
    torch.manual_seed(9)
    cfg = dict(
        input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.3, 0.3, 0.3), crop_pct=1.0,
        num_classes=0, classifier="head", first_conv="patch_embed.proj",
    )  # fmt: skip
    vit = timm.create_model("vit_tiny_patch16_224", pretrained_cfg=cfg, **SHAPE).eval()
    write_timm_folder(out, vit, SHAPE)
    return str(out)


@pytest.fixture
def suite(request, tmp_path):
    """The file of the suite that the module of the test has as ``SUITE``."""
    path = tmp_path / "suite.toml"
    path.write_text(request.module.SUITE)
    return path


@pytest.fixture
def setup(tmp_path):
    return Setup(in_chans=1, workers=0, device="cpu", out=tmp_path / "out")
