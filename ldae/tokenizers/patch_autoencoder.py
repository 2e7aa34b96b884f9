"""Patch-wise tokenizers trained by gradients: a linear encoder and a linear decoder of a patch."""

import torch
from torch import nn

from ldae.patches import patchify, unpatchify
from ldae.tokenizers.contract import PatchTokenizer
from ldae.tokenizers.trained import LOG_VARIANCE_RANGE, Posterior, TrainedTokenizer


class PatchAE(TrainedTokenizer, PatchTokenizer):
    """A patch-wise autoencoder h = V x, x = U^T h, with biases.

    Source: paper, section 4.2, row 7.
    """

    per_axis = 1
    """Outputs of the encoder for each number of a latent."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, dim: int, scale: str) -> None:
        super().__init__(img_size, patch_size, in_chans, dim, scale)
        self.encoder = nn.Linear(self.patch_dim, self.per_axis * dim)
        self.decoder = nn.Linear(dim, self.patch_dim)

    def posterior(self, images: torch.Tensor) -> Posterior:
        return Posterior(self.encoder(patchify(images, self.patch_size)), None)

    def decode_raw(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = unpatchify(self.decoder(latents), self.patch_size, self.in_chans)
        return images, images.new_zeros(())  # no codebook loss

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        return self.standardize(self.encoder(patches)[..., : self.dim])

    def inverse(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.destandardize(latents))


class PatchVAE(PatchAE):
    """A patch-wise VAE: mean and log-variance of its diagonal posterior are linear in the patch.

    Source: paper, section 4.2, row 6.
    """

    stochastic = True
    loss_weights = ("kl_weight",)
    per_axis = 2

    def posterior(self, images: torch.Tensor) -> Posterior:
        mean, log_variance = self.encoder(patchify(images, self.patch_size)).chunk(2, -1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))
