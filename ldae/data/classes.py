"""Classes of images whose labels are texts or numbers, not folders."""

from collections.abc import Iterable, Sequence

import numpy as np


def ordered(names: Iterable[str]) -> list[str]:
    """Return the distinct names of classes: by number if all are numbers, otherwise by text."""
    names = set(names)
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def classes_of(values: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the classes of labels, and the index of each label among them, int64 (N,)."""
    classes = ordered(values)
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[value] for value in values], np.int64)
