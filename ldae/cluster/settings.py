"""What a job asks of a cluster, and the flags of --slurm that say it."""

import itertools
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from ldae.cluster.requeue import option
from ldae.errors import InputError
from ldae.runs.kinds import kind_of
from ldae.tree import COUNT, NOT_NEGATIVE, check

FLAG = "--slurm"

# What the sending itself sets; another value would lose the logs, the order or the requeue.
_OURS = (
    *("array", "chdir", "dependency", "error", "input", "kill-on-invalid-dep", "no-requeue"),
    *("open-mode", "output", "requeue", "signal"),
)


@dataclass(frozen=True)
class Slurm:
    """What a job asks of the cluster."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """slurm; local: processes of this machine, without SLURM; debug: this very process, now."""
    partition: str = ""
    """Partition; empty: the cluster's default, as for all that is empty."""
    nodes: Annotated[int, COUNT] = 1
    """Machines."""
    gpus_per_node: Annotated[int, NOT_NEGATIVE] = 0
    """GPUs of each machine."""
    tasks_per_node: Annotated[int, NOT_NEGATIVE] = 0
    """Processes of each machine; 0: one for each of its GPUs, or one."""
    cpus_per_task: Annotated[int, NOT_NEGATIVE] = 0
    """CPUs of each process, its data workers among them; 0: the cluster's default."""
    time: str = "1:00:00"
    """Time limit, as sbatch has it: minutes, H:MM:SS, D-HH or D-HH:MM:SS. The job saves before it
    ends and is requeued, so this is no limit of the run."""
    warning: Annotated[int, NOT_NEGATIVE] = 120
    """Seconds before the time limit at which the job is told to save."""
    account: str = ""
    """Account to charge."""
    constraint: str = ""
    """Features of the machines."""
    array_parallelism: Annotated[int, COUNT] = 16
    """Jobs of an array that may run at once."""
    setup: tuple[str, ...] = ()
    """A line of shell before the command, such as "module load cuda"; may be given again."""
    extra: tuple[str, ...] = ()
    """Any other option of sbatch, as KEY=VALUE or KEY; may be given again."""
    folder: str = ""
    """Where jobs/ with logs, records and code goes; by default the run folder of the command, or
    the current one."""

    @property
    def tasks(self) -> int:
        """Processes of each machine."""
        return self.tasks_per_node or self.gpus_per_node or 1


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line without the flags of --slurm, and these flags with their values."""
    own, flags = [], []
    words = iter(argv)
    for word in words:
        if word != FLAG and not word.startswith(f"{FLAG}."):
            own.append(word)
            continue
        flags.append(word)
        if word != FLAG and "=" not in word:  # every setting takes one value
            flags += itertools.islice(words, 1)
    return own, flags


def parse(flags: Sequence[str], base: Slurm = Slurm(), prog: str = "ldae COMMAND ...") -> Slurm:
    """``base`` changed by flags of --slurm; with --help among them, the list of all is printed."""
    import tyro

    def settings(
        slurm: Annotated[Slurm, tyro.conf.UseAppendAction] = base,
    ) -> Slurm:
        return slurm

    return tyro.cli(
        settings,
        prog=f"{prog} {FLAG}",
        description="Send the command to a cluster as a job. It is requeued when it is preempted or "
        "its time is up, and goes on where it was; `ldae jobs` tells how it stands.",
        args=[flag for flag in flags if flag != FLAG],
    )


def minutes(time: str) -> int:
    """A time limit of sbatch in whole minutes, rounded up. Raises: InputError for another text."""
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", time):
        raise InputError(f"slurm.time must be like 90, 1:30:00 or 2-00:00:00, not {time!r}")
    if dash or len(parts) == 3:
        hours, minute, second = (*map(int, parts), 0, 0)[:3]
    else:
        hours, minute, second = 0, *(*map(int, parts), 0)[:2]
    total = int(days or 0) * 1440 + hours * 60 + minute + (second > 0)
    if not total:
        raise InputError("slurm.time must be at least a minute")
    return total


def check_settings(settings: Slurm) -> None:
    """Raises: InputError for what no job can be sent with."""
    check(settings, "slurm.")
    minutes(settings.time)
    for part in fields(settings):
        value = getattr(settings, part.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and re.search(r"[\x00-\x1f\x7f]", text):
                raise InputError(
                    f"slurm.{part.name} {text!r} must be one line without control codes"
                )
    for key_value in settings.extra:
        key = key_value.partition("=")[0]
        if not re.fullmatch(r"[a-z][a-z-]*", key):
            raise InputError(
                f"slurm.extra must be KEY=VALUE or KEY as sbatch has it, not {key_value!r}"
            )
        if key in _OURS:
            raise InputError(f"slurm.extra {key} is set by ldae itself")
    if settings.cluster == "slurm" and not shutil.which("sbatch"):
        raise InputError("there is no sbatch here; --slurm.cluster local runs on this machine")
    if settings.cluster == "local" and settings.nodes > 1:
        raise InputError(f"slurm.cluster local is one machine, not slurm.nodes {settings.nodes}")
    if settings.cluster == "debug" and settings.nodes * settings.tasks > 1:
        raise InputError(
            f"slurm.cluster debug is one process, not {settings.nodes * settings.tasks}"
        )


def folder_of(settings: Slurm, argv: Sequence[str]) -> Path:
    """The run folder that a command is about: of --run, else its first argument's, else this one;
    or what the settings say."""
    if settings.folder:
        return Path(settings.folder)
    if run := option(argv, "--run"):
        return Path(run)
    first = Path(argv[0]) if argv and not argv[0].startswith("-") else Path()
    return first if kind_of(first) else Path()
