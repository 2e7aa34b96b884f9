"""The head on token maps is BatchNorm and a 1x1 convolution; image and label map stay aligned."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ldae.backbones.preprocessing import EvalTransform
from ldae.commands.segment import SegmentProtocol
from ldae.evals import segmentation
from ldae.evals.segmentation import ResizeNearest, TokenMaps, _batches, predict, train_map_head

CPU = torch.device("cpu")
SHORT = SegmentProtocol(steps=7, total_batch=4, learning_rate=0.05, warmup=0.3)
RNG = np.random.default_rng(0)


def token_maps(images: int = 10, classes: int = 3) -> TokenMaps:
    generator = torch.Generator().manual_seed(0)
    tokens = 2 + torch.randn(images, 2 * 3 * 5, generator=generator)
    labels = torch.randint(classes + 1, (images, 8 * 9), generator=generator).byte()
    return TokenMaps(tokens, labels.masked_fill_(labels == classes, 255), (2, 3, 5), (8, 9))


def slow_head(train: TokenMaps, classes: int, protocol: SegmentProtocol) -> nn.Sequential:
    """Train the head by PyTorch's layers, optimizer and mean over the pixels."""
    start = train_map_head(train, 10, classes, replace(protocol, learning_rate=1e-30), CPU)
    norm, conv = nn.BatchNorm2d(5, affine=False), nn.Conv2d(5, classes, 1)
    with torch.no_grad():
        conv.weight.copy_(start.weight[0, :, :, None, None])
        conv.bias.zero_()
    optimizer = torch.optim.AdamW(conv.parameters(), weight_decay=protocol.weight_decay)
    for step, batch in zip(range(protocol.steps), _batches(10, protocol)):
        warmup, rate = round(0.3 * protocol.steps), protocol.learning_rate
        share = (step - warmup) / (protocol.steps - warmup)
        rate *= step / warmup if step < warmup else (1 + math.cos(math.pi * share)) / 2
        optimizer.param_groups[0]["lr"] = rate
        grid = train.tokens[batch].view(-1, 2, 3, 5).permute(0, 3, 1, 2)
        logits = F.interpolate(conv(norm(grid)), (8, 9), mode="bilinear")
        labels = train.labels[batch].view(-1, 8, 9).long()
        optimizer.zero_grad()
        F.cross_entropy(logits, labels, ignore_index=255).backward()
        optimizer.step()
    return nn.Sequential(norm, conv)


@pytest.mark.parametrize("numbers", [1, 2**25])
def test_head_equals_pytorchs_in_pieces_and_at_once(numbers, monkeypatch):
    monkeypatch.setattr(segmentation, "_LOGITS_AT_ONCE", numbers)
    train = token_maps()
    found, (norm, conv) = train_map_head(train, 10, 3, SHORT, CPU), slow_head(train, 3, SHORT)
    assert conv.weight.abs().max() > 0.05  # the head has learned
    torch.testing.assert_close(found.weight[0], conv.weight[:, :, 0, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias[0], conv.bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm.running_mean, norm.running_mean)
    torch.testing.assert_close(found.norm.running_var, norm.running_var)


def test_nothing_is_learned_from_ignored_pixels():
    train = token_maps()
    unknown = train._replace(labels=torch.full_like(train.labels, 255))
    still = replace(SHORT, weight_decay=0.0)
    start = train_map_head(train, 10, 3, replace(still, learning_rate=1e-30), CPU)
    assert torch.equal(train_map_head(unknown, 10, 3, still, CPU).weight, start.weight)


def test_prediction_in_pieces_equals_prediction_at_once(monkeypatch):
    logits = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0))
    logits[5] = logits[2]  # equal logits: the smaller class
    expected = F.interpolate(logits[None], (13, 11), mode="bilinear")[0].argmax(0)
    assert 2 in expected and 5 not in expected
    for numbers in (1, 2 * 13 * 11, 2**25):
        monkeypatch.setattr(segmentation, "_LOGITS_AT_ONCE", numbers)
        assert torch.equal(predict(logits, (13, 11)), expected)


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (61, 47)])
def test_an_image_stays_aligned_with_its_label_map(size):
    """Images of another shape than the input, resized by two libraries, stay aligned."""
    coarse = RNG.integers(0, 5, (8, 8))
    rows, columns = (np.arange(side) * 8 // side for side in size)
    labels = coarse[rows][:, columns].astype(np.uint8)
    transform = EvalTransform((3, 32, 32), "bicubic", 1.0, "squash", (0.5,) * 3, (0.5,) * 3)
    image = transform(Image.fromarray(labels * 50).convert("RGB"), RNG)[0].numpy() / 50
    nearest = ResizeNearest((32, 32))(labels, RNG).view(32, 32).numpy()

    def agreement(down: int, right: int) -> float:
        moved = np.roll(nearest, (down, right), (0, 1))
        return (np.rint(image) == moved)[2:-2, 2:-2].mean()

    shifts = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    assert agreement(0, 0) > 0.7 and agreement(0, 0) > 0.1 + max(agreement(*s) for s in shifts)
