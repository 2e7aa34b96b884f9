"""Pre-train image encoders by denoising; export them to timm.

>>> import ldae
>>> config = ldae.config("l_dae", scale="small")
>>> backbone = ldae.load_backbone("exported/")
"""

from typing import Any

__all__ = ["Config", "config", "load_backbone", "__version__"]
__version__ = "0.1.0"  # the only place of the version: pyproject.toml reads it here
_MODULES = {
    "Config": "ldae.settings",
    "config": "ldae.pretraining.recipes",
    "load_backbone": "ldae.backbones.open",
}


def __getattr__(name: str) -> Any:
    # Imported when used: torch and timm take seconds, and `ldae --help` needs neither.
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'ldae' has no attribute {name!r}")
