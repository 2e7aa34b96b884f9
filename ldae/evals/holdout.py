"""The part of train that chooses, so that nothing is chosen on what is reported."""

import os
from hashlib import blake2b

import torch

from ldae.errors import InputError


def held_out(names: list[str], labels: torch.Tensor, one_in: int) -> torch.Tensor:
    """Which images choose, bool (N,), one in so many: a pure function of each image's name.

    Raises: InputError when there are none, or none of a class that is left to learn from.
    """
    digests = (blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    held = torch.tensor([int.from_bytes(digest, "big") % one_in == 0 for digest in digests])
    if not torch.isin(labels[held], labels[~held]).any():
        raise InputError(
            f"{len(names)} train images of {len(labels.unique())} classes are too few to hold "
            f"one in {one_in} out: no class has images in both parts"
        )
    return held
