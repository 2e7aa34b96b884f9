"""The installed packages, compared with what pyproject.toml asks for."""

import re
from collections.abc import Callable

_FOR_DEVELOPERS = ("test", "docs", "lint")  # extras that no run needs


def check_packages(
    requirements: list[str], version: Callable[[str], str | None]
) -> tuple[list[str], list[str]]:
    """Return a sentence for each package that is missing or too old, and for each optional extra.

    Args:
        requirements: in the form ``name>=version; extra == 'extra'``.
        version: returns the version of an installed package, or None.
    """
    problems: list[str] = []
    missing: dict[str, list[str]] = {}  # extra -> packages
    for requirement in requirements:
        found = re.match(r"([\w.-]+)(?:>=([\d.]+))?.*?(?:extra == ['\"]([\w-]+)|$)", requirement)
        name, least, extra = found.groups()
        present = version(name)
        if extra in _FOR_DEVELOPERS or not (least or extra):
            continue
        if present is None and extra:
            missing.setdefault(extra, []).append(name)
        elif present is None:
            problems.append(f"{name} is not installed: pip install '{name}>={least}'")
        elif least and _numbers(present) < _numbers(least):
            problems.append(f"{name} {present} is too old: pip install '{name}>={least}'")
    optional = [
        f"{', '.join(names)}, for what needs the extra {extra}: pip install 'ldae[{extra}]'"
        for extra, names in missing.items()
    ]
    return problems, optional


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, such as (2, 5, 1) for 2.5.1+cu121."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
