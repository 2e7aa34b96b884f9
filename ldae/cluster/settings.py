"""The settings of a job on a cluster, and the --slurm flags that set them."""

import itertools
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ldae.cluster.requeue import option
from ldae.errors import InputError
from ldae.help import call_with_words
from ldae.runs.kinds import kind_of
from ldae.tree import COUNT, NOT_NEGATIVE, check

FLAG = "--slurm"

# Options of sbatch that ``send`` sets. Other values would break logs, dependencies or requeues.
_RESERVED = (
    *("array", "chdir", "dependency", "error", "input", "kill-on-invalid-dep", "no-requeue"),
    *("open-mode", "output", "requeue", "signal"),
)

# Options of sbatch that have a setting; in a script that names them twice, one is lost.
_OWN = {
    **{name: name for name in ("partition", "nodes", "time", "account", "constraint")},
    **{name: name.replace("-", "_") for name in ("gpus-per-node", "cpus-per-task")},
    **dict.fromkeys(("ntasks", "ntasks-per-node"), "tasks_per_node"),
}


@dataclass(frozen=True)
class SlurmSettings:
    """The resources that a job asks the cluster for."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """slurm: by sbatch; local: in processes on this machine; debug: in this process, at once."""
    partition: str = ""
    """Partition; empty: the cluster's default, as for all empty settings."""
    nodes: Annotated[int, COUNT] = 1
    """Number of machines."""
    gpus_per_node: Annotated[int, NOT_NEGATIVE] = 0
    """GPUs per machine."""
    tasks_per_node: Annotated[int, NOT_NEGATIVE] = 0
    """Processes per machine; 0: one for each of its GPUs, or one without GPUs."""
    cpus_per_task: Annotated[int, NOT_NEGATIVE] = 0
    """CPUs per process, including its data workers; 0: the cluster's default."""
    time: str = "1:00:00"
    """Time limit in sbatch's formats: minutes, H:MM:SS, D-HH or D-HH:MM:SS. At the limit the job
    saves and is requeued, so a run may take longer."""
    warning: Annotated[int, NOT_NEGATIVE, tyro.conf.arg(metavar="SECONDS")] = 120
    """Seconds before the time limit at which the job is signalled to save."""
    account: str = ""
    """Account to charge."""
    constraint: str = ""
    """Features that the machines must have."""
    array_parallelism: Annotated[int, COUNT] = 16
    """Largest number of jobs of an array that run at the same time; on this machine, jobs with GPUs
    run one after the other."""
    setup: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LINE")] = ()
    """Shell line to run before the command, such as "module load cuda"; may be repeated."""
    extra: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Any other option of sbatch, as KEY=VALUE or KEY; may be repeated."""
    folder: str = ""
    """Folder of jobs/ with logs and code; empty: the command's run folder or the current folder."""

    @property
    def tasks(self) -> int:
        """The number of processes per machine."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def resources(self) -> str:
        """The machines, the GPUs and the time of a job in words."""
        machines = f"{self.nodes} machines, each with" if self.nodes > 1 else "1 machine with"
        gpus = f"{self.gpus_per_node or 'no'} GPU{'s' if self.gpus_per_node > 1 else ''}"
        return f"{machines} {gpus}, {self.time}"


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the command, and the --slurm flags with their values."""
    command, flags = [], []
    words = iter(argv)
    for word in words:
        if word != FLAG and not word.startswith(f"{FLAG}."):
            command.append(word)
            continue
        flags.append(word)
        if word != FLAG and "=" not in word:  # every setting takes one value
            flags += itertools.islice(words, 1)
    return command, flags


def parse_flags(
    flags: Sequence[str], base: SlurmSettings = SlurmSettings(), prog: str = "ldae COMMAND ..."
) -> SlurmSettings:
    """Return ``base`` with the changes of --slurm flags.

    Raises: SystemExit after --help, which prints all flags, and for flags that cannot be parsed.
    """

    def settings(
        slurm: Annotated[SlurmSettings, tyro.conf.UseAppendAction] = base,
    ) -> SlurmSettings:
        return slurm

    return call_with_words(
        settings,
        [flag for flag in flags if flag != FLAG],
        f"{prog} {FLAG}",
        "Send the command to a cluster as a job. When the job is preempted or reaches "
        "its time limit, it is requeued and goes on from what it has saved. A command that keeps "
        "nothing before its end, such as knn, begins anew. `ldae jobs` shows the state of the job.",
    )


def set_tasks(settings: SlurmSettings, devices: int) -> SlurmSettings:
    """Return settings by which each machine of a job has ``devices`` processes; 0: as they are.

    Raises: InputError when the settings name another number of processes or GPUs.
    """
    if not devices:
        return settings
    for name in ("tasks_per_node", "gpus_per_node"):
        if (value := getattr(settings, name)) not in (0, devices):
            raise InputError(
                f"--devices {devices} contradicts slurm.{name} {value}: leave out --devices, or "
                "name the same number"
            )
    return replace(settings, tasks_per_node=devices)


def parse_time_limit(time: str) -> int:
    """Return a time limit in sbatch's formats as minutes, rounded up.

    Raises: InputError for another format, and for less than a minute.
    """
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", time):
        raise InputError(f"slurm.time must be like 90, 1:30:00 or 2-00:00:00, not {time!r}")
    if dash or len(parts) == 3:
        hours, minute, second = (*map(int, parts), 0, 0)[:3]
    else:
        hours, minute, second = 0, *(*map(int, parts), 0)[:2]
    minutes = int(days or 0) * 1440 + hours * 60 + minute + (second > 0)
    if not minutes:
        raise InputError("slurm.time must be at least a minute")
    return minutes


def check_settings(settings: SlurmSettings) -> None:
    """Check that a job can be sent. Raises: InputError that names the first wrong setting."""
    check(settings, "slurm.")
    parse_time_limit(settings.time)
    for field in fields(settings):
        value = getattr(settings, field.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and re.search(r"[\x00-\x1f\x7f]", text):
                raise InputError(
                    f"slurm.{field.name} {text!r} must be one line without control characters"
                )
    for key_value in settings.extra:
        key = key_value.partition("=")[0]
        if not re.fullmatch(r"[a-z][a-z-]*", key):
            raise InputError(
                f"slurm.extra must be an option of sbatch as KEY=VALUE or KEY, not {key_value!r}"
            )
        if key in _RESERVED:
            raise InputError(f"slurm.extra {key} is set by ldae itself")
        if key in _OWN:
            raise InputError(f"slurm.extra {key}: use slurm.{_OWN[key]}")
    if settings.cluster == "slurm" and not shutil.which("sbatch"):
        raise InputError(
            "there is no sbatch on this machine; --slurm.cluster local runs the job without SLURM"
        )
    if settings.cluster == "local" and settings.nodes > 1:
        raise InputError(f"slurm.cluster local has one machine, not slurm.nodes {settings.nodes}")
    if settings.cluster == "debug" and settings.nodes * settings.tasks > 1:
        raise InputError(
            f"slurm.cluster debug has one process, not {settings.nodes * settings.tasks}"
        )


def folder_of(settings: SlurmSettings, argv: Sequence[str]) -> Path:
    """Return the folder in which a command's jobs/ goes.

    It is the folder of the settings, or else the run folder of the command: the value of --run, the
    first word that is a run folder, or the current folder.
    """
    if folder := settings.folder or option(argv, "--run"):
        return Path(folder).expanduser()
    paths = (Path(word).expanduser() for word in argv)
    return next(filter(kind_of, paths), Path())
