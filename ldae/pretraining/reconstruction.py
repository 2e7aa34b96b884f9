"""How well a tokenizer gives images back: PSNR, perceptual distances, the use of its codebook."""

from collections.abc import Iterable, Sequence

import torch

from ldae.backbones.perceptual import PerceptualDistance
from ldae.distributed import all_reduce_sum
from ldae.tokenizers import Tokenizer

_SMALLEST_ERROR = 1e-10  # 100 dB: what is beyond is rounding, and a perfect image is not infinite


@torch.no_grad()
def measure_reconstruction(
    tokenizer: Tokenizer,
    images: Iterable[torch.Tensor],
    distances: Sequence[PerceptualDistance] = (),
) -> dict[str, float]:
    """Means over uint8 images (B, C, H, W), each rank over its share.

    ``psnr`` in dB, of pixels in [0, 1], at most 100; each distance under its name; of a quantised
    tokenizer ``codes_used``, the share of its codes that occur, and ``code_perplexity``, exp of
    their entropy; ``images``, how many there were. Latents are the posterior's means.
    """
    device = tokenizer.scales.device
    sums = torch.zeros(2 + len(distances), dtype=torch.float64, device=device)
    quantised = getattr(tokenizer, "quantised", False)
    codes = torch.zeros(tokenizer.codes if quantised else 0, dtype=torch.float64, device=device)
    for batch in images:
        x = tokenizer.normalize(batch.to(device))
        made = tokenizer.denormalize(tokenizer.decode(tokenizer.encode(x))).clamp(0, 1)
        clean = tokenizer.denormalize(x)
        error = (made - clean).square().flatten(1).mean(1).clamp(min=_SMALLEST_ERROR)
        found = [-10 * error.log10(), *(distance(made, clean) for distance in distances)]
        sums += torch.stack([error.new_tensor(len(x)), *(part.sum() for part in found)])
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
