"""What the tokenizers share that are trained by gradients: posterior, latent statistics, the parts
of the loss."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ldae.tokenizers.contract import Tokenizer, check_any, latent_scales
from ldae.tokenizers.moments import Moments

LOG_VARIANCES = (
    -30.0,
    20.0,
)  # a posterior's, clamped so that no variance under- or overflows (LDM)


class Posterior(NamedTuple):
    """A diagonal Gaussian for each image, in the network's own units."""

    mean: torch.Tensor
    """(B, N, dim)."""
    log_variance: torch.Tensor | None
    """(B, N, dim), or None of a tokenizer without a posterior."""

    def draw(self, eps: torch.Tensor | None) -> torch.Tensor:
        """mean + std eps; the mean where there is no eps, or nothing to draw from."""
        if eps is None or self.log_variance is None:
            return self.mean
        return self.mean + (0.5 * self.log_variance).exp() * eps

    def to(self, like: torch.Tensor) -> "Posterior":
        """In the precision of ``like``."""
        return Posterior(*(None if part is None else part.to(like) for part in self))

    def kl(self) -> torch.Tensor:
        """KL[posterior | N(0, I)] (B,), a sum over the numbers of an image."""
        if self.log_variance is None:
            return self.mean.new_zeros(len(self.mean))
        parts = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * parts.flatten(1).sum(1)


class Reconstruction(NamedTuple):
    """What a training step needs of one pass through a tokenizer."""

    images: torch.Tensor
    """Normalised, (B, C, H, W)."""
    kl: torch.Tensor
    """(B,), see ``Posterior.kl``."""
    codebook: torch.Tensor
    """Scalar: the mean square error of quantisation, for the codebook and for the encoder; else 0."""


class TrainedTokenizer(Tokenizer):
    """z = scale * (h - mean), with h from a network that gradients train.

    A subclass gives ``posterior`` and ``generate``. Until ``fit_latents`` has chosen ``latent_mean``
    and ``scales``, z = h.
    """

    trained = True
    quantised = False
    """Whether ``generate`` replaces latents by the nearest ones of a codebook."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, dim: int, scale: str) -> None:
        super().__init__(img_size, patch_size, in_chans, dim, scale)
        self.register_buffer("latent_mean", torch.zeros(dim))

    def posterior(self, images: torch.Tensor) -> Posterior:
        """Of normalised images."""
        raise NotImplementedError

    def generate(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised images of latents (B, N, dim) in the network's own units, and the codebook
        loss, a scalar."""
        raise NotImplementedError

    @property
    def last_weight(self) -> torch.Tensor:
        """The weight of the decoder's last layer, on which the adversary's share is balanced."""
        raise NotImplementedError

    def raw_units(self) -> tuple[float, float]:
        """Shift and factor of latents whose ``scale`` is ``raw``."""
        return 0.0, 1.0

    def standardize(self, latents: torch.Tensor) -> torch.Tensor:
        """From the network's units to the tokenizer's."""
        return (latents - self.latent_mean) * self.scales

    def restore(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of ``standardize``."""
        return latents / self.scales + self.latent_mean

    def encode(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        return self.standardize(self.posterior(images).draw(eps))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.generate(self.restore(latents))[0]

    def reconstruct(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> Reconstruction:
        """Normalised images there and back, through a draw of their posterior when ``eps`` is given."""
        posterior = self.posterior(images).to(images)
        made, codebook = self.generate(posterior.draw(eps))
        return Reconstruction(made.to(images), posterior.kl(), codebook)

    @torch.no_grad()
    def fit_latents(self, images: Iterable[torch.Tensor]) -> None:
        """Choose mean and scales of the latents in one pass over uint8 images, each rank over its
        share.

        The variance is that of a draw: of the means, plus the mean of the posteriors' own. So an
        axis that the KL has emptied stays noise of unit size, and is not blown up.

        Raises: InputError when there are no images.
        """
        moments = Moments(2 * self.dim, self.scales.device)
        for batch in images:
            found = self.posterior(self.normalize(batch.to(self.scales.device)))
            spread = torch.zeros_like(found.mean)
            if found.log_variance is not None:
                spread = found.log_variance.exp()
            moments.update(torch.cat([found.mean, spread], -1).flatten(0, 1).double())
        moments.all_reduce()
        check_any(moments)
        mean, spread = moments.mean().chunk(2)
        variances = moments.covariance().diagonal()[: self.dim].clamp(min=0) + spread
        shift, unit = self.raw_units()
        self.latent_mean.copy_(torch.full_like(mean, shift) if self.scale == "raw" else mean)
        self.scales.copy_(latent_scales(self.scale, variances, unit))
