"""The k-NN accuracy of a pre-training, measured while it trains."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ldae.data.open import check_unseen, open_splits, source_splits
from ldae.errors import InputError
from ldae.precision import float32_products
from ldae.train.loop import Hook
from ldae.train.plan import Plan

_ONLINE_K = 20


def online_knn(
    config: Any, plan: Plan, device: torch.device, backbone_of: Callable[[Any, bool], nn.Module]
) -> tuple[Hook, ...]:
    """Return the hook of ``system.knn_every``, if it is set.

    ``backbone_of(method, verify)`` returns the encoder of a method as a backbone.

    Raises: InputError when the images have no labels, are fewer than the neighbours, or are those
        to grade on too.
    """
    if not config.system.knn_every:
        return ()
    from ldae.evals.features import Encoder, extract_share
    from ldae.evals.neighbours import KNNProtocol, check_enough, knn_accuracy

    images = config.system.knn_source or config.data.source
    if config.data.bad_images == "skip" and not config.system.knn_source:
        raise InputError(
            "the online k-NN leaves no image out: with data.bad_images skip, set system.knn_source "
            "to images that can all be decoded"
        )
    own = config.system.knn_source and "eval" in source_splits(images)
    splits = open_splits(images, None if own else config.data.eval_source or None)
    for split in splits:
        if split.labels is None:
            raise InputError(
                f"the online k-NN needs labels, and {split.spec} ({split.split}) has no labels: "
                "name labelled images by system.knn_source"
            )
    check_unseen(*splits)
    check_enough(_ONLINE_K, len(splits[0]))

    def measure(method: Any) -> dict[str, float]:
        precision = "bf16" if method.bf16 else "fp32"
        backbone = backbone_of(method, False)
        encoder = Encoder(backbone, device, precision, workers=config.system.workers)
        train_set, test_set = (extract_share(encoder, split) for split in splits)
        with float32_products():  # also in a run that is trained in TF32
            return knn_accuracy(train_set, test_set, KNNProtocol(k=(_ONLINE_K,)), device)

    return (Hook(config.system.knn_every * plan.epoch, measure),)
