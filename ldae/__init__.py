"""Pre-train image encoders by denoising; grade them, sample from them, export them to timm.

Every command of ``ldae`` is a function here, and ``__init__.pyi`` lists all names.

>>> import ldae
>>> changes = {"data.source": "photos/", "optim.epochs": 100}
>>> run = ldae.pretrain(ldae.config("l_dae", scale="small", changes=changes), "runs/photos")
>>> ldae.knn("runs/photos", "labelled/", protocol=ldae.KNNProtocol(k=(20,)))["results"]
>>> clean, noised, denoised = run.denoise(run.images(8), t=500)
>>> backbone = ldae.load_backbone(ldae.export("runs/photos", "exported"))

A function raises ``InputError`` for wrong input, in one sentence that names the file or the
setting, and ``Interrupted`` after Ctrl-C, when all progress is saved.
"""

import functools
from typing import Any

__version__ = "0.1.0"  # the only place of the version: pyproject.toml reads it here


@functools.cache
def _modules() -> dict[str, str]:
    """Return the module of each public name, from the imports that type checkers read."""
    import ast
    from pathlib import Path

    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [part for part in stub.body if isinstance(part, ast.ImportFrom)]
    return {alias.name: str(part.module) for part in imports for alias in part.names}


def __getattr__(name: str) -> Any:
    # Imported when used: torch and timm take seconds, and `ldae --help` needs neither.
    if name == "__all__":
        return [*_modules(), "__version__"]
    if not name.startswith("__") and name in _modules():
        from importlib import import_module

        return getattr(import_module(_modules()[name]), name)
    raise AttributeError(f"module 'ldae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_modules(), "__version__"]  # so that notebooks complete the names
