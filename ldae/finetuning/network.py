"""Any timm backbone with a new classifier, and the loss that it is fine-tuned by."""

from typing import Any

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from ldae.backbones.open import adapt_cfg
from ldae.errors import InputError, first_line
from ldae.finetuning.settings import FinetuneConfig


class Classification(nn.Module):
    """The cross-entropy of a network's logits to soft targets; ``bf16`` runs it under autocast."""

    def __init__(self, network: nn.Module, layer_decay: float = 1.0, bf16: bool = False) -> None:
        super().__init__()
        self.network, self.layer_decay, self.bf16 = network, layer_decay, bf16
        self.loss = SoftTargetCrossEntropy()

    def forward(
        self, images: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """A scalar, of normalised images (B, C, H, W) and targets (B, num_classes)."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.network(images)
        return self.loss(logits.float(), targets)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """A group for each layer, with ``lr_scale`` = layer_decay^(layers between it and the head).

        Vectors and what the network names are not decayed.
        """
        own = getattr(self.network, "no_weight_decay", set)
        return param_groups_layer_decay(
            self.network,
            weight_decay=weight_decay,
            no_weight_decay_list=own(),
            layer_decay=self.layer_decay,
        )


def build_network(backbone: nn.Module, config: FinetuneConfig, num_classes: int) -> nn.Module:
    """A timm model of the backbone's architecture with a new head of ``num_classes``.

    The weights are those of the backbone; with ``model.random_init`` timm's random ones, which
    ``config.seed`` draws. Everything else about the two is the same. Its ``model_args`` and
    ``pretrained_cfg`` are what timm needs to build it again.

    Raises: InputError when the backbone is no timm model, ends in more than a linear layer, or does
        not take the image size or the drop path.
    """
    cfg = backbone.pretrained_cfg
    name = cfg["architecture"]
    if not hasattr(backbone, "reset_classifier"):
        raise InputError(f"{config.backbone} is no timm model: it can not be fine-tuned")
    args = backbone.model_args | {"num_classes": num_classes} | _pool_args(backbone, config)
    side = config.data.img_size
    if side and tuple(cfg["input_size"][1:]) != (side, side):
        args |= _resize(backbone, config)
        cfg = backbone.pretrained_cfg
    drop_path = {"drop_path_rate": config.model.drop_path} if config.model.drop_path else {}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(config.seed)
        try:
            network = timm.create_model(name, pretrained_cfg=cfg, **args, **drop_path)
        except TypeError as error:
            raise InputError(
                f"{name} does not take model.drop_path {config.model.drop_path}: {first_line(error)}"
            ) from None
        _init_head(network, config.model.head_std)
    if not config.model.random_init:
        _load(network, backbone)
    if config.system.checkpoint_activations:
        network.set_grad_checkpointing()
    network.model_args = args
    network.pretrained_cfg = network.default_cfg = cfg | {"num_classes": num_classes}
    return network


def _pool_args(backbone: nn.Module, config: FinetuneConfig) -> dict[str, Any]:
    if config.model.pool == "own" or not isinstance(backbone, VisionTransformer):
        return {}
    return {"global_pool": "avg", "final_norm": True, "fc_norm": True}


def _resize(backbone: nn.Module, config: FinetuneConfig) -> dict[str, Any]:
    """Make the backbone take another size, through timm; the argument that builds it so."""
    side, args = config.data.img_size, {}
    chans = backbone.pretrained_cfg["input_size"][0]
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", (1, 1))
    if any(side % part for part in patch):  # timm would leave the rest of the pixels out
        raise InputError(
            f"data.img_size {side} does not fit {config.backbone}: its patches are of {patch[0]} pixels"
        )
    try:
        if hasattr(backbone, "set_input_size"):
            backbone.set_input_size(img_size=(side, side))
            args = {"img_size": side}
        with torch.no_grad():
            backbone(torch.zeros(1, chans, side, side))
    except Exception as error:  # each architecture refuses in its own way
        raise InputError(
            f"data.img_size {side} does not fit {config.backbone}: {first_line(error)}"
        ) from None
    adapt_cfg(backbone, chans, side)
    return args


def _init_head(network: nn.Module, std: float) -> None:
    head = network.get_classifier()
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"{network.pretrained_cfg['architecture']} ends in more than a linear layer: it can not be "
            "fine-tuned"
        )
    nn.init.trunc_normal_(head.weight, std=std)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def _load(network: nn.Module, backbone: nn.Module) -> None:
    """All of the backbone but the norm that fc_norm stands for; the head and fc_norm stay new."""
    name = network.pretrained_cfg["architecture"]
    head = {f"{part}.{own}" for part in _classifiers(network) for own in ("weight", "bias")}
    renewed = isinstance(network, VisionTransformer)
    try:
        missing, unexpected = network.load_state_dict(backbone.state_dict(), strict=False)
    except RuntimeError as error:
        raise InputError(f"the weights do not fit {name}: {first_line(error)}") from None
    lost = [key for key in unexpected if not (renewed and key.startswith("norm."))]
    absent = [key for key in set(missing) - head if not (renewed and key.startswith("fc_norm."))]
    if lost or absent:
        raise InputError(f"the weights do not fit {name}: see {sorted(lost + absent)[0]}")


def _classifiers(network: nn.Module) -> list[str]:
    head = network.get_classifier()
    return [name for name, module in network.named_modules() if module is head]
