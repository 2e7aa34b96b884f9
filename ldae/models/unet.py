"""A U-Net as a denoiser: the blocks of diffusers' UNet2DModel are its stages."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn

from ldae.errors import InputError, import_extra
from ldae.models.contract import Denoiser


class UNet(Denoiser):
    """The U-Net of DDPM (Ho et al. 2020), on the square map of tokens.

    The stages are the levels on the way down, the middle, and the levels on the way up. A level is
    a few residual blocks, perhaps with self-attention, and then a convolution that halves or
    doubles the side of the map.

    The encoder ends in the middle of the way up, as Xiang et al. 2023 (DDAE) found best: their code
    averages the map after the last residual block of the second of four up stages. They feed images
    noised at t = 11 of 1 .. 1000, which is t = 10 here, and report 90.05 % for a linear probe of
    this network on CIFAR-10, after 800 of 2,000 epochs (88.23 % at the end); the best network of
    their paper reaches 95.9 %. Features here differ in two ways: they are read after the
    convolution that doubles the map, and graders feed clean images, gamma_t z_0. ``ldae grid``
    probes every stage and t, with ``--inputs noisy`` on noised images.

    Source: Ho et al. 2020, appendix B, and its code, whose initialisation this is.

    Args:
        channels: width of each level; the map is halved from one level to the next.
        layers: residual blocks of a level on the way down; there is one more on the way up.
        attn_resolutions: sides of the maps whose levels have self-attention. The middle always has.
        dropout: rate inside of the residual blocks.
        groups: groups of the group normalisation.

    Raises: InputError when the sizes do not fit together, or diffusers is not installed.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        layers: int,
        attn_resolutions: tuple[int, ...],
        dropout: float,
        groups: int,
        *,
        side: int,
        in_dim: int,
        out_dim: int,
        num_classes: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(side, in_dim, out_dim, num_classes, checkpoint_activations)
        levels = len(channels)
        attends = [size in attn_resolutions for size in _sides(side, channels, attn_resolutions)]
        for width in channels:
            if width % groups:
                raise InputError(f"unet.groups {groups} does not divide unet.channels {width}")
        diffusers = import_extra("diffusers", "conv", "model.denoiser unet needs diffusers")
        self.network = diffusers.UNet2DModel(
            in_channels=in_dim,
            out_channels=out_dim,
            block_out_channels=channels,
            layers_per_block=layers,
            down_block_types=["AttnDownBlock2D" if part else "DownBlock2D" for part in attends],
            up_block_types=["AttnUpBlock2D" if part else "UpBlock2D" for part in attends[::-1]],
            dropout=dropout,
            norm_num_groups=groups,
            num_class_embeds=num_classes + 1 if num_classes else None,
            # Details of DDPM's code: one head, padding as in TensorFlow, and its embedding of t.
            attention_head_dim=None,
            downsample_padding=0,
            norm_eps=1e-6,
            flip_sin_to_cos=False,
            freq_shift=1,
            mid_block_scale_factor=1.0,  # not the integer, which would take compiled graphs apart
        )
        if checkpoint_activations:
            self.network.enable_gradient_checkpointing()
        up_stages = max(1, levels // 2)  # those that belong to the encoder
        self.depth, self.stages = levels + 1 + up_stages, 2 * levels + 1
        self.width = channels[-up_stages]
        self.initialize()

    def initialize(self) -> None:
        """Initialise as DDPM does: residual branches and the output start as zero."""
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self._blocks:
            for resnet in block.resnets:
                nn.init.zeros_(resnet.conv2.weight)
            for attention in getattr(block, "attentions", ()):
                nn.init.zeros_(attention.to_out[0].weight)
        nn.init.zeros_(self.network.conv_out.weight)
        if self.num_classes:
            nn.init.normal_(self.network.class_embedding.weight, std=0.02)

    def condition(self, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        c = self.network.time_embedding(self.network.time_proj(t).to(self.network.dtype))
        if not self.num_classes:
            return c
        if labels is None:
            labels = torch.full_like(t, self.num_classes)
        return c + self.network.class_embedding(labels)

    def encode(
        self, tokens: torch.Tensor, c: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        if kept is not None:
            raise InputError("a U-Net needs all tokens, so none can be masked")
        return next(islice(self.taps(tokens, c), self.depth - 1, None))

    def taps(self, tokens: torch.Tensor, c: torch.Tensor) -> Iterator[torch.Tensor]:
        return map(_tokens, self._maps(tokens, c))

    def forward(
        self,
        tokens: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert kept is None  # add_mask_token refuses masked training
        *_, x = self._maps(tokens, self.condition(t, labels))
        x = self.network.conv_act(self.network.conv_norm_out(x))
        return _tokens(self.network.conv_out(x))

    @property
    def encoder_size(self) -> int:
        encoder = self._blocks[: self.depth]
        return sum(parameter.numel() for block in encoder for parameter in block.parameters())

    @property
    def _blocks(self) -> list[nn.Module]:
        """The stages in order."""
        network = self.network
        return [*network.down_blocks, network.mid_block, *network.up_blocks]

    def _maps(self, tokens: torch.Tensor, c: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the map (B, W, height, width) after each stage."""
        network = self.network
        x = network.conv_in(tokens.transpose(1, 2).unflatten(2, (self.side, self.side)))
        skipped = (x,)
        for block in network.down_blocks:
            x, passed = block(x, c)
            skipped += passed
            yield x
        x = network.mid_block(x, c)
        yield x
        for block in network.up_blocks:
            count = len(block.resnets)
            x, skipped = block(x, skipped[-count:], c), skipped[:-count]
            yield x


def _sides(side: int, channels: tuple[int, ...], attn_resolutions: tuple[int, ...]) -> list[int]:
    """Return the sides of the maps of all levels.

    Raises: InputError when the map cannot be halved so often, or when no level has one of
        ``attn_resolutions``.
    """
    halvings = len(channels) - 1
    if side % 2**halvings:
        raise InputError(f"unet.channels: {side} tokens a side cannot be halved {halvings} times")
    sides = [side // 2**level for level in range(len(channels))]
    for resolution in attn_resolutions:
        if resolution not in sides:
            raise InputError(
                f"unet.attn_resolutions {resolution}: the maps of the levels have sides "
                f"{', '.join(map(str, sides))}"
            )
    return sides


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """Return a map (B, W, height, width) as tokens (B, N, W)."""
    return x.flatten(2).transpose(1, 2)
