"""DiT as a denoiser: a stack of blocks; the first are the encoder, the others the decoder."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldae.masking import restore
from ldae.models.contract import Denoiser, PlainViT
from ldae.models.vit import vit_shape
from ldae.patches import sincos_positions


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale and shift x (B, N, W) by vectors (B, W)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class GELU(nn.Module):
    """GELU in its tanh approximation, as in DiT."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return _SigmoidGELU.apply(x)
        return F.gelu(x, approximate="tanh")


class _SigmoidGELU(torch.autograd.Function):
    """The same function as x sigmoid(2 u), since (1 + tanh u) / 2 = sigmoid(2 u).

    Compiled for a CPU, the exp of a sigmoid is many times faster than tanh. The backward pass
    computes the sigmoid anew, because it would be stored in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        y = x.float()
        return (y * _SigmoidGELU.gate(y)).to(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        y = x.float()
        gate = _SigmoidGELU.gate(y)
        two_u_slope = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * y * y)
        return (gradient.float() * gate * (1 + y * (1 - gate) * two_u_slope)).to(gradient)

    @staticmethod
    def gate(y: torch.Tensor) -> torch.Tensor:
        """Return sigmoid(2 u) for u = sqrt(2 / pi) (y + 0.044715 y^3)."""
        return torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y * y * y))


class TimestepEmbedding(nn.Module):
    """The embedding of t: 256 sinusoids and a small MLP (DiT)."""

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
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=GELU)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 6 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def plain_state(self, c: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the block at a fixed condition (1, cond_dim) as the state dict of timm's Block.

        Shift and scale become the bias and the weight of a LayerNorm. The gates scale the rows of
        the two projections that end on the residual.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[0].chunk(6)
        state = {
            **self.attn.state_dict(prefix="attn."),
            **self.mlp.state_dict(prefix="mlp."),
            **{"norm1.weight": 1 + scale1, "norm1.bias": shift1},
            **{"norm2.weight": 1 + scale2, "norm2.bias": shift2},
        }
        for name, gate in (("attn.proj", gate1), ("mlp.fc2", gate2)):
            state[f"{name}.weight"] = gate[:, None] * state[f"{name}.weight"]
            state[f"{name}.bias"] = gate * state[f"{name}.bias"]
        return state

    @torch.no_grad()
    def load_plain_state(self, state: dict[str, torch.Tensor]) -> None:
        """Make the block equal to the timm Block of a state dict, at every condition.

        The bias of adaLN takes the LayerNorms, and gates of 1.
        """
        self.attn.load_state_dict(_below("attn.", state))
        self.mlp.load_state_dict(_below("mlp.", state))
        modulation = []
        for number in (1, 2):
            weight, bias = state[f"norm{number}.weight"], state[f"norm{number}.bias"]
            modulation += [bias, weight - 1, torch.ones_like(bias)]
        self.adaLN_modulation[1].weight.zero_()
        self.adaLN_modulation[1].bias.copy_(torch.cat(modulation))


class FinalLayer(nn.Module):
    """The map from the width to output tokens, with a last adaLN (DiT)."""

    def __init__(self, dim: int, out_dim: int, cond_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(Denoiser):
    """A diffusion transformer (Peebles and Xie 2023), cut into an encoder and a decoder.

    DiT's prediction of a variance is left out, because the paper's loss has no term for it.

    Args:
        name: a timm ViT with the shape of the encoder.
        depth, embed_dim, num_heads: replacements of the sizes of that ViT.
        cond_ratio: width of the conditioning as a share of ``embed_dim`` (paper, section 3: 1/4).
        decoder_depth: blocks of the decoder; by default as many as the encoder has.

    Raises: InputError as ``vit_shape`` does.
    """

    def __init__(
        self,
        name: str,
        depth: int | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        cond_ratio: float = 0.25,
        decoder_depth: int | None = None,
        *,
        side: int,
        in_dim: int,
        out_dim: int,
        num_classes: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(side, in_dim, out_dim, num_classes, checkpoint_activations)
        shape = self.shape = vit_shape(name, depth, embed_dim, num_heads)
        decoder_depth = decoder_depth or shape.depth
        self.width, self.depth = shape.embed_dim, shape.depth
        self.stages = self.depth + decoder_depth
        cond_dim = int(self.width * cond_ratio)

        sizes = (self.width, shape.num_heads, shape.mlp_ratio, cond_dim)
        self.embed = nn.Linear(in_dim, self.width)
        self.register_buffer("pos_embed", sincos_positions(self.width, side), persistent=False)
        self.t_embed = TimestepEmbedding(cond_dim)
        self.y_embed = nn.Embedding(num_classes + 1, cond_dim) if num_classes else None
        self.encoder = nn.ModuleList(Block(*sizes) for _ in range(shape.depth))
        self.decoder = nn.ModuleList(Block(*sizes) for _ in range(decoder_depth))
        self.final = FinalLayer(self.width, out_dim, cond_dim)
        self.mask_token: nn.Parameter | None = None
        self.initialize()

    def initialize(self) -> None:
        """Initialise as DiT does: every block starts as the identity, the output as zero."""
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

    def add_mask_token(self) -> None:
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(self.width), std=0.02))

    def encoder_copy(self) -> "DiT":
        copied = copy.deepcopy(self)
        del copied.decoder, copied.final, copied.mask_token
        return copied

    def condition(self, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        c = self.t_embed(t)
        if self.y_embed is None:
            return c
        if labels is None:
            labels = torch.full_like(t, self.num_classes)
        return c + self.y_embed(labels)

    def encode(
        self, tokens: torch.Tensor, c: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._run(self.encoder, self._placed(tokens, kept), c)

    def taps(self, tokens: torch.Tensor, c: torch.Tensor) -> Iterator[torch.Tensor]:
        x = self._placed(tokens)
        for block in (*self.encoder, *self.decoder):
            x = block(x, c)
            yield x

    def forward(
        self,
        tokens: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        c = self.condition(t, labels)  #              (B, cond_dim)
        x = self.encode(tokens, c, kept)  #           (B, N, W), or the kept ones (B, n, W)
        if kept is not None:
            others = self.mask_token + self.pos_embed
            x = restore(x, kept, others.to(x))  #     (B, N, W)
        x = self._run(self.decoder, x, c)  #          (B, N, W)
        return self.final(x, c)  #                    (B, N, out_dim)

    def _placed(self, tokens: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tokens embedded with their positions: all, or the indices ``kept``."""
        pos_embed = self.pos_embed
        if kept is not None:
            tokens = tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, self.in_dim))
            pos_embed = pos_embed[kept]
        x = self.embed(tokens)
        return x + pos_embed.to(x)  # in the precision of the layers, which the residual stream has

    def _run(self, blocks: nn.ModuleList, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
        return x

    @property
    def encoder_size(self) -> int:
        return sum(parameter.numel() for parameter in self.encoder.parameters())

    def plain_vit(self) -> PlainViT:
        return PlainViT(
            self.shape.name,
            {
                "embed_dim": self.width,
                "depth": self.depth,
                "num_heads": self.shape.num_heads,
                "mlp_ratio": self.shape.mlp_ratio,
                "class_token": False,
                "global_pool": "avg",
                "final_norm": False,
                "fc_norm": False,
                "act_layer": "gelu_tanh",
            },
        )

    def plain_state(self, c: torch.Tensor) -> dict[str, torch.Tensor]:
        state = {"pos_embed": self.pos_embed[None]}
        for number, block in enumerate(self.encoder):
            plain = block.plain_state(c)
            state |= {f"blocks.{number}.{name}": value for name, value in plain.items()}
        return state

    def load_plain_state(self, state: dict[str, torch.Tensor]) -> None:
        # The positions are constants, so those of ``state``, perhaps of another size, are not read.
        for number, block in enumerate(self.encoder):
            block.load_plain_state(_below(f"blocks.{number}.", state))


def _below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the part of a state dict below ``prefix``, without the prefix."""
    return {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
