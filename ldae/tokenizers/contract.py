"""The base classes of all tokenizers and of the patch-wise ones."""

import inspect
from collections.abc import Iterable

import torch
from torch import nn

from ldae.errors import InputError
from ldae.patches import patchify, unpatchify
from ldae.tokenizers.moments import Moments


class Tokenizer(nn.Module):
    """The map from uint8 images (B, C, H, W) to latents (B, N, dim) and back.

    The mean and standard deviation of the pixels and the latent scale are kept in the tokenizer
    only; ``encode`` and ``decode`` apply the scale. A subclass defines ``encode``, ``decode`` and
    ``fit``. A tokenizer that gradients train sets
    ``trained``, and defines ``reconstruct`` and ``fit_latents`` instead of ``fit``.

    Args:
        scale: ``raw`` leaves latents as they are, ``global`` gives them unit mean variance by one
            factor, ``per-axis`` gives every axis unit variance. ``auto`` is the class's
            ``auto_scale``, and the attribute ``scale`` then has that name.

    Raises: InputError when ``patch_size`` does not divide ``img_size``.
    """

    auto_scale = "per-axis"  # benchmarks/results/cifar10-latents
    """The scale that ``auto`` means."""
    raw_scale = 1.0
    """The factor of latents when ``scale`` is ``raw``."""
    trained = False
    """Whether gradients train the tokenizer."""
    stochastic = False
    """Whether ``encode`` can sample from a posterior."""
    loss_weights: tuple[str, ...] = ()
    """Names of the settings that weigh the terms of the loss beside the reconstruction term."""

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor
    scales: torch.Tensor

    def __init__(self, img_size: int, patch_size: int, in_chans: int, dim: int, scale: str) -> None:
        super().__init__()
        if img_size % patch_size:
            raise InputError(
                f"data.img_size {img_size} is not a multiple of model.patch_size {patch_size}"
            )
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.dim, self.patch_dim = dim, in_chans * patch_size**2
        self.scale = self.auto_scale if scale == "auto" else scale
        self.register_buffer("pixel_mean", torch.zeros(in_chans))
        self.register_buffer("pixel_std", torch.ones(in_chans))
        self.register_buffer("scales", torch.ones(dim))

    @property
    def num_tokens(self) -> int:
        """The number N of tokens of an image."""
        return (self.img_size // self.patch_size) ** 2

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Convert uint8 images to float, each channel with zero mean and unit variance."""
        mean, std = self.pixel_mean[:, None, None], self.pixel_std[:, None, None]
        return (images.to(mean.dtype) / 255 - mean) / std

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """Convert normalised images back to [0, 1], without clamping."""
        return images * self.pixel_std[:, None, None] + self.pixel_mean[:, None, None]

    def encode(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """Encode normalised images (B, C, H, W) as latents (B, N, dim).

        With standard normal ``eps`` (B, N, dim), latents are sampled from the posterior, if the
        tokenizer has one. Without ``eps`` they are the posterior's mean.
        """
        raise NotImplementedError

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, N, dim) to normalised images (B, C, H, W)."""
        raise NotImplementedError

    @classmethod
    def settings(cls) -> set[str]:
        """Return the names of the settings that the tokenizer reads."""
        return {*inspect.signature(cls).parameters, *cls.loss_weights}

    def fit(
        self,
        images: Iterable[torch.Tensor],
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
    ) -> None:
        """Set all statistics from uint8 images (B, C, H, W).

        Each rank passes its own share of the images, and all ranks get the same tokenizer.

        Args:
            images: can be iterated as often as the fit needs; every pass gives the same batches in
                the same order.
            mean: mean of the pixels of each channel, in [0, 1]; empty: the mean of the images.
            std: standard deviation of the pixels of each channel; empty: it is measured.

        Raises: InputError when there are no images, or when a channel is constant.
        """
        raise NotImplementedError

    def summary(self) -> str:
        """Return a short report of the fit, or "" when there is nothing to report."""
        return ""

    @torch.no_grad()
    def fit_pixels(self, images: Iterable[torch.Tensor]) -> None:
        """Set the pixel statistics in one pass over uint8 images (B, C, H, W).

        Each rank passes its own share of the images.

        Raises: InputError when there are no images, or when a channel is constant.
        """
        moments = Moments(self.in_chans, self.pixel_mean.device)
        for batch in images:
            pixels = batch.to(self.pixel_mean.device, torch.float32) - 128
            moments.update(pixels.movedim(1, -1).flatten(0, -2))
        moments.all_reduce()
        check_not_empty(moments)
        variance = moments.covariance().diagonal().clamp(min=0)
        self.set_pixel_stats((moments.mean() + 128) / 255, variance.sqrt() / 255)

    def set_pixel_stats(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set the mean and standard deviation (C,) of the pixels, in [0, 1].

        Raises: InputError when a channel is constant.
        """
        for channel in (std <= 1e-6).nonzero()[:1, 0].tolist():
            raise InputError(
                f"channel {channel} is the same in every pixel of the tokenizer's images, so "
                "nothing can be learned from it: check data.in_chans"
            )
        self.pixel_mean.copy_(mean)
        self.pixel_std.copy_(std)


class PatchTokenizer(Tokenizer):
    """A tokenizer that applies the same affine map to every patch.

    A patch has D = in_chans * patch_size^2 numbers. The export folds ``project`` and ``inverse``
    into a convolution. They also let a network take and predict images instead of latents.
    """

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        """Map patches (..., D) to latents (..., dim), the mean of the posterior if there is one."""
        raise NotImplementedError

    def inverse(self, latents: torch.Tensor) -> torch.Tensor:
        """Map latents (..., dim) to the patches (..., D) that they represent."""
        raise NotImplementedError

    def encode(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        return self.project(patchify(images, self.patch_size))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return unpatchify(self.inverse(latents), self.patch_size, self.in_chans)


def latent_scales(scale: str, variances: torch.Tensor, raw_scale: float) -> torch.Tensor:
    """Return the factors (dim,) that scale latents of these variances (dim,).

    ``scale`` is as in ``Tokenizer``; for ``raw``, every factor is ``raw_scale``.
    """
    if scale == "raw":
        return torch.full_like(variances, raw_scale)
    if scale == "global":
        return torch.full_like(variances, 1) / variances.mean().sqrt()
    # The floor keeps the rounding error of an axis without variance from being scaled up to noise.
    floor = variances.max() * 1e-8
    return variances.clamp(min=float(floor)).rsqrt()


def check_not_empty(moments: Moments) -> None:
    """Check that the moments count at least one vector.

    Raises: InputError when they count none.
    """
    if not moments.count:
        raise InputError("there is no image to fit the tokenizer on")
