"""``ldae diff``: the settings that differ between two rows."""


def diff(first: str, second: str, /, scale: str = "paper") -> None:
    """The settings that differ between two rows.

    Args:
        first: a row's name or number.
        second: another's.
        scale: the scale of both configurations.
    """
    from ldae import trajectory, tree

    old, new = (trajectory.config(name, scale) for name in (first, second))
    for name, (before, after) in tree.difference(old, new).items():
        print(f"{name:32} {before} -> {after}")
