"""The settings of a sampling, and their check."""

from dataclasses import dataclass
from inspect import signature
from typing import Annotated, Literal

from ldae.errors import InputError
from ldae.sampling.samplers import SAMPLERS
from ldae.tree import COUNT, NOT_NEGATIVE, SHARE, KeyOf, check, check_used


@dataclass(frozen=True)
class SamplingSettings:
    """The settings that, with the weights of the run, determine sample n."""

    sampler: Annotated[str, KeyOf("ldae.sampling.samplers:SAMPLERS")] = "ddim"
    """DDIM, DDPM's ancestral steps, or the probability-flow ODE by Euler's or Heun's method."""
    steps: Annotated[int | None, COUNT] = None
    """Number of noise levels that the sampler visits; by default 50, or all if there are fewer."""
    eta: Annotated[float, SHARE] = 0.0
    """ddim: noise added in each step, as a share of DDPM's; 0: none, 1: DDPM."""
    spacing: Literal["linear", "quadratic"] = "linear"
    """Spacing of the visited levels; quadratic: dense at low noise."""
    clip: bool = False
    """Clip each predicted image to the range of pixels, as DDPM does. A network that predicts noise
    needs it after a short training, because its error of z_0 is many times larger at high noise."""
    guidance: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of classifier-free guidance, for class-conditional runs; 1: none."""
    labels: tuple[str, ...] = ()
    """Classes, by name or number; sample n gets the class at n mod their count; empty: all."""
    random_labels: bool = False
    """Draw the class of each sample at random among ``labels``, as DiT does."""
    classifier: str = ""
    """A timm classifier for guidance: a folder of `ldae linear --save`, or a timm name."""
    classifier_scale: Annotated[float, NOT_NEGATIVE] = 1.0
    """Strength of classifier guidance; 1 samples from the posterior given the class (Bayes)."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of the noise."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the network."""


def check_settings(sampling: SamplingSettings) -> None:
    """Check the settings of a sampling.

    Raises: InputError for a setting that is out of range, or that would have no effect.
    """
    check(sampling)
    takers = {name: signature(sampler).parameters for name, sampler in SAMPLERS.items()}
    check_used(sampling, sampling.sampler, takers)
    if sampling.classifier_scale != 1 and not sampling.classifier:
        raise InputError("classifier_scale needs a --classifier")
