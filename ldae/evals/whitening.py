"""The whitening of features before a search, as a part of a protocol."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from ldae.backbones.whitening import SHRINKAGE, whitening
from ldae.errors import InputError
from ldae.evals.features import Features
from ldae.evals.protocol import Protocol
from ldae.moments import Moments
from ldae.tree import SHARE

_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class WhiteningProtocol(Protocol):
    """The constants of the whitening of features, before they are normalised for cosines."""

    whiten: bool = False
    """Whiten all features by the mean and covariance of the searched split. Labels are not read,
    and all images of the split count, also where --shots searches a few of them."""
    whiten_shrinkage: Annotated[float, SHARE] = SHRINKAGE
    """Shrink the covariance of --whiten by this share, from 0 to 1, towards the identity times the
    mean variance, so that directions of nearly no variance do not count as much as others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.whiten_shrinkage != SHRINKAGE and not self.whiten:
            raise InputError("--whiten-shrinkage needs --whiten")


def whitening_of(
    searched: Features, protocol: WhiteningProtocol, device: torch.device
) -> nn.Module:
    """Return the whitening (B, D) -> (B, D) that the protocol asks for; without one, the identity.

    ``searched`` is this rank's share of the searched images. The ranks exchange on ``device``.

    Raises: InputError when the images are too few for the shrinkage.
    """
    if not protocol.whiten:
        return nn.Identity()
    features = searched.features
    moments = Moments.of(features.split(_ROWS_AT_ONCE), features.shape[1], device)
    return whitening(moments, protocol.whiten_shrinkage)
