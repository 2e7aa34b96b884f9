"""What the network is asked for, and how its error is weighted."""

import torch
from torch import nn

from ldae.tokenizers import PatchTokenizer


class Objective(nn.Module):
    """The loss of one row: lambda_t |target - output|^2 in the coordinates of the row.

    Args:
        target: ``eps``, the noise (rows 1 to 8); ``latent``, z_0 (rows 9 to 11); ``projected``, the
            inverse projection of z_0 (row 12); ``image``, the original image (rows 13, 14).
        weight: lambda_t; ``uniform``: 1; ``gamma2``: gamma_t^2 (row 9); ``inverse``:
            1 / (1 + sigma_t^2) (rows 10 to 14).
        residual_weight: the weight of the error outside of the latent's d axes when the target is
            the image (paper, section 4.4: 0.1).
    """

    def __init__(
        self,
        target: str,
        weight: str,
        residual_weight: float,
        gamma: torch.Tensor,
        sigma: torch.Tensor,
    ) -> None:
        super().__init__()
        self.target_name, self.residual_weight = target, residual_weight
        lambdas = {
            "uniform": torch.ones_like(gamma),
            "gamma2": gamma**2,
            "inverse": 1 / (1 + sigma**2),
        }
        self.register_buffer("weights", lambdas[weight].float(), persistent=False)

    def target(
        self,
        tokenizer: PatchTokenizer,
        patches: torch.Tensor,
        z_0: torch.Tensor,
        eps: torch.Tensor,
    ) -> torch.Tensor:
        """What the network should put out, from the clean patches (B, N, D), z_0 and eps."""
        if self.target_name == "eps":
            return eps
        if self.target_name == "latent":
            return z_0
        if self.target_name == "projected":
            return tokenizer.inverse(z_0)
        return patches

    def loss(self, tokenizer: PatchTokenizer, error: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The weighted mean square of error (B, N, C) at t (B,), a scalar."""
        square = error.square().sum(-1)
        if self.target_name == "image":
            # sum_i w_i r_i^2 with r = V error, w = 1 on the first d axes and residual_weight on the
            # others. V is orthonormal, so the others' share is what the first d leave of |error|^2.
            kept = (error @ tokenizer.basis[: tokenizer.dim].T).square().sum(-1)
            square = kept + self.residual_weight * (square - kept)
        per_image = square.mean(1) / error.shape[-1]
        return (self.weights[t] * per_image).mean()
