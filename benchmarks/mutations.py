"""Mutated files, as strategies of hypothesis."""

from typing import NamedTuple

from hypothesis import strategies as st

# Numbers at the ends of what fields of 1, 2, 4 and 8 bytes can hold.
_NUMBERS = [
    number.to_bytes(size, order)
    for size in (1, 2, 4, 8)
    for number in (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
    for order in ("little", "big")
]
_AS_INSERTED = -1  # as many bytes are removed as inserted


class Edit(NamedTuple):
    """A part of a file that is replaced by other bytes, or by none."""

    at: int | float
    """Place in bytes, from the end if negative; or, as a float, the share of the file before it."""
    removed: int
    """Number of bytes, or ``_AS_INSERTED``."""
    inserted: bytes

    def apply(self, content: bytes) -> bytes:
        """Return the edited content."""
        at = int(self.at * len(content)) if isinstance(self.at, float) else self.at
        start = min(at, len(content)) if at >= 0 else max(len(content) + at, 0)
        removed = len(self.inserted) if self.removed == _AS_INSERTED else self.removed
        return content[:start] + self.inserted + content[start + removed :]


def _edit(words: tuple[bytes, ...]) -> st.SearchStrategy[Edit]:
    place = st.integers(0, 79) | st.integers(-79, -1) | st.floats(0, 1, width=32)
    inserted = st.binary(min_size=1, max_size=8) | st.sampled_from(_NUMBERS) | st.just(b"")
    if words:
        inserted = st.sampled_from(words) | inserted
    # Most often the rest stays in its place; the last number cuts it off.
    removed = st.sampled_from((*[_AS_INSERTED] * 5, 0, 1, 4, 1 << 62))
    return st.builds(Edit, place, removed, inserted)


def edits(words: tuple[bytes, ...] = ()) -> st.SearchStrategy[list[Edit]]:
    """Return a strategy of one to three edits, which often insert one of ``words``."""
    return st.lists(_edit(words), min_size=1, max_size=3)


def mutate(content: bytes, edited: list[Edit]) -> bytes:
    """Return the content after all edits."""
    for edit in edited:
        content = edit.apply(content)
    return content
