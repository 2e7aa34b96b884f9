"""What the network is asked for, and how its error is weighted."""

import torch
from torch import nn

from ldae.errors import InputError
from ldae.patches import patchify
from ldae.prediction import PREDICTIONS
from ldae.tokenizers import OrthonormalTokenizer, PatchTokenizer, Tokenizer, name_of

IMAGE_TARGETS = ("projected", "image")


class Objective(nn.Module):
    """The loss of one row: lambda_t |target - output|^2 in the coordinates of the row.

    Args:
        target: a prediction type of ldae/prediction.py, such as ``eps``, the noise (rows 1 to 8), or
            ``latent``, z_0 (rows 9 to 11); ``projected``, the inverse projection of z_0 (row 12);
            ``image``, the original image (rows 13, 14).
        weight: lambda_t; ``uniform``: 1; ``gamma2``: gamma_t^2 (row 9); ``sigma2``: sigma_t^2, which
            makes a score's loss that of eps; ``inverse``: 1 / (1 + sigma_t^2) (rows 10 to 14).
        residual_weight: the weight of the error outside of the latent's d axes when the target is
            the image (paper, section 4.4: 0.1).

    Raises: InputError for a target that is undefined at a level, or needs another tokenizer.
    """

    def __init__(
        self,
        target: str,
        weight: str,
        residual_weight: float,
        gamma: torch.Tensor,
        sigma: torch.Tensor,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__()
        needed = {"projected": PatchTokenizer, "image": OrthonormalTokenizer}.get(target)
        if needed and not isinstance(tokenizer, needed):
            kind = "patch-wise" if needed is PatchTokenizer else "patch-wise and orthonormal"
            raise InputError(
                f"objective.target {target} needs a tokenizer that is {kind}, which "
                f"{name_of(tokenizer)} is not"
            )
        if target == "score" and not sigma.all():
            raise InputError(
                "objective.target score is undefined where noise.schedule has no noise"
            )
        self.target_name, self.residual_weight = target, residual_weight
        lambdas = {
            "uniform": torch.ones_like(gamma),
            "gamma2": gamma**2,
            "sigma2": sigma**2,
            "inverse": 1 / (1 + sigma**2),
        }
        self.register_buffer("weights", lambdas[weight].float(), persistent=False)

    def target(
        self,
        tokenizer: Tokenizer,
        x: torch.Tensor,
        z_0: torch.Tensor,
        eps: torch.Tensor,
        gamma: torch.Tensor,
        sigma: torch.Tensor,
    ) -> torch.Tensor:
        """What the network should put out, from clean images (B, C, H, W), z_0 and eps (B, N, d);
        gamma and sigma are those of each image, (B, 1, 1)."""
        if self.target_name == "image":
            return patchify(x, tokenizer.patch_size)
        if self.target_name == "projected":
            return tokenizer.inverse(z_0)
        return PREDICTIONS[self.target_name].target(z_0, eps, gamma, sigma)

    def clean(
        self,
        tokenizer: Tokenizer,
        output: torch.Tensor,
        z_t: torch.Tensor,
        gamma: torch.Tensor,
        sigma: torch.Tensor,
    ) -> torch.Tensor:
        """The z_0 (B, N, d) that an output for z_t stands for."""
        if self.target_name in IMAGE_TARGETS:
            return tokenizer.project(output)
        return PREDICTIONS[self.target_name].clean(output, z_t, gamma, sigma)

    def loss(self, tokenizer: Tokenizer, error: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The weighted mean square of error (B, N, C) at t (B,), a scalar."""
        square = error.square().sum(-1)
        if self.target_name == "image":
            # sum_i w_i r_i^2 with r = V error, w = 1 on the first d axes and residual_weight on the
            # others. V is orthonormal, so the others' share is what the first d leave of |error|^2.
            kept = (error @ tokenizer.basis[: tokenizer.dim].T).square().sum(-1)
            square = kept + self.residual_weight * (square - kept)
        per_image = square.mean(1) / error.shape[-1]
        return (self.weights[t] * per_image).mean()
