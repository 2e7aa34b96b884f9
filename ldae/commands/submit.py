"""``ldae submit``: send a pre-training to a cluster, and the jobs that follow it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ldae.cli.arguments import check_arguments
from ldae.cluster.array import run_array, send_array, wait_for
from ldae.cluster.requeue import option
from ldae.cluster.send import log_path
from ldae.cluster.settings import (
    SlurmSettings,
    check_settings,
    folder_of,
    parse_flags,
    split_flags,
)
from ldae.errors import InputError, first_line
from ldae.tree import AnyPath, check_known, read_toml, replace

_FIRST = "pretrain"


@dataclass(frozen=True)
class Stage:
    """One job of a pipeline."""

    name: str
    command: tuple[str, ...]
    """The verb and its arguments."""
    settings: SlurmSettings


def submit(pipeline: AnyPath, /, flags: Annotated[Sequence[str], tyro.conf.Suppress] = ()) -> None:
    """Submit a pre-training, and the jobs that follow when it is done.

    All jobs are submitted at once, and wait in the queue until the pre-training is done. Jobs with
    the same settings form an array. They do not run when the pre-training fails; when one of them
    fails, the others go on. --slurm flags change the settings of all jobs. With --slurm.cluster
    local or debug, the jobs run on this machine, and the command returns when all have ended.

    Args:
        pipeline: TOML file with the tables [pretrain] and [jobs.NAME]. Each has a command, and may
            have a table slurm, whose settings replace those of the table [slurm].
        flags: the --slurm flags of the command line.

    Raises: InputError that names the file and the key, before anything is submitted.

    Examples:
        >>> ldae.submit("pipeline.toml")
    """
    first, others = read_pipeline(Path(pipeline), flags)
    folder = folder_of(first.settings, first.command[1:])
    (job,) = send_array(_commands([first]), first.settings, folder)
    groups: dict[SlurmSettings, list[Stage]] = {}
    for stage in others:
        groups.setdefault(stage.settings, []).append(stage)
    if first.settings.cluster == "slurm":
        try:
            for settings, stages in groups.items():
                send_array(_commands(stages), settings, folder, after=[job.job_id])
        except InputError as error:
            raise InputError(
                f"{error}; {_FIRST} was sent before, as job {job.job_id}: scancel it before you "
                "submit again"
            ) from None
        return
    if wait_for([job], folder) != ["done"]:
        raise InputError(
            f"{_FIRST} failed, so no other job was started; its log is {log_path(job)}"
        )
    states = []
    for settings, stages in groups.items():
        states += run_array(_commands(stages), settings, folder)
    if failed := len(states) - states.count("done"):
        raise InputError(f"{failed} of {len(states)} jobs failed; `ldae jobs {folder}` lists them")


def _commands(stages: Sequence[Stage]) -> dict[str, tuple[str, ...]]:
    return {stage.name: stage.command for stage in stages}


def read_pipeline(path: Path, flags: Sequence[str] = ()) -> tuple[Stage, list[Stage]]:
    """Read a pipeline: the pre-training, and the jobs that follow it.

    Raises: InputError that names the file and the key.
    """
    try:
        return _parse_pipeline(read_toml(path), flags)
    except InputError as error:
        raise InputError(f"pipeline {path}: {error}") from None


def _parse_pipeline(tables: dict, flags: Sequence[str]) -> tuple[Stage, list[Stage]]:
    check_known("the pipeline", tables, ("slurm", _FIRST, "jobs"))
    if _FIRST not in tables:
        raise InputError(f"there is no [{_FIRST}]")
    base = _change_settings("[slurm]", SlurmSettings(), tables.get("slurm", {}))
    first = _parse_stage(f"[{_FIRST}]", _FIRST, tables[_FIRST], base, flags)
    if first.command[0] != _FIRST or not option(first.command, "--run"):
        raise InputError(f"[{_FIRST}] command must be {_FIRST} ... --run FOLDER")
    jobs = tables.get("jobs", {})
    if not isinstance(jobs, dict):
        raise InputError("jobs must be tables, [jobs.NAME]")
    others = [
        _parse_stage(f"[jobs.{name}]", name, table, base, flags) for name, table in jobs.items()
    ]
    for stage in others:
        if stage.settings.cluster != first.settings.cluster:
            raise InputError(
                f"[jobs.{stage.name}] has the cluster {stage.settings.cluster}, and [{_FIRST}] has "
                f"{first.settings.cluster}: no job waits for one of another cluster"
            )
    return first, others


def _parse_stage(
    key: str, name: str, table: Any, base: SlurmSettings, flags: Sequence[str]
) -> Stage:
    slurm_key = f"{key[:-1]}.slurm]"
    if not isinstance(table, dict):
        raise InputError(f"{key} must be a table, not {table!r}")
    check_known(key, table, ("command", "slurm"))
    command, flags_inside = split_flags(_split_words(key, table.get("command")))
    if flags_inside:
        raise InputError(f"{key} command: {flags_inside[0]} belongs in {slurm_key}")
    settings = _change_settings(slurm_key, base, table.get("slurm", {}))
    settings = parse_flags(flags, settings, prog="ldae submit ...")
    try:
        check_settings(settings)
        check_arguments(command[0], command[1:])
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    except SystemExit:  # the parser has printed what is wrong
        line = shlex.join(command)
        raise InputError(f"{key} command: ldae {line} is refused, see above") from None
    return Stage(name, tuple(command), settings)


def _split_words(key: str, command: Any) -> list[str]:
    """Return the words of a command, given as a list or as a line to split like a shell."""
    if isinstance(command, list) and command and all(isinstance(word, str) for word in command):
        return command
    if not isinstance(command, str) or not command.strip():
        raise InputError(f"{key} needs a command: a line, or a list of words; not {command!r}")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"{key} command: {first_line(error)}") from None
    return words[1:] if words[0] == "ldae" and len(words) > 1 else words


def _change_settings(key: str, base: SlurmSettings, table: Any) -> SlurmSettings:
    if not isinstance(table, dict):
        raise InputError(f"{key} must be a table, not {table!r}")
    try:
        return replace(base, table)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
