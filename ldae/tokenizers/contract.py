"""What every tokenizer is, and what those share that cut an image into patches."""

import inspect
from collections.abc import Iterable

import torch
from torch import nn

from ldae.errors import InputError
from ldae.patches import patchify, unpatchify
from ldae.tokenizers.moments import Moments


class Tokenizer(nn.Module):
    """All that lies between uint8 images (B, C, H, W) and latents (B, N, dim).

    The pixels' mean and standard deviation and the latent scale live here and nowhere else. A
    subclass gives ``encode`` and ``decode``, and ``fit``; one that is trained by gradients gives
    ``reconstruct`` and ``fit_latents`` instead of ``fit``, and ``trained`` is true.

    Args:
        scale: ``raw``, latents as they are; ``global``, one factor to unit mean variance;
            ``per-axis``, unit variance on every axis.

    Raises: InputError when ``patch_size`` does not divide ``img_size``.
    """

    trained = False
    stochastic = False
    """Whether ``encode`` has a posterior to draw from."""
    loss_weights: tuple[str, ...] = ()
    """The settings that weigh a term of the loss beside the reconstruction."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, dim: int, scale: str) -> None:
        super().__init__()
        if img_size % patch_size:
            raise InputError(
                f"data.img_size {img_size} is not a multiple of model.patch_size {patch_size}"
            )
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.dim, self.patch_dim, self.scale = dim, in_chans * patch_size**2, scale
        self.register_buffer("pixel_mean", torch.zeros(in_chans))
        self.register_buffer("pixel_std", torch.ones(in_chans))
        self.register_buffer("scales", torch.ones(dim))

    @property
    def tokens(self) -> int:
        """N."""
        return (self.img_size // self.patch_size) ** 2

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 pixels to zero mean and unit variance a channel."""
        mean, std = self.pixel_mean[:, None, None], self.pixel_std[:, None, None]
        return (images.to(mean.dtype) / 255 - mean) / std

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images back to [0, 1], unclamped."""
        return images * self.pixel_std[:, None, None] + self.pixel_mean[:, None, None]

    def encode(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised images to latents (B, N, dim).

        ``eps`` of that shape, standard normal, draws from the posterior where there is one;
        without it the latents are its mean.
        """
        raise NotImplementedError

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to normalised images."""
        raise NotImplementedError

    @classmethod
    def settings(cls) -> set[str]:
        """Return the names of the settings that such a tokenizer reads."""
        return {*inspect.signature(cls).parameters, *cls.loss_weights}

    def fit(
        self,
        images: Iterable[torch.Tensor],
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
    ) -> None:
        """Choose all statistics from uint8 images (B, C, H, W).

        ``images`` can be iterated as often as the fit needs, and every pass gives the same batches
        in the same order. Each rank passes its own share of the images, and all ranks get the same
        tokenizer. Pixel statistics that are given are kept; otherwise they are the data's.

        Raises: InputError when there are no images, or a channel never changes.
        """
        raise NotImplementedError

    def summary(self) -> str:
        """Return what is worth reporting of a fit, in a few words; "" when there is nothing."""
        return ""

    @torch.no_grad()
    def fit_pixels(self, images: Iterable[torch.Tensor]) -> None:
        """Choose the pixel statistics in one pass over uint8 images, each rank over its share.

        Raises: InputError when there are no images, or a channel never changes.
        """
        moments = Moments(self.in_chans, self.pixel_mean.device)
        for batch in images:
            pixels = batch.to(self.pixel_mean.device, torch.float32) - 128
            moments.update(pixels.movedim(1, -1).flatten(0, -2))
        moments.all_reduce()
        check_any(moments)
        variance = moments.covariance().diagonal().clamp(min=0)
        self.set_pixels((moments.mean() + 128) / 255, variance.sqrt() / 255)

    def set_pixels(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Raises: InputError when a channel never changes."""
        for channel in (std <= 1e-6).nonzero()[:1, 0].tolist():
            raise InputError(
                f"channel {channel} is the same in every pixel of the tokenizer's images; there is "
                "nothing to learn from it (data.in_chans)"
            )
        self.pixel_mean.copy_(mean)
        self.pixel_std.copy_(std)


class PatchTokenizer(Tokenizer):
    """One affine map for every patch of an image, on its D = in_chans * patch_size^2 numbers.

    ``project`` and ``inverse`` are what the export folds into a convolution, and what lets a
    network see and predict images instead of latents.
    """

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches (..., D) to latents (..., dim), the posterior's mean where there is one."""
        raise NotImplementedError

    def inverse(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (..., dim) to the patches (..., D) that they stand for."""
        raise NotImplementedError

    def encode(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        return self.project(patchify(images, self.patch_size))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return unpatchify(self.inverse(latents), self.patch_size, self.in_chans)


def latent_scales(scale: str, variances: torch.Tensor, unit: float = 1.0) -> torch.Tensor:
    """The factors (dim,) that make latents of these variances what ``scale`` says.

    ``unit`` is the factor of ``raw``.
    """
    if scale == "raw":
        return torch.full_like(variances, unit)
    if scale == "global":
        return torch.full_like(variances, 1) / variances.mean().sqrt()
    # An axis without variance carries nothing: dividing by its rounding error would make noise.
    floor = variances.max() * 1e-8
    return variances.clamp(min=float(floor)).rsqrt()


def check_any(moments: Moments) -> None:
    """Raises: InputError when nothing was counted."""
    if not moments.count:
        raise InputError("the tokenizer was given no image to fit on")
