"""The base class of tokenizers that are trained by gradients, and its posterior."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ldae.moments import Moments
from ldae.pixel_statistics import check_not_empty
from ldae.tokenizers.contract import Tokenizer, latent_scales

# LDM's clamp of a posterior's log-variance, so that no variance underflows or overflows.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Posterior(NamedTuple):
    """A diagonal Gaussian over the latents of each image."""

    mean: torch.Tensor
    """(B, N, dim)."""
    log_variance: torch.Tensor | None = None
    """(B, N, dim), or None when the tokenizer has no posterior."""

    def sample(self, eps: torch.Tensor | None) -> torch.Tensor:
        """Return mean + std * eps, or the mean when ``eps`` or the variance is None."""
        if eps is None or self.log_variance is None:
            return self.mean
        return self.mean + (0.5 * self.log_variance).exp() * eps

    def to(self, like: torch.Tensor) -> "Posterior":
        """Return the posterior in the precision and on the device of ``like``."""
        return Posterior(*(None if part is None else part.to(like) for part in self))

    def stack(self) -> torch.Tensor:
        """Return mean and log-variance as one tensor (B, 2, N, dim), or the mean (B, 1, N, dim)."""
        return torch.stack([part for part in self if part is not None], 1)

    def kl(self) -> torch.Tensor:
        """Return KL[posterior | N(0, I)] (B,), summed over the numbers of an image."""
        if self.log_variance is None:
            return self.mean.new_zeros(len(self.mean))
        parts = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * parts.flatten(1).sum(1)


class Reconstruction(NamedTuple):
    """The result of one pass through a tokenizer, as its loss needs it."""

    images: torch.Tensor
    """Normalised reconstructions (B, C, H, W)."""
    kl: torch.Tensor
    """(B,), see ``Posterior.kl``."""
    codebook: torch.Tensor
    """The codebook loss, a scalar: the mean square error of quantisation, for the codebook and,
    times the commitment weight, for the encoder. It is 0 without a codebook."""


class TrainedTokenizer(Tokenizer):
    """A tokenizer z = scale * (h - mean), where h comes from a network that gradients train.

    A subclass defines ``posterior`` and ``decode_raw``; ``last_weight`` too if ``loss_weights`` has
    ``adversarial_weight``; and, if it is quantised, ``codes`` and ``code_indices``. z = h until
    ``fit_latents`` has set ``latent_mean`` and ``scales``.
    """

    trained = True
    quantised = False
    """Whether ``decode_raw`` replaces latents by their nearest neighbours in a codebook."""
    raw_shift = 0.0
    """The shift of latents when ``scale`` is ``raw``."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, dim: int, scale: str) -> None:
        super().__init__(img_size, patch_size, in_chans, dim, scale)
        self.register_buffer("latent_mean", torch.zeros(dim))

    def posterior(self, images: torch.Tensor) -> Posterior:
        """Return the posterior of normalised images (B, C, H, W), in the network's own units."""
        raise NotImplementedError

    def decode_raw(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode latents (B, N, dim) that are in the network's own units.

        Returns: normalised images (B, C, H, W), and the codebook loss, a scalar.
        """
        raise NotImplementedError

    @property
    def last_weight(self) -> torch.Tensor:
        """The weight of the decoder's last layer; the adversarial loss is balanced on it."""
        raise NotImplementedError

    def standardize(self, latents: torch.Tensor) -> torch.Tensor:
        """Convert latents (..., dim) from the network's units to the tokenizer's."""
        return (latents - self.latent_mean) * self.scales

    def destandardize(self, latents: torch.Tensor) -> torch.Tensor:
        """Convert latents (..., dim) from the tokenizer's units to the network's."""
        return latents / self.scales + self.latent_mean

    def encode_posterior(self, images: torch.Tensor) -> Posterior:
        """Return the posterior of normalised images (B, C, H, W), in the tokenizer's units."""
        mean, log_variance = self.posterior(images)
        if log_variance is not None:
            log_variance = log_variance + 2 * self.scales.log()
        return Posterior(self.standardize(mean), log_variance)

    def encode(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        return self.encode_posterior(images).sample(eps)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decode_raw(self.destandardize(latents))[0]

    def reconstruct(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> Reconstruction:
        """Encode and decode normalised images; ``eps`` is as in ``encode``."""
        posterior = self.posterior(images).to(images)
        reconstructed, codebook = self.decode_raw(posterior.sample(eps))
        return Reconstruction(reconstructed.to(images), posterior.kl(), codebook)

    @torch.no_grad()
    def fit_latents(self, images: Iterable[torch.Tensor]) -> None:
        """Set the mean and the scales of the latents in one pass over uint8 images (B, C, H, W).

        Each rank passes its own share of the images. The variance counted is the variance of a
        sample: the variance of the posteriors' means plus the mean of their variances. An axis that
        the KL term has emptied thus stays noise of unit size, and is not amplified.

        Raises: InputError when there are no images.
        """
        moments = Moments(2 * self.dim, self.scales.device)
        for batch in images:
            posterior = self.posterior(self.normalize(batch.to(self.scales.device)))
            spread = torch.zeros_like(posterior.mean)
            if posterior.log_variance is not None:
                spread = posterior.log_variance.exp()
            moments.update(torch.cat([posterior.mean, spread], -1).flatten(0, 1).double())
        moments.all_reduce()
        check_not_empty(moments)
        mean, spread = moments.mean().chunk(2)
        variances = moments.covariance().diagonal()[: self.dim].clamp(min=0) + spread
        raw_mean = torch.full_like(mean, self.raw_shift)
        self.latent_mean.copy_(raw_mean if self.scale == "raw" else mean)
        self.scales.copy_(latent_scales(self.scale, variances, self.raw_scale))
