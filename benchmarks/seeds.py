"""Numbers of several seeds, as the tables show them."""

import statistics
from collections.abc import Sequence


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return the mean over seeds, and the deviation behind ± where there are several."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
