"""Taps of a backbone: features of several blocks and poolings in one pass, or its token map."""

import inspect
import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from ldae.errors import InputError, first_line
from ldae.patches import patchify

Pool = Literal["default", "avg", "cls", "cls+avg"]
Part = tuple[int | None, Literal["default", "cls", "avg"]]


@dataclass(frozen=True)
class Tap:
    """The features after one block, pooled to one vector an image."""

    block: int | None = None
    """Number of a block or a stage, from 0, or from the end if negative; None: the last."""
    pool: Pool = "default"
    """avg: the mean of the patch tokens; cls: the class token; cls+avg: both, side by side.

    default is the model's own output, and therefore only for the last block.
    """

    def __str__(self) -> str:
        if self == Tap():
            return "output"
        return f"{'last block' if self.block is None else f'block {self.block}'}, {self.pool}"


def taps_of(blocks: tuple[int, ...], pools: tuple[Pool, ...] | None) -> tuple[Tap, ...]:
    """Combine each block with each pooling; without blocks, take the last one.

    By default the pooling is avg if blocks are given, and otherwise the model's own.
    """
    pools = pools or (("avg",) if blocks else ("default",))
    return tuple(Tap(block, pool) for block in blocks or (None,) for pool in pools)


class Reader(Protocol):
    """A reader of features from a backbone: normalised (B, C, H, W) -> parts (B, D_i)."""

    def __call__(
        self, images: torch.Tensor, indices: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Return the parts. A reader that adds noise draws it by ``indices`` (B,) in the source."""

    def columns(self, image: torch.Tensor) -> dict[Tap, slice]:
        """Return the columns of each tap in the concatenated parts, from any normalised image."""


class TapReader:
    """Several taps of a backbone in one pass of it: normalised (B, C, H, W) -> parts (B, D_i).

    A part is the vector of one block and one pooling. The parts of a block are adjacent, the class
    token before the mean, so that cls+avg is one range of columns.

    Outputs of blocks go through the model's final norm, if it has one for all blocks (DINOv2,
    eval/linear.py). Without it the tokens of a plain ViT differ by orders of magnitude.

    Raises: InputError, naming the model, when it lacks a block or a class token.
    """

    def __init__(self, model: nn.Module, taps: tuple[Tap, ...]) -> None:
        self.model, self.taps = model, taps
        self.name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
        parts = {part for tap in taps for part in self._parts(tap)}
        places = {"default": 0, "cls": 1, "avg": 2}
        self.parts: list[Part] = sorted(
            parts, key=lambda part: (-1 if part[0] is None else part[0], places[part[1]])
        )
        self._blocks = sorted({block for block, _ in self.parts if block is not None})
        self._takes_prefix = any(pool == "cls" for _, pool in self.parts)

    def __call__(
        self, images: torch.Tensor, indices: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        if not self._blocks:
            return [self.model(images)]
        own_output = (None, "default") in self.parts
        options = {"return_prefix_tokens": True} if self._takes_prefix else {}
        given = self.model.forward_intermediates(
            images,
            indices=self._blocks,
            norm=True,
            output_fmt="NCHW",
            stop_early=not own_output,
            intermediates_only=not own_output,
            **options,
        )
        final, maps = given if own_output else (None, given)
        vectors = {}
        if own_output:
            vectors[None, "default"] = self.model.forward_head(final)
        for block, tokens in zip(self._blocks, maps, strict=True):
            grid, prefix = tokens if isinstance(tokens, tuple) else (tokens, None)
            vectors[block, "avg"] = grid.mean((2, 3))
            if self._takes_prefix:
                vectors[block, "cls"] = prefix[:, 0]
        return [vectors[part] for part in self.parts]

    def columns(self, image: torch.Tensor) -> dict[Tap, slice]:
        """Return the columns of each tap in the concatenated parts.

        ``image`` is any normalised image, (1, C, H, W).

        Raises: InputError when the model outputs a map, lacks what it declares, or changes its
            output when blocks are read.
        """
        try:
            vectors = self(image)
        except (AssertionError, TypeError) as error:  # timm's errors for what a model lacks
            if not self._blocks:
                raise
            raise InputError(f"{self.name} does not give its blocks: {first_line(error)}") from None
        slices, first = {}, 0
        for part, vector in zip(self.parts, vectors, strict=True):
            if vector.ndim != 2:
                raise InputError(
                    f"{self.name} gives a map of shape {tuple(vector.shape[1:])} for an image, not "
                    "a vector: it has no global pooling"
                )
            slices[part] = slice(first, first := first + vector.shape[1])
        if self._blocks and self.parts[0][0] is None:
            output = self.model(image)
            if (vectors[0] - output).norm() > 1e-3 * output.norm():
                raise InputError(
                    f"{self.name} gives another output when its blocks are read too: take its "
                    "blocks without the pooling default"
                )
        spans = {tap: [slices[part] for part in self._parts(tap)] for tap in self.taps}
        return {tap: slice(parts[0].start, parts[-1].stop) for tap, parts in spans.items()}

    def _parts(self, tap: Tap) -> list[Part]:
        if tap == Tap():
            return [(None, "default")]
        if tap.pool == "default":
            raise InputError(
                f"block {tap.block} has no pooling of its own: ask for avg, cls or cls+avg"
            )
        blocks = len(getattr(self.model, "feature_info", ()))
        if not blocks or not hasattr(self.model, "forward_intermediates"):
            raise InputError(f"{self.name} gives only its output, not {tap}: it is no timm model")
        block = -1 if tap.block is None else tap.block
        if not -blocks <= block < blocks:
            raise InputError(
                f"{self.name} has blocks 0 to {blocks - 1}, or -{blocks} to -1, and no block "
                f"{block}"
            )
        pools = tap.pool.split("+")
        if "cls" in pools and not self._has_class_token():
            raise InputError(f"{self.name} has no class token: pool by avg")
        return [(block % blocks, pool) for pool in pools]

    def _has_class_token(self) -> bool:
        options = inspect.signature(self.model.forward_intermediates).parameters
        has_token = getattr(self.model, "cls_token", None) is not None
        return has_token and "return_prefix_tokens" in options


class TokenMapReader:
    """A reader of the token map behind the model's final norm: (B, C, H, W) -> [(B, h * w * D)].

    Tokens come row by row. The tokens of raw pixels are patches of ``pixel_patch`` pixels a side.

    Raises: InputError, naming the model, when it is neither a timm model nor raw pixels.
    """

    def __init__(self, model: nn.Module, pixel_patch: int) -> None:
        self.model, self._patch = model, pixel_patch
        self.shape = (0, 0, 0)  # h, w, D
        config = getattr(model, "pretrained_cfg", {})
        self.name = config.get("architecture", type(model).__name__)
        self._pixels = self.name == "pixels"
        if self._pixels and config["input_size"][1] % pixel_patch:
            raise InputError(
                f"pixels:{config['input_size'][1]} cannot be cut into patches of {pixel_patch} "
                "pixels"
            )
        if not self._pixels and not hasattr(model, "forward_intermediates"):
            raise InputError(f"{self.name} gives no token map: it is no timm model that has one")

    def __call__(
        self, images: torch.Tensor, indices: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        return [self.tokens(images).flatten(1)]

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Return the tokens, (B, h, w, D)."""
        if self._pixels:
            rows = images.shape[2] // self._patch
            return patchify(images, self._patch).unflatten(1, (rows, -1))
        (grid,) = self.model.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return grid.permute(0, 2, 3, 1)

    def columns(self, image: torch.Tensor) -> dict[Tap, slice]:
        """Set ``shape``, and return all columns as the last block's.

        Raises: InputError when the model outputs no map.
        """
        try:
            self.shape = tuple(self.tokens(image).shape[1:])
        except (AssertionError, TypeError, ValueError) as error:  # timm's, for what a model lacks
            raise InputError(f"{self.name} gives no token map: {first_line(error)}") from None
        return {Tap(): slice(0, math.prod(self.shape))}
