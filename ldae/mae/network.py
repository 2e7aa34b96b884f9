"""A masked autoencoder: from uint8 images to the loss on the patches that are masked."""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from ldae.backbones.fold import build_vit
from ldae.errors import InputError
from ldae.mae.settings import MAEConfig
from ldae.masking import is_kept, kept_tokens, number_kept, restore
from ldae.models.contract import PlainViT
from ldae.models.vit import ViTParts, ViTShape, check_width, timm_args, vit_shape
from ldae.patches import (
    grid_side,
    patch_moments,
    patches_a_side,
    patchify,
    sincos_positions,
    unpatchify,
)
from ldae.pixel_statistics import PixelStatistics
from ldae.precision import bf16_autocast

MAE_URL = "https://arxiv.org/abs/2111.06377"
_MLP_RATIO = 4  # of the decoder
_LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class Masked(NamedTuple):
    """A batch of images as patches, and which of them the encoder sees."""

    patches: torch.Tensor
    """The normalised patches (B, N, D)."""
    kept: torch.Tensor
    """The indices of the visible patches, int64 (B, n)."""
    visible: torch.Tensor
    """The visible patches (B, n, D)."""


class Decoder(nn.Module):
    """The narrow decoder: features of the visible patches -> predictions of all patches.

    Args:
        width: size of the encoder's features.
        embed_dim, depth, num_heads: sizes of the decoder's own blocks.
        side: number of patches along an edge of the image.
        patch_dim: size D of a patch.

    Raises: InputError as ``check_width``.
    """

    pos_embed: torch.Tensor

    def __init__(
        self, width: int, embed_dim: int, depth: int, num_heads: int, side: int, patch_dim: int
    ) -> None:
        super().__init__()
        check_width(embed_dim, num_heads, "model.decoder_")
        block = {"qkv_bias": True, "norm_layer": _LAYER_NORM}
        self.embed = nn.Linear(width, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.register_buffer("pos_embed", _positions(embed_dim, side), persistent=False)
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, _MLP_RATIO, **block) for _ in range(depth))
        )
        self.norm = _LAYER_NORM(embed_dim)
        self.pred = nn.Linear(embed_dim, patch_dim)


class MAE(nn.Module):
    """A masked autoencoder (He et al. 2022) of an encoder that is a timm ViT.

    An image (C, H, W) is N patches of D = C p^2 numbers.

    Args:
        encoder: a ViT with a class token and a final norm; its positions are set here.
        decoder: a decoder for the encoder's width and its number of patches.
        pixels: the statistics by which images are normalised.
        mask_ratio: share of the patches that are masked.
        norm_pix_loss: predict each patch less its mean, divided by its standard deviation.
        seed: determines the masks, together with the image's position in the run.
        bf16: run the networks under autocast; the rest keeps the precision of the parameters.
        checkpoint_activations: recompute the activations of blocks in the backward pass.

    Raises: InputError when the ratio keeps no patch, or masks none.
    """

    compiled_parts = ("mask", "loss")  # beside the blocks

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: Decoder,
        pixels: PixelStatistics,
        *,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        seed: int = 0,
        bf16: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.pixels = encoder, decoder, pixels
        self.num_tokens = encoder.patch_embed.num_patches
        self.patch_size = encoder.patch_embed.patch_size[0]
        self.num_visible = number_kept(mask_ratio, self.num_tokens, "objective.mask_ratio")
        if self.num_visible == self.num_tokens:
            raise InputError(
                f"objective.mask_ratio {mask_ratio:g} masks none of the {self.num_tokens} tokens "
                "of an image"
            )
        self.norm_pix_loss, self.seed, self.bf16 = norm_pix_loss, seed, bf16
        self.checkpoint_activations = checkpoint_activations
        self.initialize()

    def initialize(self) -> None:
        """Initialise as MAE does: linear layers by Xavier, the patch embedding as one of them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.flatten(1))
        for token in (self.encoder.cls_token, self.decoder.mask_token):
            nn.init.normal_(token, std=0.02)
        side = grid_side(self.num_tokens)
        self.encoder.pos_embed.requires_grad_(False).copy_(_positions(self.encoder.embed_dim, side))

    def forward(
        self, images: torch.Tensor, positions: torch.Tensor, labels: Any = None
    ) -> torch.Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            images: uint8 (B, C, H, W).
            positions: int64 (B,), the number of each image in the run, which determines its mask.
            labels: are not read.
        """
        masked = self.mask(images, positions)
        return self.loss(masked, self.predict(masked))

    def mask(
        self, images: torch.Tensor, positions: torch.Tensor, visible: int | None = None
    ) -> Masked:
        """Cut images, uint8 (B, C, H, W), into patches, and mask them by ``positions`` (B,).

        ``visible`` patches stay, by default ``num_visible``.
        """
        patches = patchify(self.pixels.normalize(images), self.patch_size)  #      (B, N, D)
        kept = kept_tokens(self.seed, positions, self.num_tokens, visible or self.num_visible)
        index = kept.unsqueeze(-1).expand(-1, -1, patches.shape[-1])  #            (B, n, D)
        return Masked(patches, kept, patches.gather(1, index))

    def predict(self, masked: Masked) -> torch.Tensor:
        """Return the predictions (B, N, D) of all patches, in the precision of the network."""
        with bf16_autocast(masked.visible.device, self.bf16):
            return self.decode(self.encode(masked.visible, masked.kept), masked.kept)

    def encode(self, visible: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Return the encoder's features (B, 1 + n, W) of patches (B, n, D) at places ``kept``.

        The class token is the first.
        """
        vit = self.encoder
        embedding = vit.patch_embed.proj  # a convolution, which is a linear map of patches
        x = F.linear(visible, embedding.weight.flatten(1), embedding.bias)  #      (B, n, W)
        # Positions take the precision of the layers, which the residual stream has.
        x = x + vit.pos_embed[0, 1:][kept].to(x)
        first = (vit.cls_token + vit.pos_embed[:, :1]).to(x).expand(len(x), -1, -1)
        x = vit.norm_pre(torch.cat([first, x], dim=1))  #                          (B, 1 + n, W)
        return vit.norm(self._run(vit.blocks, x))

    def decode(self, features: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Return the predictions (B, N, D) of all patches for the encoder's features."""
        decoder = self.decoder
        x = decoder.embed(features)  #                                             (B, 1 + n, V)
        others = decoder.mask_token.to(x).expand(self.num_tokens, -1)  #               (N, V)
        x = torch.cat([x[:, :1], restore(x[:, 1:], kept, others)], dim=1)  #       (B, 1 + N, V)
        x = self._run(decoder.blocks, x + decoder.pos_embed.to(x))
        return decoder.pred(decoder.norm(x)[:, 1:])  #                             (B, N, D)

    def loss(self, masked: Masked, output: torch.Tensor) -> torch.Tensor:
        """Return the mean square of the error on the masked patches, a scalar.

        ``output`` are the predictions (B, N, D) of all patches.
        """
        target, _, _ = self.target(masked.patches)
        square = (output.to(target) - target).square().mean(-1)  #                 (B, N)
        is_masked = ~is_kept(masked.kept, self.num_tokens)
        return (square * is_masked).sum() / (len(square) * (self.num_tokens - self.num_visible))

    def target(
        self, patches: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | float]:
        """Return the target of patches (B, N, D), and the shift and scale that give them back."""
        if not self.norm_pix_loss:
            return patches, 0.0, 1.0
        mean, scale = patch_moments(patches)
        return (patches - mean) / scale, mean, scale

    def _run(self, blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        if self.checkpoint_activations and self.training:
            return checkpoint_seq(blocks, x, use_reentrant=False)
        return blocks(x)

    @torch.no_grad()
    def reconstruct(
        self, images: torch.Tensor, positions: torch.Tensor, visible: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return masked, reconstructed and original pictures of uint8 images (B, C, H, W).

        All are (B, C, H, W), with values in [0, 1]. Masked patches have the mean colour. In the
        reconstructed pictures they are predicted; where the target has no mean and variance of a
        patch, the true ones are added.

        Args:
            positions: int64 (B,), which determine the masks.
            visible: number of patches that the encoder sees, by default as many as in training.
        """
        masked = self.mask(images, positions, visible)
        patches, is_visible = masked.patches, is_kept(masked.kept, self.num_tokens).unsqueeze(-1)
        _, shift, scale = self.target(patches)
        predicted = self.predict(masked).to(patches) * scale + shift
        rows = (patches * is_visible, torch.where(is_visible, patches, predicted), patches)
        chans = self.pixels.in_chans
        pictures = (unpatchify(row, self.patch_size, chans) for row in rows)
        hidden, filled, clean = (self.pixels.denormalize(p).clamp(0, 1) for p in pictures)
        return hidden, filled, clean


def build(config: MAEConfig, num_classes: int = 0, bf16: bool = False) -> MAE:
    """Return the MAE of a configuration, with weights drawn from its seed and no statistics.

    Labels play no part, so ``num_classes`` is not read.

    Raises: InputError when settings do not fit together.
    """
    data, model = config.data, config.model
    shape = vit_shape(model.name, model.depth, model.embed_dim, model.num_heads)
    patch_size = model.patch_size or shape.patch_size
    side = patches_a_side(data.img_size, patch_size)
    torch.manual_seed(config.seed)
    pixels = PixelStatistics(data.img_size, data.in_chans)
    decoder = Decoder(
        shape.embed_dim,
        model.decoder_embed_dim,
        model.decoder_depth,
        model.decoder_num_heads,
        side,
        data.in_chans * patch_size**2,
    )
    return MAE(
        build_vit(_plain_vit(shape), pixels, patch_size, MAE_URL),
        decoder,
        pixels,
        mask_ratio=config.objective.mask_ratio,
        norm_pix_loss=config.objective.norm_pix_loss,
        seed=config.seed,
        bf16=bf16,
        checkpoint_activations=config.system.checkpoint_activations,
    )


def _plain_vit(shape: ViTShape) -> PlainViT:
    """Return the ViT of a shape with MAE's class token and final norm."""
    parts = ViTParts(class_token=True, act_layer="gelu", final_norm=True)
    return PlainViT(shape.name, timm_args(shape, parts) | {"global_pool": "token"})


def _positions(width: int, side: int) -> torch.Tensor:
    """Return sine-cosine positions (1, 1 + side^2, width), with zeros for the class token."""
    return torch.cat([torch.zeros(1, width), sincos_positions(width, side)])[None]
