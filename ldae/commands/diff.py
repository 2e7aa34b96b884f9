"""``ldae diff``: show the settings that differ between two rows."""

from typing import Any


def diff(first: str, second: str, /, scale: str = "paper") -> dict[str, tuple[Any, Any]]:
    """Show the settings that differ between two rows.

    Args:
        first: the name or number of a row.
        second: the name or number of another row.
        scale: the scale of both rows.

    Returns: dotted name -> the values of the first and the second row.

    Raises: InputError for a row that does not exist, and for rows that share no settings.

    Examples:
        >>> ldae.diff("patch_pca", "l_dae")["objective.target"]  # ("eps", "image")
    """
    from ldae import tree
    from ldae.errors import InputError
    from ldae.pretraining import recipes
    from ldae.runs.kinds import KINDS

    nouns = [KINDS[recipes.find(name)[0]].noun for name in (first, second)]
    if nouns[0] != nouns[1]:
        raise InputError(
            f"{first} is a recipe of {nouns[0]}, and {second} of {nouns[1]}: they share no settings"
        )
    old, new = (recipes.config(name, scale) for name in (first, second))
    changed = tree.difference(old, new)
    for name, (before, after) in changed.items():
        print(f"{name:32} {before} -> {after}")
    return changed
