"""Features belong to images: not to batches, orders or ranks."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from ldae.backbone import load_backbone
from ldae.data.sources import open_source
from ldae.errors import InputError
from ldae.evals.features import extract
from ldae.preprocessing import preprocessing

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vit():
    return load_backbone("test_vit", random_init=True, img_size=16)


def test_features_are_the_backbones_in_the_order_of_the_source(vit, pictures):
    source = pictures(5)
    found = extract(vit, source, device=CPU, batch_size=5)
    transform = preprocessing(vit)
    pixels = torch.stack([transform(source.image(i), np.random.default_rng(0)) for i in range(5)])
    with torch.inference_mode():
        assert torch.equal(found.features, vit(transform.normalise(pixels)))
    assert found.labels.tolist() == source.labels.tolist()
    assert found.names == [source.name(i) for i in range(5)]
    assert found.features.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batch_size_does_not_matter(vit, pictures, batch_size):
    source = pictures(11)
    reference = extract(vit, source, device=CPU, batch_size=11).features
    found = extract(vit, source, device=CPU, batch_size=batch_size).features
    assert (found - reference).norm() < 1e-5 * reference.norm()


def test_low_precision_is_close_and_not_equal(vit, pictures):
    exact, rounded = (
        extract(vit, pictures(4), device=CPU, precision=precision).features
        for precision in ("fp32", "bf16")
    )
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


def test_unlabelled_source_is_told(vit, pictures):
    source = pictures(3)
    source.labels = None
    with pytest.raises(InputError, match=r"pictures \(train\) has no labels"):
        extract(vit, source, device=CPU)


def test_first_image_with_features_that_are_not_finite_is_named(pictures):
    class Fragile(torch.nn.Flatten):
        def forward(self, x):
            return super().forward(torch.where(x == 1, torch.nan, x))  # 1 is a white pixel

    model = Fragile()
    model.pretrained_cfg = load_backbone("pixels:16").pretrained_cfg
    source = pictures(6, classes=1)
    source.pixels[[2, 4], 0, 0] = 255
    with pytest.raises(InputError, match="train/2.png in fp32 are not finite"):
        extract(model, source, device=CPU, batch_size=2)


def test_map_is_refused(pictures):
    model = load_backbone("test_resnet", random_init=True, img_size=64)
    model.reset_classifier(0, "")
    with pytest.raises(InputError, match=r"test_resnet gives a map of shape \(96, 2, 2\)"):
        extract(model, pictures(3), device=CPU)


SCRIPT = """
import sys, torch
from ldae.backbone import load_backbone
from ldae.data.sources import open_source
from ldae.distributed import process_group
from ldae.evals.features import extract
cpu = torch.device("cpu")
with process_group(cpu):
    source = open_source(sys.argv[1], "train")
    found = extract(load_backbone("pixels:16"), source, device=cpu, batch_size=3)
torch.save(tuple(found), sys.argv[2])
"""


def test_two_ranks_find_what_one_finds(pictures, tmp_path):
    """13 images over two ranks in batches of 3: neither the ranks nor the batches come out even."""
    made = pictures(13)
    for i in range(13):
        path = tmp_path / "images" / made.classes[made.labels[i]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        made.image(i).save(path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "images"), str(tmp_path / str(rank))],
            env=os.environ | launch | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    source = open_source(str(tmp_path / "images"), "train")
    alone = extract(load_backbone("pixels:16"), source, device=CPU, batch_size=13)
    for rank in range(2):
        features, labels, names = torch.load(tmp_path / str(rank))
        assert torch.equal(features, alone.features)
        assert torch.equal(labels, alone.labels)
        assert names == alone.names
