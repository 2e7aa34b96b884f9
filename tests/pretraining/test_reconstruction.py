import math

import pytest
import torch

from ldae.pretraining.reconstruction import measure_reconstruction
from ldae.tokenizers import ConvTokenizer, PatchPCA, PixelTokenizer


class Darkest:
    """A distance whose values are easy to tell."""

    name = "darkest"

    def __call__(self, one, other):
        return (one - other).abs().amax((1, 2, 3))


def pca(images, kind=PatchPCA, dim=6):
    tokenizer = kind(32, 8, 3, dim, "per-axis")
    tokenizer.fit([images])
    return tokenizer


def test_it_is_the_mean_over_images_one_at_a_time(images):
    tokenizer = pca(images)
    actual = measure_reconstruction(tokenizer, images.split([3, 1, 4]), [Darkest()])
    psnr = darkest = 0.0
    for image in images[:, None]:
        made = tokenizer.denormalize(tokenizer.decode(tokenizer.encode(tokenizer.normalize(image))))
        error = made.clamp(0, 1).double() - image.double() / 255
        psnr += 10 * math.log10(1 / error.square().mean().item()) / 8
        darkest += error.abs().max().item() / 8
    assert actual == {
        "psnr": pytest.approx(psnr, abs=1e-3),
        "darkest": pytest.approx(darkest, rel=1e-4),
        "images": 8,
    }


def test_a_perfect_tokenizer_is_finite(images):
    assert 90 < measure_reconstruction(pca(images, PixelTokenizer, 192), [images])["psnr"] <= 100


def test_the_use_of_a_codebook_is_counted(images, monkeypatch):
    tokenizer = ConvTokenizer(32, 8, 3, 8, "raw", 8, codes=5)
    expected = torch.tensor([[0, 0, 1, 3]] * 8)  # shares 1/2, 1/4 and 1/4 of five codes
    monkeypatch.setattr(tokenizer, "code_indices", lambda x: expected[: len(x)])
    actual = measure_reconstruction(tokenizer, images.split(3))
    assert actual["codes_used"] == pytest.approx(3 / 5)
    assert actual["code_perplexity"] == pytest.approx(2**1.5)


def test_ranks_share_the_sums(images, monkeypatch):
    """Each rank sees its images; what is summed over ranks is all that the means are made of."""
    tokenizer = pca(images)
    whole = measure_reconstruction(tokenizer, [images])
    seen = []
    monkeypatch.setattr(
        "ldae.pretraining.reconstruction.all_reduce_sum",
        lambda sums: seen.append(sums.clone()) or sums,
    )
    for part in images.split(4):
        measure_reconstruction(tokenizer, [part])
    count, psnr = sum(seen)
    assert (psnr / count).item() == pytest.approx(whole["psnr"], rel=1e-6)
