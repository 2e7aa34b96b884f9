"""Lines and progress bars that a command prints."""

import errno
import sys
from typing import Any

from ldae import tree
from ldae.distributed import is_main


def progress(total: int, description: str, after: float = 0.0) -> Any:
    """Return a tqdm bar that only rank 0 shows: every 0.1 s on a terminal, every 30 s in a log.

    It is shown only when the work takes longer than ``after`` seconds.
    """
    from tqdm import tqdm

    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        desc=description,
        leave=False,
        disable=not is_main(),
        mininterval=seconds,
        delay=after,
    )


def format_duration(seconds: float) -> str:
    """Return a duration as a clock, such as ``1d 02:03:04`` for 93784 seconds."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02d}:{minute:02d}:{second:02d}"
    return f"{days}d {clock}" if days else clock


def describe(config: Any, facts: dict[str, str]) -> str:
    """Return what a dry run prints: the settings as YAML, then each fact behind its name."""
    lines = (f"{name:<18}{fact}" for name, fact in facts.items())
    return "\n".join([tree.to_yaml(config), *lines])


def print_main(line: str) -> None:
    """Print a line on rank 0 only; nothing on a terminal that is closed, so that a run can save."""
    if is_main():
        try:
            print(line, flush=True)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
