import math

import pytest
import torch

from ldae.pretraining.reconstruction import measure_reconstruction
from ldae.tokenizers import ConvTokenizer, PatchPCA, PixelTokenizer


class LargestError:
    """A distance that is easy to check: the largest absolute error of a pixel."""

    name = "largest_error"

    def __call__(self, x, y):
        return (x - y).abs().amax((1, 2, 3))


def pca(images, kind=PatchPCA, dim=6):
    tokenizer = kind(32, 8, 3, dim, "per-axis")
    tokenizer.fit([images])
    return tokenizer


def test_errors_are_means_over_single_images(images):
    tokenizer = pca(images)
    actual = measure_reconstruction(tokenizer, images.split([3, 1, 4]), [LargestError()])
    psnr = largest_error = 0.0
    for image in images[:, None]:
        latents = tokenizer.encode(tokenizer.normalize(image))
        decoded = tokenizer.denormalize(tokenizer.decode(latents))
        error = decoded.clamp(0, 1).double() - image.double() / 255
        psnr += 10 * math.log10(1 / error.square().mean().item()) / 8
        largest_error += error.abs().max().item() / 8
    assert actual == {
        "psnr": pytest.approx(psnr, abs=1e-3),
        "largest_error": pytest.approx(largest_error, rel=1e-4),
        "images": 8,
    }


def test_psnr_of_a_perfect_tokenizer_is_finite(images):
    assert 90 < measure_reconstruction(pca(images, PixelTokenizer, 192), [images])["psnr"] <= 100


def test_use_of_the_codebook_is_counted(images, monkeypatch):
    tokenizer = ConvTokenizer(32, 8, 3, 8, "raw", 8, codes=5)
    indices = torch.tensor([[0, 0, 1, 3]] * 8)  # shares 1/2, 1/4 and 1/4 of five codes
    monkeypatch.setattr(tokenizer, "code_indices", lambda x: indices[: len(x)])
    actual = measure_reconstruction(tokenizer, images.split(3))
    assert actual["codes_used"] == pytest.approx(3 / 5)
    assert actual["code_perplexity"] == pytest.approx(2**1.5)


def test_sums_over_ranks_give_the_mean_of_all_images(images, monkeypatch):
    """The means follow from the sums that are reduced over ranks, and from nothing else."""
    tokenizer = pca(images)
    expected = measure_reconstruction(tokenizer, [images])
    sums_of_ranks = []
    monkeypatch.setattr(
        "ldae.pretraining.reconstruction.all_reduce_sum",
        lambda sums: sums_of_ranks.append(sums.clone()) or sums,
    )
    for part in images.split(4):
        measure_reconstruction(tokenizer, [part])
    count, psnr = sum(sums_of_ranks)
    assert (psnr / count).item() == pytest.approx(expected["psnr"], rel=1e-6)
