"""``ldae diff``: show the settings that differ between two rows."""


def diff(first: str, second: str, /, scale: str = "paper") -> None:
    """Show the settings that differ between two rows.

    Args:
        first: the name or number of a row.
        second: the name or number of another row.
        scale: the scale of both rows.
    """
    from ldae import trajectory, tree

    old, new = (trajectory.config(name, scale) for name in (first, second))
    for name, (before, after) in tree.difference(old, new).items():
        print(f"{name:32} {before} -> {after}")
