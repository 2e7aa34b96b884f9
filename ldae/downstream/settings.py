"""The settings that a fine-tuning and a detection share."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ldae.tree import COUNT


@dataclass(frozen=True)
class DownstreamDataSettings:
    """The images."""

    source: Annotated[str, tyro.conf.arg(aliases=["--data"], metavar="SOURCE")] = ""
    """Labelled images; the network is trained on their train split."""
    eval_source: Annotated[str, tyro.conf.arg(aliases=["--eval-data"], metavar="SOURCE")] = ""
    """Images to evaluate on; empty: the evaluation split of the source."""
    img_size: Annotated[int | None, COUNT, tyro.conf.arg(aliases=["--img-size"])] = None
    """Side of the square input of the network, in pixels; none: the backbone's."""
    in_chans: Annotated[int, COUNT] = 3
    """Channels, when the backbone is a timm name; other backbones have a fixed number."""
    bad_images: Literal["stop", "skip"] = "stop"
    """For an undecodable image: stop the run, or record it and use the next image instead."""


@dataclass(frozen=True)
class DownstreamConfig:
    """The backbone and the recipe of a fine-tuning or a detection."""

    backbone: tyro.conf.Fixed[str] = ""
    """The backbone that is trained or trained on, as load_backbone names it."""
    recipe: tyro.conf.Fixed[str] = ""
    """The recipe that the settings come from."""
    version: tyro.conf.Fixed[int] = 1
    """Version of the recipe; it changes whenever a constant of the recipe changes."""
    size: tyro.conf.Fixed[str] = "B"
    """Size of ViT for which the recipe's constants are used: B, L or H."""
