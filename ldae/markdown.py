"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """Return a table as Markdown, each row in a line of its own.

    Args:
        header: the names of the columns.
        rows: the cells of each row.
        text: how many of the first columns are text; the others are numbers, aligned to the right.
    """
    lines = [header, ["---"] * text + ["--:"] * (len(header) - text), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
