"""The base classes of all tokenizers and of the patch-wise ones."""

import inspect
from collections.abc import Iterable

import torch

from ldae.errors import InputError
from ldae.patches import patches_a_side, patchify, unpatchify
from ldae.pixel_statistics import PixelStatistics


class Tokenizer(PixelStatistics):
    """The map from uint8 images (B, C, H, W) to latents (B, N, dim) and back.

    The statistics of the pixels and the latent scale are kept in the tokenizer only; ``encode`` and
    ``decode`` apply the scale. A subclass defines ``encode``, ``decode`` and ``fit``. A tokenizer
    that gradients train is a ``TrainedTokenizer``, which needs no ``fit``.

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

    scales: torch.Tensor

    def __init__(self, img_size: int, patch_size: int, in_chans: int, dim: int, scale: str) -> None:
        super().__init__(img_size, in_chans)
        self.patch_size, self.side = patch_size, patches_a_side(img_size, patch_size)
        self.dim, self.patch_dim = dim, in_chans * patch_size**2
        self.scale = self.auto_scale if scale == "auto" else scale
        self.register_buffer("scales", torch.ones(dim))

    @property
    def num_tokens(self) -> int:
        """The number N of tokens of an image."""
        return self.side**2

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

    Raises: InputError when all variances are 0.
    """
    if scale == "raw":
        return torch.full_like(variances, raw_scale)
    if not variances.any():
        raise InputError("the images are all the same, so nothing can be learned from them")
    if scale == "global":
        return torch.full_like(variances, 1) / variances.mean().sqrt()
    # The floor keeps the rounding error of an axis without variance from being scaled up to noise.
    floor = variances.max() * 1e-8
    return variances.clamp(min=float(floor)).rsqrt()
