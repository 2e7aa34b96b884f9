"""``ldae show``: show the rows of the paper, or the settings of one row."""


def show(row: str = "", /, scale: str = "paper") -> None:
    """Show the rows of the paper as a table, or all settings of one row.

    Args:
        row: the name or number of a row; empty for the table.
        scale: the scale of the settings.
    """
    from ldae import trajectory, tree

    if row:
        found = trajectory.row(row)
        place = f"row {found.number}" if found.number else f"beside the rows, from {found.base}"
        print(f"# {place}, {found.name}: {found.summary}")
        print(tree.to_yaml(trajectory.config(row, scale)), end="")
        return
    print("  # row               top-1  FID-50K  what changes")
    for entry in (*trajectory.ROWS, *trajectory.BESIDE):
        accuracy, fid = (
            f"{number:.1f}" if number is not None else "-" for number in (entry.accuracy, entry.fid)
        )
        summary = entry.summary + (f" ({entry.base} changed)" if entry.base else "")
        print(f"{entry.number or '':3} {entry.name:17} {accuracy:>5}  {fid:>7}  {summary}")
    print("\nImageNet, 400 epochs, as published; linear probing of the encoder half.")
