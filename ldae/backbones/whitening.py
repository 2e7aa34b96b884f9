"""Whitening of features: a linear layer whose outputs are uncorrelated and have mean 0."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ldae.errors import InputError
from ldae.moments import Moments

SHRINKAGE = 1e-4
WHITENED = "ldae_whitened"
"""timm's tag of an exported backbone with a whitening as its head."""


def whitening(moments: Moments, shrinkage: float = SHRINKAGE) -> nn.Linear:
    """Return the whitening of features with these moments: (B, D) -> (B, D), float32 on the CPU.

    A feature x becomes C^(-1/2) (x - mean). C is the covariance, shrunk towards the identity:
    (1 - shrinkage) covariance + shrinkage trace(covariance) / D I. With shrinkage 0 the outputs
    have the identity as their covariance. With shrinkage 1 only the mean is subtracted, apart from
    a factor.

    Raises: InputError when C is singular.

    Source: Ledoit and Wolf, 2004; scikit-learn's shrunk_covariance.
    """
    covariance, mean = moments.covariance().cpu(), moments.mean().cpu()
    values, vectors = torch.linalg.eigh(covariance)
    values = (1 - shrinkage) * values + shrinkage * values.mean()
    dim = len(values)
    rank = int((values > values[-1] * dim * torch.finfo(values.dtype).eps).sum())
    if rank < dim:
        raise InputError(
            f"the features of {int(moments.count):,} images vary in {rank} of {dim} dimensions, "
            f"too few for whiten_shrinkage {shrinkage:g}: give a larger one"
        )
    weight = vectors * values.rsqrt() @ vectors.T
    layer = nn.utils.skip_init(nn.Linear, dim, dim).requires_grad_(False)
    layer.load_state_dict({"weight": weight, "bias": -weight @ mean})
    return layer


def add_whitening(vit: VisionTransformer, layer: nn.Linear) -> None:
    """Make a whitening the head of ``vit``, in place."""
    vit.reset_classifier(layer.out_features)
    vit.head.load_state_dict(layer.state_dict())
    vit.model_args |= {"num_classes": layer.out_features}
    vit.pretrained_cfg |= {"num_classes": layer.out_features, "tag": WHITENED}


def drop_whitening(model: nn.Module) -> None:
    """Remove the head of ``model`` if it is a whitening, in place."""
    if is_whitened(model.pretrained_cfg):
        model.reset_classifier(0)


def is_whitened(pretrained_cfg: Mapping[str, Any]) -> bool:
    """Return whether the head of the model with this timm configuration is a whitening."""
    return pretrained_cfg.get("tag") == WHITENED
