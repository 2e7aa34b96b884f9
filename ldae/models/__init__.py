"""The networks."""

from ldae.models.contract import Denoiser
from ldae.models.dit import DiT

DENOISERS: dict[str, type[Denoiser]] = {"dit": DiT}
"""The denoisers by the name that ``model.denoiser`` takes.

The settings of each are those of the configuration's branch of that name; DiT's are in ``model``.
"""
