"""The denoisers."""

from ldae.models.contract import Denoiser
from ldae.models.dit import DiT

DENOISERS: dict[str, type[Denoiser]] = {"dit": DiT}
"""The denoisers by the name that ``model.denoiser`` takes.

A denoiser gets the settings that are parameters of its constructor. They are in the configuration's
branch of that name; DiT's are in ``model``.
"""
