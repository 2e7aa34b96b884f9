"""The interface of a denoiser, and of an encoder that is a plain ViT."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ldae.errors import InputError


class NoPlainViT(InputError):
    """The refusal of an encoder that no timm ViT can replace; the message says why."""


class PlainViT(NamedTuple):
    """A timm VisionTransformer: its registered name, and the arguments that change it."""

    name: str
    args: dict[str, Any]
    """All but img_size, patch_size, in_chans and num_classes, which the encoder does not set."""


class Denoiser(nn.Module):
    """A network that maps noised tokens (B, N, in_dim) and their t (B,) to tokens (B, N, out_dim).

    The N = side * side tokens cover a square image, row by row. The network is a sequence of
    stages, such as the blocks of a transformer. The first ``depth`` of its ``stages`` are the
    encoder, which is graded and exported.

    A subclass sets ``width``, ``depth`` and ``stages``, and defines ``forward``, ``condition``,
    ``encode``, ``taps`` and ``encoder_size``. A network that can be trained on a part of the tokens
    also defines ``add_mask_token``, and an encoder with one feature for each token
    ``encoder_copy``. An encoder that is a plain ViT at a fixed condition can be exported to timm,
    and can start from a plain ViT. Its class also defines ``embed``, ``plain_vit``,
    ``plain_settings``, ``plain_state`` and ``load_plain_state``.

    Args:
        side: number of tokens along an edge of the image.
        in_dim: size of an input token.
        out_dim: size of an output token.
        num_classes: number of labels; the label ``num_classes`` itself is the null label. A network
            of 0 labels is unconditional.
        checkpoint_activations: recompute activations in the backward pass, to save memory.
    """

    width: int
    """Size W of the features that ``encode`` returns."""
    depth: int
    """Number of stages of the encoder."""
    stages: int
    """Number of all stages."""
    embed: nn.Linear
    """Map from a token to the width of a plain ViT, before positions are added."""

    def __init__(
        self,
        side: int,
        in_dim: int,
        out_dim: int,
        num_classes: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.side, self.in_dim, self.out_dim = side, in_dim, out_dim
        self.num_classes, self.checkpoint_activations = num_classes, checkpoint_activations

    def forward(
        self,
        tokens: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the prediction (B, N, out_dim) for tokens (B, N, in_dim) at t (B,).

        Labels are int64 (B,); without them every label is the null label.

        Args:
            kept: indices, int64 (B, n), of the tokens that the encoder gets, after
                ``add_mask_token``; by default all. The decoder gets the mask token in place of the
                others, and predicts all tokens.
        """
        raise NotImplementedError

    def add_mask_token(self) -> None:
        """Create the learned token that stands in the decoder for tokens that are dropped.

        Raises: InputError when the network needs all tokens.
        """
        raise InputError(f"masking.ratio must be 0: {type(self).__name__} needs all tokens")

    def encoder_copy(self) -> "Denoiser":
        """Return a copy with which only ``condition`` and ``encode`` can be called.

        Its parameters and buffers have the names that they have in this network.

        Raises: InputError when ``encode`` does not return a feature for each token.
        """
        raise InputError(
            f"features.share must be 0: {type(self).__name__} has no features of single tokens"
        )

    def condition(self, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the condition of the stages (B, cond_dim), from t (B,) and labels (B,)."""
        raise NotImplementedError

    def encode(
        self, tokens: torch.Tensor, c: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the encoder's features (B, n, W) of tokens (B, N, in_dim) under condition c.

        Prefix tokens, such as a class token, are left out.

        Args:
            kept: indices, int64 (B, n), of the tokens that the encoder gets, each at its own
                position; by default all. Features are in the order of ``kept``.

        Raises: InputError when ``kept`` is given and the network needs all tokens.
        """
        raise NotImplementedError

    def taps(self, tokens: torch.Tensor, c: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the features (B, n, W) after each stage; n and W may differ between stages.

        The features after stage ``depth`` equal the result of ``encode``. A stage runs when its
        features are requested.
        """
        raise NotImplementedError

    @property
    def encoder_size(self) -> int:
        """Number of parameters in the encoder's stages."""
        raise NotImplementedError

    def plain_vit(self) -> PlainViT:
        """Return the timm ViT that the encoder is at a fixed condition.

        Its pooled features are the token mean of ``encode``.

        Raises: NoPlainViT when there is no such ViT.
        """
        raise NoPlainViT(
            f"the denoiser {type(self).__name__} is not a plain ViT, so timm has no such model"
        )

    @classmethod
    def plain_settings(cls, vit: nn.Module) -> dict[str, Any]:
        """Return the settings in ``model`` with which the encoder is the plain ViT ``vit`` of timm.

        Raises: NoPlainViT when no encoder of this class is one; InputError when there is no such
            encoder for ``vit``, with a message that continues a sentence about it.
        """
        raise NoPlainViT(f"the denoiser {cls.__name__} is not a plain ViT, which init_from needs")

    def plain_state(self, c: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state dict of ``plain_vit`` at condition c (1, cond_dim).

        The patch embedding is left out, because it also depends on the tokenizer.
        """
        raise NotImplementedError

    def load_plain_state(self, state: dict[str, torch.Tensor]) -> None:
        """Make the encoder a plain ViT with these weights, at every condition.

        This is the inverse of ``plain_state``; the patch embedding is not read. The positions are
        those of ``side`` * ``side`` patches, behind those of the prefix tokens.
        """
        raise NotImplementedError
