"""Print the lowest versions that pyproject.toml allows, as constraints for pip."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest_versions(project: dict) -> list[str]:
    """Return ``name==version`` for each requirement ``name>=version`` of a project table."""
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds = (re.fullmatch(r"([\w-]+)>=([\w.]+)", line) for group in groups for line in group)
    return sorted({f"{bound[1]}=={bound[2]}" for bound in bounds if bound})


if __name__ == "__main__":
    print("\n".join(lowest_versions(tomllib.loads(PYPROJECT.read_text())["project"])))
