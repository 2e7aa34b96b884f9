"""The registry of denoisers."""

from ldae.models.contract import Denoiser
from ldae.models.dit import DiT
from ldae.models.unet import UNet

DENOISERS: dict[str, type[Denoiser]] = {"dit": DiT, "unet": UNet}
"""The denoisers by the name that ``model.denoiser`` takes.

A denoiser gets the settings that are parameters of its constructor. They are the fields of a
settings class, which is a field of ``ldae.settings.Config`` with the denoiser's name. A denoiser
without such a field, as DiT, gets those of the field ``model``.
"""
