"""DiT as a denoiser: a stack of blocks; the first are the encoder, the others the decoder."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldae.masking import restore
from ldae.models.activations import ACTIVATIONS
from ldae.models.contract import Denoiser, NoPlainViT, PlainViT
from ldae.models.vit import (
    ViTParts,
    check_width,
    norm_eps_of,
    read_vit,
    timm_args,
    vit_shape,
)
from ldae.patches import is_sincos, sincos_positions

_FREQUENCIES, _MAX_PERIOD = 256, 10_000.0  # of the embedding of t


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale and shift x (B, N, W) by vectors (B, W)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedding(nn.Module):
    """The embedding of t: 256 sinusoids and a small MLP (DiT)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = _FREQUENCIES // 2
        omega = torch.exp(-math.log(_MAX_PERIOD) * torch.arange(half) / half)
        self.register_buffer("omega", omega, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (B, dim) of noise levels t (B,)."""
        angles = t[:, None].to(self.omega.dtype) * self.omega
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Block(nn.Module):
    """A ViT block whose two LayerNorms and two residual gates depend on t: adaLN-Zero (DiT)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        cond_dim: int,
        act_layer: str = "gelu_tanh",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=norm_eps)
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=ACTIVATIONS[act_layer])
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 6 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return tokens (B, N, dim) of tokens x (B, N, dim) under condition c (B, cond_dim)."""
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

        The bias of adaLN takes the LayerNorms, and LayerScale, if there is one, as the gates.
        """
        self.attn.load_state_dict(_below("attn.", state))
        self.mlp.load_state_dict(_below("mlp.", state))
        modulation = []
        for number in (1, 2):
            weight, bias = state[f"norm{number}.weight"], state[f"norm{number}.bias"]
            gate = state.get(f"ls{number}.gamma", torch.ones_like(bias))
            modulation += [bias, weight - 1, gate]
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
        """Return tokens (B, N, out_dim) of tokens x (B, N, dim) under condition c (B, cond_dim)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(Denoiser):
    """A diffusion transformer (Peebles and Xie 2023), cut into an encoder and a decoder.

    DiT's prediction of a variance is left out, because the paper's loss has no term for it.

    Args:
        name: a timm ViT with the shape of the encoder.
        depth, embed_dim, num_heads, mlp_ratio: replacements of the sizes of that ViT.
        cond_ratio: width of the conditioning as a share of ``embed_dim`` (paper: 1/4).
        decoder_depth, decoder_embed_dim, decoder_num_heads: sizes of the decoder, by default those
            of the encoder. A linear map leads to another width.
        vit: the fields of ``ViTParts``. The decoder has the activation and the eps too, but prefix
            tokens end with the encoder.

    Raises: InputError as ``vit_shape`` does.
    """

    def __init__(
        self,
        name: str,
        depth: int | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        cond_ratio: float = 0.25,
        decoder_depth: int | None = None,
        decoder_embed_dim: int | None = None,
        decoder_num_heads: int | None = None,
        vit: Mapping[str, Any] | None = None,
        *,
        side: int,
        in_dim: int,
        out_dim: int,
        num_classes: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(side, in_dim, out_dim, num_classes, checkpoint_activations)
        shape = self.shape = vit_shape(name, depth, embed_dim, num_heads, mlp_ratio)
        parts = self.parts = ViTParts(**(vit or {}))
        self.width, self.depth = shape.embed_dim, shape.depth
        decoder_width = decoder_embed_dim or self.width
        decoder_heads = decoder_num_heads or shape.num_heads
        check_width(decoder_width, decoder_heads, "model.decoder_")
        cond_dim = int(self.width * cond_ratio)

        shared = (shape.mlp_ratio, cond_dim, parts.act_layer, parts.norm_eps)  # by all blocks
        self.embed = nn.Linear(in_dim, self.width)
        pos_embed = sincos_positions(self.width, side)
        if parts.pos_embed == "learn":
            self.pos_embed = nn.Parameter(pos_embed)
        else:
            self.register_buffer("pos_embed", pos_embed, persistent=False)
        # The P prefix tokens (P, W), to which their positions are already added.
        self.num_prefix = parts.class_token + parts.reg_tokens
        tokens = nn.Parameter(torch.empty(self.num_prefix, self.width))
        self.prefix = tokens if self.num_prefix else None
        layer_norm = partial(nn.LayerNorm, self.width, eps=parts.norm_eps)
        self.norm_pre = layer_norm() if parts.pre_norm else nn.Identity()
        self.norm = layer_norm() if parts.final_norm else nn.Identity()
        self.t_embed = TimestepEmbedding(cond_dim)
        self.y_embed = nn.Embedding(num_classes + 1, cond_dim) if num_classes else None
        self.encoder = nn.ModuleList(
            Block(self.width, shape.num_heads, *shared) for _ in range(shape.depth)
        )
        self.decoder = nn.ModuleList(
            Block(decoder_width, decoder_heads, *shared)
            for _ in range(decoder_depth or shape.depth)
        )
        self.stages = len(self.encoder) + len(self.decoder)
        self.final = FinalLayer(decoder_width, out_dim, cond_dim)
        self.decoder_embed: nn.Linear | None = None
        if decoder_width != self.width:
            self.decoder_embed = nn.Linear(self.width, decoder_width)
            positions = sincos_positions(decoder_width, side)
            self.register_buffer("decoder_pos_embed", positions, persistent=False)
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
        if self.prefix is not None:
            nn.init.normal_(self.prefix, std=0.02)
        for module in (*self.encoder, *self.decoder, self.final):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final.linear.weight)

    def add_mask_token(self) -> None:
        width = self.final.linear.in_features
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))

    def encoder_copy(self) -> "DiT":
        copied = copy.deepcopy(self)
        del copied.decoder, copied.decoder_embed, copied.final, copied.mask_token
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
        return self._finish(self._run(self.encoder, self._placed(tokens, kept), c))

    def taps(self, tokens: torch.Tensor, c: torch.Tensor) -> Iterator[torch.Tensor]:
        x = self._placed(tokens)
        for block in self.encoder[:-1]:
            x = block(x, c)
            yield x[:, self.num_prefix :]
        x = self._finish(self.encoder[-1](x, c))
        yield x
        x = self._decoder_input(x)
        for block in self.decoder:
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
        x = self._decoder_input(x, kept)  #           (B, N, V), with V = W by default
        x = self._run(self.decoder, x, c)  #          (B, N, V)
        return self.final(x, c)  #                    (B, N, out_dim)

    def _placed(self, tokens: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Return the input of the first block (B, P + n, W): the prefix and the embedded tokens.

        The n tokens are all, or those of the indices ``kept``, each at its position.
        """
        pos_embed = self.pos_embed
        if kept is not None:
            tokens = tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, self.in_dim))
            pos_embed = pos_embed[kept]
        x = self.embed(tokens)
        x = x + pos_embed.to(x)  # the residual stream has the layers' precision
        if self.prefix is not None:
            x = torch.cat([self.prefix.to(x).expand(len(x), -1, -1), x], dim=1)
        return self.norm_pre(x).to(x)

    def _finish(self, x: torch.Tensor) -> torch.Tensor:
        """Return the encoder's features (B, n, W) for the output of its last block."""
        if self.num_prefix:
            x = x[:, self.num_prefix :]
        return self.norm(x).to(x)

    def _decoder_input(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Return the decoder's input (B, N, V) for features (B, n, W) of all or the kept tokens."""
        pos_embed = self.pos_embed
        if self.decoder_embed is not None:
            x, pos_embed = self.decoder_embed(x), self.decoder_pos_embed
        if kept is None:
            return x
        return restore(x, kept, (self.mask_token + pos_embed).to(x))

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
        name, parts = self.shape.name, self.parts
        args = timm_args(self.shape, parts)
        if parts.norm_eps != norm_eps_of(name):
            # In config.json a norm is a name, with timm's eps.
            if parts.norm_eps != ViTParts.norm_eps:
                raise NoPlainViT(
                    f"model.vit.norm_eps is {parts.norm_eps:g}, and timm has no {name} with it"
                )
            args["norm_layer"] = "layernorm"
        return PlainViT(name, args)

    def plain_state(self, c: torch.Tensor) -> dict[str, torch.Tensor]:
        pos_embed, state = self.pos_embed, {}
        if self.prefix is not None:
            pos_embed = torch.cat([torch.zeros_like(self.prefix), pos_embed])
            tokens = {"cls_token": self.prefix[: self.parts.class_token]}
            tokens["reg_token"] = self.prefix[self.parts.class_token :]
            state = {name: value[None] for name, value in tokens.items() if len(value)}
        state["pos_embed"] = pos_embed[None]
        state |= self.norm_pre.state_dict(prefix="norm_pre.")
        for number, block in enumerate(self.encoder):
            plain = block.plain_state(c)
            state |= {f"blocks.{number}.{name}": value for name, value in plain.items()}
        return state | self.norm.state_dict(prefix="norm.")

    @classmethod
    def plain_settings(cls, vit: nn.Module) -> dict[str, Any]:
        shape, parts = read_vit(vit)
        assert isinstance(vit, VisionTransformer)  # ``read_vit`` refuses others
        rows, columns = vit.patch_embed.grid_size
        constant = rows == columns and is_sincos(vit.pos_embed[0, -rows * columns :], atol=1e-5)
        parts = replace(parts, pos_embed="sincos" if constant else "learn")
        return asdict(shape) | {"vit": asdict(parts)}

    @torch.no_grad()
    def load_plain_state(self, state: dict[str, torch.Tensor]) -> None:
        pos_embed = state["pos_embed"][0]
        if self.prefix is not None:
            tokens = [state[name][0] for name in ("cls_token", "reg_token") if name in state]
            self.prefix.copy_(torch.cat(tokens) + pos_embed[: self.num_prefix])
        if self.parts.pos_embed == "learn":
            self.pos_embed.copy_(pos_embed[self.num_prefix :])
        self.norm_pre.load_state_dict(_below("norm_pre.", state))
        for number, block in enumerate(self.encoder):
            block.load_plain_state(_below(f"blocks.{number}.", state))
        self.norm.load_state_dict(_below("norm.", state))


def _below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the part of a state dict below ``prefix``, without the prefix."""
    return {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
