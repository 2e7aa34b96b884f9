"""The registry of denoisers."""

from ldae.models.contract import Denoiser
from ldae.models.dit import DiT

DENOISERS: dict[str, type[Denoiser]] = {"dit": DiT}
"""The denoisers by the name that ``model.denoiser`` takes.

A denoiser gets the settings that are parameters of its constructor. They are the fields of a
settings class, which is a field of ``ldae.settings.Config`` with the denoiser's name. DiT's are the
field ``model``.
"""
