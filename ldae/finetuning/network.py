"""A timm backbone with a new classifier, and the loss that fine-tunes it."""

from typing import Any

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from ldae.backbones.resize import resize_input
from ldae.backbones.whitening import drop_whitening
from ldae.errors import InputError, first_line
from ldae.finetuning.settings import FinetuneConfig
from ldae.models.drop_path import set_drop_path
from ldae.precision import bf16_autocast, seeded_generator


class ClassificationLoss(nn.Module):
    """The cross-entropy of a network's logits and soft targets.

    Args:
        network: images (B, C, H, W) -> logits (B, num_classes).
        layer_decay: learning rate of a layer divided by the learning rate of the next layer.
        bf16: run the network under autocast.
    """

    def __init__(self, network: nn.Module, layer_decay: float = 1.0, bf16: bool = False) -> None:
        super().__init__()
        self.network, self.layer_decay, self.bf16 = network, layer_decay, bf16
        self.loss = SoftTargetCrossEntropy()

    def forward(
        self, images: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss, a scalar, of normalised images (B, C, H, W).

        ``positions`` are not read. ``targets`` are (B, num_classes).
        """
        with bf16_autocast(images.device, self.bf16):
            logits = self.network(images)
        return self.loss(logits.float(), targets)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups with ``lr_scale`` = layer_decay^(distance from the head).

        Vectors have no weight decay, nor have parameters that ``no_weight_decay`` of the network
        names.
        """
        no_weight_decay = getattr(self.network, "no_weight_decay", set)
        return param_groups_layer_decay(
            self.network,
            weight_decay=weight_decay,
            no_weight_decay_list=no_weight_decay(),
            layer_decay=self.layer_decay,
        )


def build_network(backbone: nn.Module, config: FinetuneConfig, num_classes: int) -> nn.Module:
    """Return a timm model of the backbone's architecture with a new head of ``num_classes``.

    The model has the backbone's weights, or with ``model.random_init`` timm's random weights, drawn
    by ``config.seed``. The two models are otherwise equal. ``model_args`` and ``pretrained_cfg`` of
    the model let timm build it again. ``images_seen`` is the backbone's.

    Raises: InputError when the backbone is not a timm model, ends in more than a linear layer, or
        does not take the image size or the drop path rate.
    """
    cfg = backbone.pretrained_cfg
    name = cfg["architecture"]
    if not hasattr(backbone, "reset_classifier"):
        raise InputError(f"{config.backbone} is not a timm model, so it cannot be fine-tuned")
    drop_whitening(backbone)
    args = backbone.model_args | {"num_classes": num_classes}
    if config.model.pool == "fc_norm" and isinstance(backbone, VisionTransformer):
        args |= {"global_pool": "avg", "final_norm": True, "fc_norm": True}
    side = config.data.img_size
    if side and tuple(cfg["input_size"][1:]) != (side, side):
        args |= resize_input(backbone, side, config.backbone, "data.img_size")
        cfg = backbone.pretrained_cfg
    drop_path = {"drop_path_rate": config.model.drop_path} if config.model.drop_path else {}
    with seeded_generator(config.seed):
        try:
            network = timm.create_model(name, pretrained_cfg=cfg, **args, **drop_path)
        except TypeError as error:
            raise InputError(
                f"{name} does not take model.drop_path {config.model.drop_path}: "
                f"{first_line(error)}"
            ) from None
        set_drop_path(network)
        _init_head(network, config.model.head_std)
    if not config.model.random_init:
        _load_backbone_weights(network, backbone)
    if config.system.checkpoint_activations:
        network.set_grad_checkpointing()
    network.model_args = args
    network.images_seen = getattr(backbone, "images_seen", None)
    network.pretrained_cfg = network.default_cfg = cfg | {"num_classes": num_classes}
    return network


def _init_head(network: nn.Module, std: float) -> None:
    """Draw the weights of the classifier, and set its bias to 0.

    Raises: InputError when the classifier is not a linear layer.
    """
    head = network.get_classifier()
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"{network.pretrained_cfg['architecture']} ends in more than a linear layer, so it "
            "cannot be fine-tuned"
        )
    nn.init.trunc_normal_(head.weight, std=std)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def _load_backbone_weights(network: nn.Module, backbone: nn.Module) -> None:
    """Copy the backbone's weights into the network; the head stays new.

    In ViTs, fc_norm replaces the final norm of the backbone and stays new too.

    Raises: InputError when other weights are missing or left over.
    """
    name = network.pretrained_cfg["architecture"]
    classifier = network.get_classifier()
    paths = [path for path, module in network.named_modules() if module is classifier]
    head = {f"{path}.{parameter}" for path in paths for parameter in ("weight", "bias")}
    is_vit = isinstance(network, VisionTransformer)
    try:
        missing, unexpected = network.load_state_dict(backbone.state_dict(), strict=False)
    except RuntimeError as error:
        raise InputError(f"the weights do not fit {name}: {first_line(error)}") from None
    unused = [key for key in unexpected if not (is_vit and key.startswith("norm."))]
    absent = [key for key in set(missing) - head if not (is_vit and key.startswith("fc_norm."))]
    if unused or absent:
        raise InputError(f"the weights do not fit {name}: see {sorted(unused + absent)[0]}")
