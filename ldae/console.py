"""Lines and progress bars that a command prints."""

import sys
from typing import Any

from ldae import distributed, tree


def progress(total: int, what: str) -> Any:
    """A tqdm bar on rank 0, which a log file gets a line of only now and then."""
    from tqdm import tqdm

    from ldae.distributed import is_main

    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=what, leave=False, disable=not is_main(), mininterval=seconds)


def duration(seconds: float) -> str:
    """``93784`` as ``1d 02:03:04``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02d}:{minute:02d}:{second:02d}"
    return f"{days}d {clock}" if days else clock


def describe(config: Any, facts: dict[str, str]) -> str:
    """Return what a dry run prints: the settings as YAML, then each fact behind its name."""
    lines = (f"{name:<18}{fact}" for name, fact in facts.items())
    return "\n".join([tree.to_yaml(config), *lines])


def say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)
