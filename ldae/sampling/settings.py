"""The settings of a sampling."""

from dataclasses import dataclass
from inspect import signature
from typing import Annotated, Literal

from ldae.errors import InputError
from ldae.sampling.samplers import SAMPLERS
from ldae.tree import COUNT, NOT_NEGATIVE, SHARE, Choice, check, check_own


@dataclass(frozen=True)
class Sampling:
    """All that decides, with the run's weights, what picture number n is."""

    sampler: Annotated[str, Choice("ldae.sampling.samplers:SAMPLERS")] = "ddim"
    """DDIM, DDPM's ancestral steps, or the probability-flow ODE by Euler or Heun."""
    steps: Annotated[int | None, COUNT] = None
    """Noise levels that the sampler visits; by default 50, or as many as there are."""
    eta: Annotated[float, SHARE] = 0.0
    """ddim: fresh noise in each step, as a share of DDPM's."""
    spacing: Literal["linear", "quadratic"] = "linear"
    """How the visited levels are spaced; quadratic: dense at low noise."""
    guidance: Annotated[float, NOT_NEGATIVE] = 1.0
    """Classifier-free guidance of class-conditional runs; 1: none."""
    labels: tuple[str, ...] = ()
    """Classes, by name or number, of which picture n gets number n mod their count; empty: all."""
    classifier: str = ""
    """A timm classifier that guides: a folder of `ldae linear --save`, or a timm name."""
    classifier_scale: Annotated[float, NOT_NEGATIVE] = 1.0
    """How strongly it does; 1 samples what it takes for the class, as the rule of Bayes has it."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Of the noise."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network's arithmetic."""


def check_settings(how: Sampling) -> None:
    """Raises: InputError for a setting that is out of range, or that nothing would read."""
    check(how)
    takers = {name: signature(sampler).parameters for name, sampler in SAMPLERS.items()}
    check_own(how, how.sampler, takers)
    if how.classifier_scale != 1 and not how.classifier:
        raise InputError("classifier_scale needs a --classifier")
