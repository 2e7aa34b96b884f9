"""``ldae show``: show the rows of the paper and their rivals, or the settings of one of them."""


def show(row: str = "", /, scale: str = "paper") -> None:
    """Show the rows of the paper and their rivals as a table, or all settings of one of them.

    Args:
        row: the name or number of a row, or the name of a rival; empty for the table.
        scale: the scale of the settings.

    Examples:
        >>> ldae.show("l_dae", scale="small")
    """
    from ldae import trajectory, tree
    from ldae.pretraining import recipes
    from ldae.runs import kinds

    if row:
        kind, name = recipes.find(row)
        place = kinds.KINDS[kind].noun
        if kind == "pretraining":
            found = trajectory.row(name)
            place = f"row {found.number}" if found.number else f"beside the rows, from {found.base}"
        print(f"# {place}, {name}: {recipes.recipes_of(kind).SUMMARIES[name]}")
        print(tree.to_yaml(recipes.config(name, scale)), end="")
        return
    print("  # row               top-1  FID-50K  what changes")
    for entry in trajectory.ALL:
        accuracy, fid = (
            f"{number:.1f}" if number is not None else "-" for number in (entry.accuracy, entry.fid)
        )
        summary = entry.summary + (f" ({entry.base} changed)" if entry.base else "")
        print(f"{entry.number or '':3} {entry.name:17} {accuracy:>5}  {fid:>7}  {summary}")
    for kind in kinds.pretrainings():
        if kind != "pretraining":
            for name, summary in recipes.recipes_of(kind).SUMMARIES.items():
                print(f"{'':3} {name:17} {'-':>5}  {'-':>7}  {summary} ({kinds.KINDS[kind].noun})")
    print("\nImageNet, 400 epochs, as published; linear probing of the encoder half.")
