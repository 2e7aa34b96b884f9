"""The feature target: features of the clean image, by a moving average of the encoder."""

import torch
import torch.nn.functional as F
from torch import nn

from ldae.models.contract import Denoiser
from ldae.objective import token_weights
from ldae.train.average import move_average

_EPS = 1e-6  # of the LayerNorm, as in the blocks


class FeatureTarget(nn.Module):
    """The features that a moving average of the encoder has for clean images, and their loss.

    The average sees clean images under the conditions in which graders read a backbone: all tokens,
    no noise, one t and the null label. A linear head beside that of the row's own target predicts
    its features.

    Args:
        denoiser: the network whose encoder is averaged; the average starts as a copy of it.
        share: share of the feature target in the loss.
        decay: decay of the average per step.
        kept_weight: weight of a kept token in the loss, relative to a dropped token.

    Raises: InputError when the encoder has no features of single tokens.

    Source: data2vec (Baevski et al. 2022), which has no other target.
    """

    def __init__(self, denoiser: Denoiser, share: float, decay: float, kept_weight: float) -> None:
        super().__init__()
        self.average = denoiser.encoder_copy().requires_grad_(False)
        self.share, self.decay, self.kept_weight = share, decay, kept_weight

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the features (B, N, W) of clean tokens (B, N, d or D) at t (B,)."""
        return self.average.encode(tokens, self.average.condition(t))

    def add_loss(
        self,
        loss: torch.Tensor,
        features: torch.Tensor,
        prediction: torch.Tensor,
        kept: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return a loss mixed with that of the feature target, and both by name, detached.

        The loss of the features (B, N, W) is the mean square error of their prediction (B, N, W).
        Their tokens are first given zero mean and unit variance.

        Args:
            kept: indices of the kept tokens (B, n) of masked images.
        """
        target = F.layer_norm(features.to(prediction), features.shape[-1:], eps=_EPS)
        square = (target - prediction).square().mean(-1)
        if kept is not None:
            square = square * token_weights(kept, square.shape[1], self.kept_weight)
        of_features = square.mean()
        parts = {"denoising": loss.detach(), "features": of_features.detach()}
        return (1 - self.share) * loss + self.share * of_features, parts

    def follow(self, denoiser: Denoiser) -> None:
        """Move the average towards the encoder of ``denoiser``, after an update of its weights."""
        move_average(self.average, denoiser, self.decay)

    def restart(self, denoiser: Denoiser) -> None:
        """Set the average to the encoder of ``denoiser``."""
        move_average(self.average, denoiser, 0.0)
