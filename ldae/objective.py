"""The targets of the network, the weights of the noise levels, and the loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ldae import masking
from ldae.errors import InputError
from ldae.patches import patch_moments, patchify
from ldae.prediction import PREDICTIONS, Prediction
from ldae.tokenizers import OrthonormalTokenizer, PatchPCA, PatchTokenizer, Tokenizer, check_kind

Tensor = torch.Tensor


class Target(NamedTuple):
    """What a network predicts, and how z_0 follows from its output."""

    target: Callable[[Any, Any, Tensor, Tensor, Tensor, Tensor], Tensor]
    """(tokenizer, x, z_0, eps, gamma, sigma) -> the target of the output.

    x (B, C, H, W) are clean images, which a cache of latents does not have; z_0 and eps are
    (B, N, d); gamma and sigma are (B, 1, 1).
    """
    clean: Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor] | None
    """(tokenizer, output, z_t, gamma, sigma) -> z_0 (B, N, d); None if z_0 does not follow."""
    tokenizer: type[Tokenizer] = Tokenizer
    """The class of the tokenizers for which the target exists."""
    patches: Callable[[Any, Tensor, Tensor | None], Tensor] | None = None
    """(tokenizer, output, x) -> the patches (B, N, D) that an output (B, N, D) shows.

    Targets in the latent space (B, N, d) have None. Only a target without ``clean`` reads the
    clean images x (B, C, H, W).
    """
    on_axes: Callable[[Any, Tensor], Tensor] | None = None
    """(tokenizer, error (B, N, D)) -> the error on the latent's d axes (B, N, d).

    With it, ``residual_weight`` scales the error outside of these axes.
    """


def _of_latents(prediction: Prediction) -> Target:
    """Return the target in the latent space that a prediction type defines."""
    return Target(
        lambda tokenizer, x, z_0, eps, gamma, sigma: prediction.target(z_0, eps, gamma, sigma),
        lambda tokenizer, output, z_t, gamma, sigma: prediction.clean(output, z_t, gamma, sigma),
    )


def _normalize(patches: Tensor) -> Tensor:
    """Return patches (B, N, D), each with zero mean and unit variance (He et al. 2022, MAE)."""
    mean, std = patch_moments(patches)
    return (patches - mean) / std


def _denormalize(tokenizer: Tokenizer, output: Tensor, x: Tensor | None) -> Tensor:
    """Return the output (B, N, D) with the mean and variance of each patch of images x."""
    assert x is not None, "the mean and variance of a patch come from the image"
    mean, std = patch_moments(patchify(x, tokenizer.patch_size))
    return output * std + mean


TARGETS = {
    **{name: _of_latents(prediction) for name, prediction in PREDICTIONS.items()},
    "projected": Target(  # the inverse projection of z_0 (row 12)
        lambda tokenizer, x, z_0, eps, gamma, sigma: tokenizer.inverse(z_0),
        lambda tokenizer, output, z_t, gamma, sigma: tokenizer.project(output),
        tokenizer=PatchTokenizer,
        patches=lambda tokenizer, output, x: output,
    ),
    "image": Target(  # the original image (rows 13, 14)
        lambda tokenizer, x, z_0, eps, gamma, sigma: patchify(x, tokenizer.patch_size),
        lambda tokenizer, output, z_t, gamma, sigma: tokenizer.project(output),
        tokenizer=OrthonormalTokenizer,
        patches=lambda tokenizer, output, x: output,
        on_axes=lambda tokenizer, error: error @ tokenizer.basis[: tokenizer.dim].T,
    ),
    "whitened": Target(  # the original image on its principal axes, each with unit variance
        lambda tokenizer, x, *_: tokenizer.whiten(patchify(x, tokenizer.patch_size)),
        lambda tokenizer, output, *_: tokenizer.project(tokenizer.unwhiten(output)),
        tokenizer=PatchPCA,
        patches=lambda tokenizer, output, x: tokenizer.unwhiten(output),
        on_axes=lambda tokenizer, error: error[..., : tokenizer.dim],
    ),
    "normalized": Target(  # MAE's: each patch of the image with zero mean and unit variance
        lambda tokenizer, x, *_: _normalize(patchify(x, tokenizer.patch_size)),
        None,
        tokenizer=PatchTokenizer,
        patches=_denormalize,
    ),
}
"""The targets by name: the prediction types, such as eps (rows 1 to 8) and latent (rows 9 to 11),
and the patches projected, image, whitened and normalized."""

WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "uniform": lambda gamma, sigma: torch.ones_like(gamma),
    "gamma2": lambda gamma, sigma: gamma**2,  # row 9
    "sigma2": lambda gamma, sigma: sigma**2,  # gives the score the loss of eps
    "inverse": lambda gamma, sigma: 1 / (1 + sigma**2),  # rows 10 to 14
}
"""lambda_t by name: (gamma, sigma) -> the weights of the levels, all (T,)."""


class Objective(nn.Module):
    """The loss of one row: lambda_t |error|^2, where the error is target - output.

    With the targets image and whitened, the square is weighted by principal axis, see ``loss``.

    Args:
        target: a key of ``TARGETS``.
        weight: a key of ``WEIGHTS``.
        residual_weight: weight of the error outside the latent's d axes, when the target has an
            ``on_axes`` (paper, section 4.3: 0.1).
        kept_weight: weight of a kept token of a masked image, relative to a dropped token.
        gamma, sigma: every level of the schedule, (T,) each.

    Raises: InputError for a target that is undefined at a level or needs another tokenizer.
    """

    weights: Tensor

    def __init__(
        self,
        target: str,
        weight: str,
        residual_weight: float,
        kept_weight: float,
        gamma: Tensor,
        sigma: Tensor,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__()
        kind = TARGETS[target]
        check_kind(kind.tokenizer, tokenizer, f"objective.target {target}")
        if target in PREDICTIONS:
            eps = torch.ones_like(gamma)
            defined = PREDICTIONS[target].target(0 * eps, eps, gamma, sigma).isfinite()
            if not defined.all():
                t = int((~defined).nonzero()[0, 0])
                raise InputError(
                    f"objective.target {target} is undefined at t = {t} of noise.schedule, where "
                    f"gamma is {gamma[t]:g} and sigma {sigma[t]:g}"
                )
        self.name, self.target, self.clean = target, kind.target, kind.clean
        self.patches, self.on_axes = kind.patches, kind.on_axes
        self.out_dim = tokenizer.patch_dim if self.patches else tokenizer.dim
        self.residual_weight, self.kept_weight = residual_weight, kept_weight
        self.register_buffer("weights", WEIGHTS[weight](gamma, sigma).float(), persistent=False)

    def loss(
        self, tokenizer: Tokenizer, error: Tensor, t: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """Return the weighted mean square of error (B, N, C) at t (B,), a scalar.

        Args:
            kept: indices of the kept tokens (B, n) of masked images.
        """
        square = error.square().sum(-1)
        if self.on_axes:
            # sum_i w_i r_i^2 with r = V error, w_i = 1 on the first d axes, residual_weight on the
            # others. V is orthonormal, so the others hold what the first d leave of |error|^2.
            first = self.on_axes(tokenizer, error).square().sum(-1)
            square = first + self.residual_weight * (square - first)
        if kept is not None:
            square = square * token_weights(kept, error.shape[1], self.kept_weight)
        per_image = square.mean(1) / error.shape[-1]
        return (self.weights[t] * per_image).mean()


def token_weights(kept: Tensor, tokens: int, kept_weight: float) -> Tensor:
    """Return the weights (B, tokens) of the tokens of each image in the loss, with a mean of 1.

    A token at the indices ``kept`` (B, n) weighs ``kept_weight`` times as much as a dropped token.
    """
    total = tokens - kept.shape[1] + kept_weight * kept.shape[1]
    weights = torch.where(masking.is_kept(kept, tokens), kept_weight, 1.0)
    return weights * (tokens / total)
