"""Mutated files, as strategies of hypothesis."""

from typing import NamedTuple

from hypothesis import strategies as st

# Numbers at the ends of what fields of 1, 2, 4 and 8 bytes can hold.
_NUMBERS = [
    number.to_bytes(size, order)
    for size in (1, 2, 4, 8)
    for number in {0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1}
    for order in ("little", "big")
]


class Edit(NamedTuple):
    """A part of a file that is replaced by other bytes, or by none."""

    at: int | float
    """Place in bytes, from the end if negative; or, as a float, the share of the file before it."""
    removed: int
    inserted: bytes

    def apply(self, content: bytes) -> bytes:
        """Return the edited content."""
        at = int(self.at * len(content)) if isinstance(self.at, float) else self.at
        start = min(at, len(content)) if at >= 0 else max(len(content) + at, 0)
        return content[:start] + self.inserted + content[start + self.removed :]


def _edit(words: tuple[bytes, ...]) -> st.SearchStrategy[Edit]:
    place = st.integers(0, 79) | st.integers(-79, -1) | st.floats(0, 1, width=32)
    inserted = st.binary(max_size=8) | st.sampled_from(_NUMBERS)
    if words:
        inserted = st.sampled_from(words) | inserted
    # Headers stay in place when as many bytes are removed as inserted. The last is truncation.
    removed = st.just(-1) | st.integers(0, 9) | st.just(1 << 62)
    edits = st.builds(Edit, place, removed, inserted)
    return edits.map(lambda edit: edit._replace(removed=len(edit.inserted)) if edit.removed < 0 else edit)


def edits(words: tuple[bytes, ...] = ()) -> st.SearchStrategy[list[Edit]]:
    """Return a strategy of one to four edits, which insert ``words`` more often than other bytes."""
    return st.lists(_edit(words), min_size=1, max_size=4)


def mutate(content: bytes, edited: list[Edit]) -> bytes:
    """Return the content after all edits."""
    for edit in edited:
        content = edit.apply(content)
    return content
