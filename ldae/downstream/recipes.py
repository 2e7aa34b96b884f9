"""Recipes by name and version, and their constants for each size of ViT."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldae.backbones.open import load_backbone
from ldae.errors import InputError, unknown
from ldae.runs.kinds import KINDS, kind_of, settings_of
from ldae.tree import difference, replace

WIDTHS = {"B": 768, "L": 1024, "H": 1280}
"""Embedding widths of the ViTs for which recipes are published."""


class Recipe(NamedTuple):
    """All constants of a recipe: ``constants`` for all sizes, ``sizes`` for each size.

    ``former`` holds the constants that former versions had instead, by version.
    """

    version: int
    constants: dict[str, Any]
    sizes: dict[str, dict[str, Any]]
    former: dict[int, dict[str, Any]] = {}


class Recipes(dict[str, Recipe]):
    """The recipes of one kind of run by name.

    Raises: InputError with the nearest name when there is no recipe of a name.
    """

    def __init__(self, kind: str, recipes: dict[str, Recipe]) -> None:
        super().__init__(recipes)
        self.kind = kind

    def __missing__(self, name: str) -> Recipe:
        raise unknown("there is no recipe", name, self, f", and there are {', '.join(self)}")

    def config(self, name: str, size: str = "B", version: int | None = None) -> Any:
        """Return the settings of a recipe for a size of ViT: B, L or H.

        ``version`` is by default the newest.

        Raises: InputError when there is no such recipe or size.
        """
        chosen = self[name]
        if size not in chosen.sizes:
            raise InputError(f"there is no size {size!r}; there are {', '.join(chosen.sizes)}")
        version = version or chosen.version
        changes = {"recipe": name, "version": version, "size": size}
        changes |= chosen.constants | chosen.sizes[size] | chosen.former.get(version, {})
        return replace(KINDS[self.kind].defaults(), changes)

    def config_on(
        self,
        backbone: str | Path,
        name: str,
        changes: Mapping[str, Any] | None,
        size: str,
        run: str | Path | None,
    ) -> Any:
        """Return the settings of a training on a backbone, see ``ldae.finetune_config``."""
        self[name]  # refuses a wrong name before the backbone is opened
        size = size or default_size(str(backbone))
        version = self._version_in(Path(run).expanduser(), name) if run else None
        named = {"backbone": str(backbone)} | dict(changes or {})
        return replace(self.config(name, size, version), named)

    def _version_in(self, run: Path, name: str) -> int | None:
        """Return the version of the recipe that the run in a folder began with, if any."""
        if kind_of(run) != self.kind:
            return None
        settings = settings_of(run, self.kind)
        return settings.version if settings.recipe == name else None

    def changed_constants(self, used: Any) -> dict[str, tuple[Any, Any]]:
        """Return the constants that differ from the recipe: name -> (recipe's, used value)."""
        chosen = self[used.recipe]
        constants = {*chosen.constants, *chosen.sizes[used.size]}
        changes = difference(self.config(used.recipe, used.size, used.version), used)
        return {name: values for name, values in changes.items() if name in constants}


def default_size(spec: str) -> str:
    """Return the smallest of B, L and H at least as wide as a backbone's features, or else H.

    Raises: InputError when the backbone cannot be opened.
    """
    is_pixels = spec.partition(":")[0] == "pixels"  # has no random weights
    network = load_backbone(spec, random_init=not is_pixels)  # random weights need no download
    features = getattr(network, "num_features", 0)
    return next((size for size, width in WIDTHS.items() if features <= width), "H")
