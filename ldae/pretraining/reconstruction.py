"""Reconstruction quality of a tokenizer: PSNR, perceptual distances and codebook use."""

from collections.abc import Iterable, Sequence

import torch

from ldae.distributed import all_reduce_sum
from ldae.pretraining.perceptual import PerceptualDistance
from ldae.tokenizers import Tokenizer

_MIN_ERROR = 1e-10  # 100 dB; smaller errors are rounding, and the PSNR stays finite


def psnr_of(error: torch.Tensor) -> torch.Tensor:
    """Return the PSNR in dB, at most 100, of mean squared errors of pixels in [0, 1]."""
    return -10 * error.clamp(min=_MIN_ERROR).log10()


@torch.no_grad()
def measure_reconstruction(
    tokenizer: Tokenizer,
    images: Iterable[torch.Tensor],
    distances: Sequence[PerceptualDistance] = (),
) -> dict[str, float]:
    """Reconstruct uint8 images (B, C, H, W) and measure the errors, averaged over all images.

    Each rank passes its share of the images. Latents are the means of the posterior.

    Returns: ``psnr`` in dB, at most 100, of pixels in [0, 1]; each distance under its name; and
        ``images``, their number. For a quantised tokenizer also ``codes_used``, the share of codes
        that occur, and ``code_perplexity``, the exponential of their entropy.
    """
    device = tokenizer.scales.device
    sums = torch.zeros(2 + len(distances), dtype=torch.float64, device=device)
    quantised = getattr(tokenizer, "quantised", False)
    codes = torch.zeros(tokenizer.codes if quantised else 0, dtype=torch.float64, device=device)
    for batch in images:
        x = tokenizer.normalize(batch.to(device))
        original = tokenizer.denormalize(x)
        decoded = tokenizer.denormalize(tokenizer.decode(tokenizer.encode(x))).clamp(0, 1)
        error = (decoded - original).square().flatten(1).mean(1)
        values = [psnr_of(error), *(distance(decoded, original) for distance in distances)]
        sums += torch.stack([error.new_tensor(len(x)), *(value.sum() for value in values)])
        if quantised:
            codes += tokenizer.code_indices(x).flatten().bincount(minlength=len(codes))
    count, *totals = all_reduce_sum(sums).tolist()
    names = ["psnr", *(distance.name for distance in distances)]
    result = {name: total / count for name, total in zip(names, totals, strict=True)}
    if quantised:
        share = all_reduce_sum(codes) / codes.sum()
        result["codes_used"] = (share > 0).double().mean().item()
        result["code_perplexity"] = torch.special.entr(share).sum().exp().item()
    return result | {"images": int(count)}
