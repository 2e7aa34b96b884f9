"""An extension of Griffe, which reads the docstrings of the reference.

The package writes short sections in one line, as in ``Raises: InputError when ...``. Griffe expects
the content of a section below its name, so the names of such sections are made bold text.
"""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(Returns|Yields|Raises|Source): (?=\S)", re.M)


class SectionsInOneLine(griffe.Extension):
    """Make the name of a section bold if its content begins in the same line."""

    def on_object(self, *, obj: griffe.Object, **context: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _SECTION.sub(r"**\1:** ", obj.docstring.value)
