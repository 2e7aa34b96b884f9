"""Where in a backbone features are taken: blocks and poolings, several in one pass, or its token map."""

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
    """Number of a transformer block or a stage, from the end if negative; None: the last."""
    pool: Pool = "default"
    """What the model itself does; the mean of the patch tokens; the class token; both, side by side.

    default is the model's own output, and is therefore for the last block alone.
    """

    def __str__(self) -> str:
        if self == Tap():
            return "output"
        return f"{'last block' if self.block is None else f'block {self.block}'}, {self.pool}"


class Reader(Protocol):
    """What reads features off a backbone: normalised (B, C, H, W) -> parts (B, D_i)."""

    def __call__(
        self, images: torch.Tensor, indices: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """``indices`` (B,) are those of the images in their source, for who draws noise by them."""

    def columns(self, image: torch.Tensor) -> dict[Tap, slice]:
        """The columns of each tap, when the parts are put side by side; ``image`` is any one."""


class TapReader:
    """Several taps of a backbone in one pass of it: normalised (B, C, H, W) -> parts (B, D_i).

    A part is the vector of one block and one pooling. Those of a block are neighbours, the class
    token before the mean, so that the columns of cls+avg are those of both.

    Blocks are seen through the model's final norm, where it is one for all blocks (DINOv2,
    eval/linear.py): those of a plain ViT otherwise differ by orders of magnitude between tokens.

    Raises: InputError, naming the model, for a block or a class token that it has not.
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
        final, found = given if own_output else (None, given)
        vectors = {}
        if own_output:
            vectors[None, "default"] = self.model.forward_head(final)
        for block, tokens in zip(self._blocks, found, strict=True):
            grid, prefix = tokens if isinstance(tokens, tuple) else (tokens, None)
            vectors[block, "avg"] = grid.mean((2, 3))
            if self._takes_prefix:
                vectors[block, "cls"] = prefix[:, 0]
        return [vectors[part] for part in self.parts]

    def columns(self, image: torch.Tensor) -> dict[Tap, slice]:
        """The columns of each tap, when the parts are put side by side.

        ``image`` is any normalised one, (1, C, H, W).

        Raises: InputError when the model gives a map and not a vector, or not what it says.
        """
        try:
            vectors = self(image)
        except (AssertionError, TypeError) as error:  # which timm raises for what a model has not
            if not self._blocks:
                raise
            raise InputError(f"{self.name} does not give its blocks: {first_line(error)}") from None
        slices, first = {}, 0
        for part, vector in zip(self.parts, vectors, strict=True):
            if vector.ndim != 2:
                raise InputError(
                    f"{self.name} gives a map of shape {tuple(vector.shape[1:])} and not one "
                    "vector for an image: it has no global pooling"
                )
            slices[part] = slice(first, first := first + vector.shape[1])
        if self._blocks and self.parts[0][0] is None:
            alone = self.model(image)
            if (vectors[0] - alone).norm() > 1e-3 * alone.norm():
                raise InputError(
                    f"{self.name} gives another output beside its blocks than alone: take its "
                    "blocks without the pooling default"
                )
        ends = {tap: [slices[part] for part in self._parts(tap)] for tap in self.taps}
        return {tap: slice(spans[0].start, spans[-1].stop) for tap, spans in ends.items()}

    def _parts(self, tap: Tap) -> list[Part]:
        if tap == Tap():
            return [(None, "default")]
        if tap.pool == "default":
            raise InputError(
                f"block {tap.block} has no pooling of its own: ask for avg, cls or cls+avg"
            )
        blocks = len(getattr(self.model, "feature_info", ()))
        if not blocks or not hasattr(self.model, "forward_intermediates"):
            raise InputError(f"{self.name} gives its output alone, not {tap}: it is no timm model")
        block = -1 if tap.block is None else tap.block
        if not -blocks <= block < blocks:
            raise InputError(f"{self.name} has blocks 0 to {blocks - 1}, and no block {block}")
        pools = tap.pool.split("+")
        if "cls" in pools and not self._has_class_token():
            raise InputError(f"{self.name} has no class token: pool by avg")
        return [(block % blocks, pool) for pool in pools]

    def _has_class_token(self) -> bool:
        """Whether each of its blocks gives one."""
        given = inspect.signature(self.model.forward_intermediates).parameters
        return (
            "return_prefix_tokens" in given and getattr(self.model, "cls_token", None) is not None
        )


class TokenMapReader:
    """The map after the last block, behind the model's final norm: (B, C, H, W) -> [(B, h * w * D)].

    Tokens come row by row. Of raw pixels they are patches of ``pixel_patch`` pixels a side.

    Raises: InputError, naming the model, for one that is of neither kind.
    """

    def __init__(self, model: nn.Module, pixel_patch: int) -> None:
        self.model, self._patch = model, pixel_patch
        self.shape = (0, 0, 0)  # h, w, D
        config = getattr(model, "pretrained_cfg", {})
        self.name = config.get("architecture", type(model).__name__)
        self._pixels = self.name == "pixels"
        if self._pixels and config["input_size"][1] % pixel_patch:
            raise InputError(
                f"pixels:{config['input_size'][1]} can not be cut into patches of {pixel_patch} pixels"
            )
        if not self._pixels and not hasattr(model, "forward_intermediates"):
            raise InputError(f"{self.name} gives no token map: it is no timm model that has one")

    def __call__(
        self, images: torch.Tensor, indices: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        return [self.tokens(images).flatten(1)]

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """(B, h, w, D)."""
        if self._pixels:
            rows = images.shape[2] // self._patch
            return patchify(images, self._patch).unflatten(1, (rows, -1))
        (grid,) = self.model.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return grid.permute(0, 2, 3, 1)

    def columns(self, image: torch.Tensor) -> dict[Tap, slice]:
        """All of them are the last block's; from now on ``shape`` is known.

        Raises: InputError when the model gives no map.
        """
        try:
            self.shape = tuple(self.tokens(image).shape[1:])
        except (AssertionError, TypeError, ValueError) as error:  # of timm, for what is not there
            raise InputError(f"{self.name} gives no token map: {first_line(error)}") from None
        return {Tap(): slice(0, math.prod(self.shape))}
