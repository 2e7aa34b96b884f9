"""The reference of the speed benchmarks: a step of DiT as its authors and most users run it.

Eager PyTorch, with timm's attention by ``scaled_dot_product_attention``, conditioning as wide as
the tokens, and fused AdamW. It gets noised tokens that are ready, and does nothing but the network,
a mean square and the update, so it does less than a step of ldae.

Source: Peebles and Xie 2023, Scalable Diffusion Models with Transformers, models.py.
"""

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn

from ldae.models.dit import TimestepEmbedding, modulate
from ldae.models.vit import ViTShape
from ldae.patches import sincos_positions


class Block(nn.Module):
    """A DiT block; the condition is as wide as the tokens."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        dim = shape.embed_dim
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads=shape.num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(
            dim, int(dim * shape.mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh")
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class ReferenceDiT(nn.Module):
    """DiT's stack on tokens (B, side * side, in_dim) and t (B,)."""

    def __init__(self, shape: ViTShape, blocks: int, side: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        dim = shape.embed_dim
        self.embed = nn.Linear(in_dim, dim)
        self.register_buffer("pos_embed", sincos_positions(dim, side))
        self.t_embed = TimestepEmbedding(dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, tokens: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x, c = self.embed(tokens) + self.pos_embed, self.t_embed(t)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))
