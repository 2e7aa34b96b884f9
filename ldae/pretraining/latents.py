"""Latents that are encoded once for all epochs: how they are computed, and who may use them."""

from pathlib import Path

import numpy as np
import torch

from ldae import files
from ldae.data.cache_file import Content, open_cache
from ldae.data.cached import CachedLatents
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.errors import InputError
from ldae.precision import float32_products
from ldae.settings import Config
from ldae.tokenizers import ConvTokenizer, Tokenizer, check_kind

_AT_ONCE = 8  # images; one of 256 x 256 takes 34 MB in each activation of full resolution


class LatentEncoder:
    """The encoder of a fitted tokenizer on a device, in float32.

    Latents are in the tokenizer's units, in which they have mean 0 and about unit deviation, unless
    tokenizer.scale is raw. Float16 rounds a number by at most 2^-11 of itself, so up to four
    deviations the error is below a thousandth of the deviation.

    Raises: InputError for a tokenizer other than conv_vae. The others are fast without a cache.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        check_kind(ConvTokenizer, tokenizer, "a cache of latents")
        self.tokenizer, self.device = tokenizer.to(device).eval(), device

    @property
    def crop(self) -> CropTransform:
        """The crops that the tokenizer takes."""
        return CropTransform(self.tokenizer.img_size, self.tokenizer.in_chans)

    def content(self, resized_twice: bool) -> Content:
        """Return the content of a cache of the latents of images, or of crops of a cache."""
        tokenizer = self.tokenizer
        shape = (1 + tokenizer.stochastic, tokenizer.num_tokens, tokenizer.dim)
        facts = {
            "tokenizer": files.state_hash(tokenizer.state_dict()),
            "img_size": tokenizer.img_size,
            "computed in": "float32",
            "resized_twice": resized_twice,
        }
        return Content("latents", np.float16, shape, facts)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> np.ndarray:
        """Return the posteriors of uint8 images (B, C, H, W), float16 (B, 1 or 2, N, dim).

        Raises: InputError when float16 cannot hold them.
        """
        with float32_products():
            parts = [
                self.tokenizer.encode_posterior(self.tokenizer.normalize(part.to(self.device)))
                for part in images.split(_AT_ONCE)
            ]
        latents = torch.cat([part.stack().half().cpu() for part in parts])
        if not latents.isfinite().all():
            raise InputError(
                "float16 cannot hold the latents of this tokenizer: fit it with tokenizer.scale "
                "global, and see whether its training diverged"
            )
        return latents.numpy()


def open_latents(config: Config, tokenizer: Tokenizer, source: Source) -> CachedLatents:
    """Open the latents that replace the images of ``source`` in a pre-training.

    Args:
        tokenizer: the tokenizer of the run, which came from tokenizer.path.

    Raises: InputError when the settings need images, or the latents are of another tokenizer or of
        other images.
    """
    data = config.data
    check_kind(ConvTokenizer, tokenizer, "data.latents")
    if not config.tokenizer.path:
        raise InputError("data.latents needs tokenizer.path, the tokenizer that encoded them")
    if data.crop != "center" or data.flip:
        setting = "data.flip" if data.flip else f"data.crop {data.crop}"
        raise InputError(f"{setting} needs images, but data.latents are of center crops")
    file = open_cache(Path(data.latents).expanduser())
    latents = CachedLatents(source.spec, next(iter(file.splits)), file)
    if latents.facts["img_size"] != data.img_size:
        raise InputError(
            f"{data.latents} has latents for data.img_size {latents.facts['img_size']}, not "
            f"{data.img_size}"
        )
    if latents.latents_of != files.state_hash(tokenizer.state_dict()):
        raise InputError(
            f"{data.latents} has latents of another tokenizer than that of the run, from "
            f"{config.tokenizer.path}"
        )
    if latents.fingerprint() != source.fingerprint():
        raise InputError(f"{data.latents} has latents of other images than {source.spec} has now")
    return latents
