"""torchvision's Mask R-CNN over a plain ViT of timm, and its loss."""

import math
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from ldae.backbones.preprocessing import preprocessing
from ldae.detection.jitter import fitted_size
from ldae.detection.pyramid import SCALES, SimpleFeaturePyramid
from ldae.detection.settings import DetectConfig, DetectModelSettings
from ldae.errors import InputError, first_line
from ldae.models.drop_path import DropPath
from ldae.precision import bf16_autocast, seeded_generator

_PATCHES = 64  # a side, ViTDet's: 1024 pixels for patches of 16
_ANCHOR = 8  # side of a map's anchors in strides of the map: 32 pixels at stride 4
_RATIOS = (0.5, 1.0, 2.0)  # of an anchor's height to its width


class PyramidBackbone(nn.Module):
    """A plain ViT and its pyramid, as torchvision's detectors take a backbone.

    Args:
        vit: a timm model for which ``plain_vit`` has set the size of the input.
        dim: channels of the maps.
        frozen: leave the ViT as it is, in eval mode and without gradients.
    """

    def __init__(self, vit: nn.Module, dim: int, frozen: bool) -> None:
        super().__init__()
        self.vit = vit.requires_grad_(False) if frozen else vit
        self.pyramid = SimpleFeaturePyramid(vit.num_features, dim)
        self.out_channels, self.frozen, self.bf16 = dim, frozen, False

    def train(self, mode: bool = True) -> "PyramidBackbone":
        super().train(mode)
        if self.frozen:
            self.vit.eval()
        return self

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return five float32 maps (B, dim, h, w) by name, the largest first.

        ``images`` are normalised (B, C, S, S). In training they are computed in bfloat16 if
        ``bf16`` is set. The heads, whose boxes need more digits, always compute in float32.
        """
        with bf16_autocast(images.device, self.bf16 and self.training):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                (tokens,) = self.vit.forward_intermediates(
                    images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
                )
            maps = self.pyramid(tokens)
        return {str(level): part.float() for level, part in enumerate(maps)}


class Detector(MaskRCNN):
    """Mask R-CNN with ViTDet's heads: LayerNorm behind each convolution but those of the RPN.

    Args:
        vit: see ``PyramidBackbone``.
        side: side S of the input.
        num_classes: number of classes, without the background.
        mean, std: pixel statistics of each channel, in [0, 1].
        model: the sizes of the heads.
    """

    def __init__(
        self,
        vit: nn.Module,
        side: int,
        num_classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        model: DetectModelSettings,
    ) -> None:
        dim, patch = model.dim, vit.patch_embed.patch_size[0]
        anchors = AnchorGenerator(
            tuple((_ANCHOR * patch / scale,) for scale in SCALES), (_RATIOS,) * len(SCALES)
        )
        convs = MaskRCNNHeads(dim, [dim] * model.mask_convs, 1, LayerNorm2d)
        super().__init__(
            PyramidBackbone(vit, dim, model.frozen),
            image_mean=mean,
            image_std=std,
            fixed_size=(side, side),  # images come in this size: they are only normalised
            size_divisible=1,
            _skip_resize=True,
            rpn_anchor_generator=anchors,
            rpn_head=RPNHead(dim, len(_RATIOS), model.rpn_convs),
            rpn_pre_nms_top_n_train=2 * model.proposals,
            rpn_pre_nms_top_n_test=model.proposals,
            rpn_post_nms_top_n_train=model.proposals,
            rpn_post_nms_top_n_test=model.proposals,
            box_head=FastRCNNConvFCHead(
                (dim, 7, 7), [dim] * model.box_convs, [model.box_dim], LayerNorm2d
            ),
            box_predictor=FastRCNNPredictor(model.box_dim, num_classes + 1),
            box_batch_size_per_image=model.rois,
            # One flat stack: torch.compile would take equal blocks for those of a transformer, and
            # the number of regions differs from step to step.
            mask_head=nn.Sequential(*(layer for block in convs for layer in block)),
            mask_predictor=MaskRCNNPredictor(dim, dim, num_classes + 1),
        )
        if not model.masks:
            heads = self.roi_heads
            heads.mask_roi_pool = heads.mask_head = heads.mask_predictor = None
        self.side = side

    def find(
        self, images: torch.Tensor, sizes: list[tuple[int, int]]
    ) -> list[dict[str, torch.Tensor]]:
        """Return the instances that are found in each image, in its own pixels.

        Args:
            images: (B, C, S, S) in [0, 1], as ``ScaleJitter`` places them at a scale of 1.
            sizes: width and height of each image before that.

        Returns: for each image ``boxes`` (N, 4), ``labels`` (N,), which count from 1, ``scores``
        (N,), and with masks ``masks``, float32 (N, 1, height, width) in [0, 1].
        """
        batch, _ = self.transform(list(images))
        maps = self.backbone(batch.tensors)
        # The heads work on whole inputs: torchvision takes the strides from the sizes given here.
        proposals, _ = self.rpn(batch, maps)
        found, _ = self.roi_heads(maps, proposals, batch.image_sizes)
        inner = [fitted_size(size, self.side)[::-1] for size in sizes]
        outer = [size[::-1] for size in sizes]
        for part, size in zip(found, inner):
            inside = clip_boxes_to_image(part["boxes"], size)
            kept = remove_small_boxes(inside, 1e-2)  # not those of the border beside the image
            part.update({name: values[kept] for name, values in part.items()})
        found = self.transform.postprocess(found, inner, outer)
        for part, size in zip(found, outer):  # after the masks, which fill the unclipped boxes
            part["boxes"] = clip_boxes_to_image(part["boxes"], size)
        return found

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's grouping of the parameters into layers.

        The embedding is the first layer, each block is one, and all that is new is the last.
        """
        vit = r"^backbone\.vit\."
        same_as_before = (99999,)  # timm's sign
        return {
            "stem": vit + r"(?!blocks\.|norm\.)",
            "blocks": [(vit + r"blocks\.(\d+)\.", None), (vit + r"norm\.", same_as_before)],
        }


class DetectionLoss(nn.Module):
    """The sum of Mask R-CNN's losses.

    Args:
        detector: the network.
        layer_decay: learning rate of a block divided by the learning rate of the next block.
        bf16: train the backbone and the pyramid in bfloat16.
    """

    def __init__(self, detector: Detector, layer_decay: float = 1.0, bf16: bool = False) -> None:
        super().__init__()
        self.detector, self.layer_decay = detector, layer_decay
        detector.backbone.bf16 = bf16

    def forward(
        self,
        images: torch.Tensor,
        positions: torch.Tensor,
        targets: list[dict[str, torch.Tensor]],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, a scalar, and its parts.

        Args:
            images: (B, C, S, S) in [0, 1].
            positions: not read; the loop seeds the samples of anchors and proposals by them.
            targets: for each image boxes, labels and masks, see ``OnDevice``.
        """
        losses = self.detector(list(images), targets)
        parts = {name: part.detach() for name, part in losses.items()}
        return sum(losses.values()), parts

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups with ``lr_scale`` = layer_decay^(distance from what is new).

        Vectors have no weight decay, nor have parameters that ``no_weight_decay`` of the ViT names.
        """
        no_weight_decay = getattr(self.detector.backbone.vit, "no_weight_decay", set)()
        return param_groups_layer_decay(
            self.detector,
            weight_decay=weight_decay,
            no_weight_decay_list=[f"backbone.vit.{name}" for name in no_weight_decay],
            layer_decay=self.layer_decay,
        )


def build_detector(backbone: nn.Module, config: DetectConfig, num_classes: int) -> Detector:
    """Return a detector around a backbone, whose weights become part of it.

    The new weights are drawn by ``config.seed``.

    Raises: InputError when the backbone is no plain ViT of timm, or does not take the image size.
    """
    transform = preprocessing(backbone)
    vit = plain_vit(backbone, config.backbone, config.data.img_size, config.model.drop_path)
    if config.system.checkpoint_activations:
        vit.set_grad_checkpointing()
    side = vit.patch_embed.img_size[0]
    with seeded_generator(config.seed):
        return Detector(vit, side, num_classes, transform.mean, transform.std, config.model)


def plain_vit(model: nn.Module, spec: str, side: int | None, drop_path: float) -> nn.Module:
    """Make a plain ViT of timm take images of ``side`` pixels, and remove its head, in place.

    Positions are interpolated. Patches whose side is no power of two are resized to the next one,
    as 14 to 16, since the strides of the pyramid's maps must be whole and powers of two.

    Args:
        spec: the model as the user named it, for errors.
        side: None for 64 patches.
        drop_path: rate of stochastic depth in the last block; it rises linearly from 0.

    Raises: InputError when the model is no plain ViT, or does not take such images.
    """
    needed = ("patch_embed", "blocks", "feature_info", "set_input_size", "forward_intermediates")
    if not all(hasattr(model, name) for name in needed) or not _keeps_its_side(model):
        raise InputError(f"{spec} is no plain ViT of timm, on which a detector can stand")
    patch = 2 ** max(2, round(math.log2(model.patch_embed.patch_size[0])))
    side = side or _PATCHES * patch
    if side % (2 * patch):
        raise InputError(
            f"data.img_size {side} must be a multiple of {2 * patch}, two patches of {spec}"
        )
    try:
        model.set_input_size(img_size=(side, side), patch_size=(patch, patch))
        model.prune_intermediate_layers(1)  # no block, but the head
    except Exception as error:  # architectures raise different types
        raise InputError(f"data.img_size {side} does not fit {spec}: {first_line(error)}") from None
    rates = torch.linspace(0, drop_path, len(model.blocks)).tolist()
    for block, rate in zip(model.blocks, rates):
        for name in [name for name, _ in block.named_children() if name.startswith("drop_path")]:
            setattr(block, name, DropPath(rate) if rate else nn.Identity())
    return model


def _keeps_its_side(model: nn.Module) -> bool:
    """Return whether all blocks of a timm model have maps of one size, that of its patches."""
    patch = getattr(model.patch_embed, "patch_size", (0,))
    return {info["reduction"] for info in model.feature_info} == {patch[0]} == {*patch}
