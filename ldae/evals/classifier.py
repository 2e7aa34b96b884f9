"""A linear head and its backbone as one timm classifier: folded, written, verified."""

import copy
from pathlib import Path

import torch
from torch import nn

from ldae.backbones.preprocessing import preprocessing
from ldae.backbones.timm_folder import write_timm_folder
from ldae.backbones.whitening import is_whitened
from ldae.data.loader import eval_batches
from ldae.data.source import Source
from ldae.distributed import barrier, is_main
from ldae.errors import InputError
from ldae.evals.heads import Heads
from ldae.files import check_writable

_IMAGES_VERIFIED = 64


@torch.no_grad()
def fold_batchnorm(
    norm: nn.BatchNorm1d, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold ``norm``, in eval mode, into the weight (C, D) and bias (C,) of the layer behind it."""
    scaled = weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shifted = bias.double() - scaled @ norm.running_mean.double()
    return scaled.to(weight.dtype), shifted.to(bias.dtype)


def save_classifier(
    backbone: nn.Module, heads: Heads, classes: list[str] | None, folder: Path, source: Source
) -> None:
    """Write ``backbone`` and the first of ``heads`` as one timm classifier, on the main rank.

    Its logits of the first images of ``source`` must agree with those of backbone and head.

    Raises: InputError when ``backbone`` takes no plain linear head, or the logits differ.
    """
    if is_main():
        # Copies on the CPU, which computes float32 exactly; the caller's stay where they are.
        backbone, heads = copy.deepcopy(backbone).cpu(), copy.deepcopy(heads).cpu()
        model = _with_head(backbone, heads)
        _check_head(model, backbone, heads, source)
        write_timm_folder(
            folder,
            model,
            backbone.model_args | {"num_classes": model.num_classes},
            classes=classes[: model.num_classes] if classes else None,
        )
    barrier()


def check_savable(backbone: nn.Module, folder: Path) -> None:
    """Check that a classifier on ``backbone`` can be saved as ``folder``.

    Raises: InputError when ``backbone`` is no timm model, or ``folder`` exists or is not writable.
    """
    if folder.exists():
        raise InputError(f"{folder} exists already; save to another folder")
    check_writable(folder)
    if not hasattr(backbone, "reset_classifier"):
        raise InputError(
            "save needs a backbone that is a timm model; raw pixels are none, nor is a run whose "
            "tokenizer is a network"
        )


def _with_head(backbone: nn.Module, heads: Heads) -> nn.Module:
    """Return a copy of ``backbone`` whose classifier is the first of ``heads`` and its BatchNorm.

    Raises: InputError when the backbone takes no plain linear head.
    """
    weight, bias = fold_batchnorm(heads.norm, heads.weight[0], heads.bias[0])
    if is_whitened(backbone.pretrained_cfg):  # by its head, which the classifier replaces
        whitening = copy.deepcopy(backbone.get_classifier()).double()
        bias = (bias.double() + weight.double() @ whitening.bias).to(bias.dtype)
        weight = (weight.double() @ whitening.weight).to(weight.dtype)
    model = copy.deepcopy(backbone)
    model.reset_classifier(len(bias))
    head = model.get_classifier()
    if not isinstance(head, nn.Linear) or head.weight.shape != weight.shape:
        raise InputError(
            f"{model.pretrained_cfg['architecture']} ends in more than a linear layer on its "
            "features: its classifier cannot be saved"
        )
    head.load_state_dict({"weight": weight, "bias": bias})
    # Without these, timm would record the values of the backbone's own pretrained weights.
    model.pretrained_cfg = backbone.pretrained_cfg | {
        "tag": "linear",
        "num_classes": len(bias),
        "custom_load": False,
    }
    return model


@torch.inference_mode()
def _check_head(model: nn.Module, backbone: nn.Module, heads: Heads, source: Source) -> None:
    """Compare the logits of the classifier with those of backbone and head.

    Raises: InputError when they differ on the first images of ``source``.
    """
    indices = range(min(_IMAGES_VERIFIED, len(source)))
    transform = preprocessing(model)
    pixels, _, _ = next(iter(eval_batches(source, transform, indices, len(indices), workers=0)))
    images = transform.normalize(pixels)
    expected = heads(backbone(images))[:, 0]
    error = (model(images) - expected).abs().max() / expected.abs().max()
    if not error < 1e-3:
        raise InputError(
            f"not saved: the logits of the classifier differ from those of the probe by {error:.1e}"
        )
