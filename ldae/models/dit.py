"""The denoiser: a stack of DiT blocks, whose first half is the encoder and whose second decodes."""

import math
from collections.abc import Iterator

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldae.models.vit import ViTShape
from ldae.patches import sincos_positions


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (B, N, W) scaled and shifted by one (B, W) vector an image."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedding(nn.Module):
    """t as 256 sinusoids through a small MLP (DiT)."""

    def __init__(self, dim: int, frequencies: int = 256, max_period: float = 10_000.0) -> None:
        super().__init__()
        half = frequencies // 2
        omega = torch.exp(-math.log(max_period) * torch.arange(half) / half)
        self.register_buffer("omega", omega, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None].to(self.omega.dtype) * self.omega
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Block(nn.Module):
    """A ViT block whose two LayerNorms and two residual gates depend on t: adaLN-Zero (DiT)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, cond_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 6 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Width to output tokens, through a last adaLN (DiT)."""

    def __init__(self, dim: int, out_dim: int, cond_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class Denoiser(nn.Module):
    """Tokens (B, N, in_dim) and their t to tokens (B, N, out_dim).

    ``side`` is the number of tokens along an edge of the image; ``shape`` describes the encoder,
    and the decoder has as many blocks. ``cond_ratio`` is the width of the conditioning as a share
    of the embedding's (paper, section 3: one quarter). ``num_classes`` of 0 is unconditional; the
    label ``num_classes`` itself is the null label.

    DiT's output also holds a variance; the paper's loss has no term for it, so it is left out.
    """

    def __init__(
        self,
        shape: ViTShape,
        side: int,
        in_dim: int,
        out_dim: int,
        cond_ratio: float = 0.25,
        num_classes: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.num_classes = num_classes
        self.checkpoint_activations = checkpoint_activations
        width, cond_dim = shape.embed_dim, int(shape.embed_dim * cond_ratio)

        def blocks() -> nn.ModuleList:
            make = (shape.num_heads, shape.mlp_ratio, cond_dim)
            return nn.ModuleList(Block(width, *make) for _ in range(shape.depth))

        self.embed = nn.Linear(in_dim, width)
        self.register_buffer("pos_embed", sincos_positions(width, side), persistent=False)
        self.t_embed = TimestepEmbedding(cond_dim)
        self.y_embed = nn.Embedding(num_classes + 1, cond_dim) if num_classes else None
        self.encoder = blocks()
        self.decoder = blocks()
        self.final = FinalLayer(width, out_dim, cond_dim)
        self.initialize()

    def initialize(self) -> None:
        """DiT's initialisation: every block starts as the identity, the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.t_embed.mlp[0], self.t_embed.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        if self.y_embed is not None:
            nn.init.normal_(self.y_embed.weight, std=0.02)
        for module in (*self.encoder, *self.decoder, self.final):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final.linear.weight)

    def fuse_attention(self, fused: bool) -> None:
        """Whether attention goes through scaled_dot_product_attention, as it does at first."""
        for block in (*self.encoder, *self.decoder):
            block.attn.fused_attn = fused

    def condition(self, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """t (B,) and labels (B,), the null label when there are none, as vectors (B, cond_dim)."""
        c = self.t_embed(t)
        if self.y_embed is None:
            return c
        if labels is None:
            labels = torch.full_like(t, self.num_classes)
        return c + self.y_embed(labels)

    def encode(self, tokens: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """The encoder half: tokens (B, N, in_dim) to features (B, N, W)."""
        return self._run(self.encoder, self.embed(tokens) + self.pos_embed, c)

    def outputs(self, tokens: torch.Tensor, c: torch.Tensor) -> Iterator[torch.Tensor]:
        """Features (B, N, W) after each block of the encoder, then after each of the decoder."""
        x = self.embed(tokens) + self.pos_embed
        for block in (*self.encoder, *self.decoder):
            x = block(x, c)
            yield x

    def forward(
        self, tokens: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        c = self.condition(t, labels)  #              (B, cond_dim)
        x = self.encode(tokens, c)  #                 (B, N, W)
        x = self._run(self.decoder, x, c)  #          (B, N, W)
        return self.final(x, c)  #                    (B, N, out_dim)

    def _run(self, blocks: nn.ModuleList, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
        return x
