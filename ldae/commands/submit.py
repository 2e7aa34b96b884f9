"""The verb that sends a whole study: a pre-training, and what is to be done with it afterwards."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ldae import cli
from ldae.cluster import requeue, send
from ldae.cluster.settings import Slurm, check_settings, folder_of, parse, split
from ldae.errors import InputError, first_line
from ldae.runs import layout
from ldae.tree import check_known, read_toml, replace

_FIRST = "pretrain"


@dataclass(frozen=True)
class Stage:
    """One job of a pipeline."""

    name: str
    command: tuple[str, ...]
    """The verb and its arguments."""
    settings: Slurm


def submit(pipeline: Path, /, flags: Annotated[Sequence[str], tyro.conf.Suppress] = ()) -> None:
    """Send a pre-training, and the jobs that follow it when it is done.

    Those are sent at once, as arrays of the jobs that ask for the same machines, and wait in the
    queue. One that fails does not stop the others. Flags of --slurm change what the file says for
    every job; --slurm.cluster local or debug runs all of it here, and takes its time.

    Args:
        pipeline: file of [pretrain] and [jobs.NAME], each with command and, where it differs from
            [slurm], a table slurm.
        flags: those of --slurm on the command line.

    Raises: InputError naming the file and the key, before anything is sent.
    """
    first, others = read(pipeline, flags)
    folder = folder_of(first.settings, first.command[1:])
    (job,) = _send([first], folder, after=())
    groups: dict[Slurm, list[Stage]] = {}
    for stage in others:
        groups.setdefault(stage.settings, []).append(stage)
    if first.settings.cluster == "slurm":
        for stages in groups.values():
            _send(stages, folder, after=[job.job_id])
        return
    if _finish([job], folder) == ["done"]:
        states = [state for stages in groups.values() for state in _run_here(stages, folder)]
        if failed := len(states) - states.count("done"):
            raise InputError(
                f"{failed} of {len(states)} jobs failed; `ldae jobs {folder}` lists them"
            )
    else:
        raise InputError(
            f"{_FIRST} failed, so nothing else was begun; its log is {send.log_of(job)}"
        )


def read(path: Path, flags: Sequence[str] = ()) -> tuple[Stage, list[Stage]]:
    """The pre-training of a pipeline, and the jobs that follow it.

    Raises: InputError naming the file and the key.
    """
    try:
        return _stages(read_toml(path), flags)
    except InputError as error:
        raise InputError(f"pipeline {path}: {error}") from None


def _stages(given: dict, flags: Sequence[str]) -> tuple[Stage, list[Stage]]:
    check_known("the pipeline", given, ("slurm", _FIRST, "jobs"))
    if _FIRST not in given:
        raise InputError(f"there is no [{_FIRST}]")
    base = _settings("[slurm]", Slurm(), given.get("slurm", {}))
    first = _stage(f"[{_FIRST}]", _FIRST, given[_FIRST], base, flags)
    if first.command[0] != _FIRST or not requeue.option(first.command, "--run"):
        raise InputError(f"[{_FIRST}] command must be {_FIRST} ... --run FOLDER")
    others = given.get("jobs", {})
    if not isinstance(others, dict):
        raise InputError("jobs must be tables, [jobs.NAME]")
    return first, [
        _stage(f"[jobs.{name}]", name, table, base, flags) for name, table in others.items()
    ]


def _stage(where: str, name: str, table: Any, base: Slurm, flags: Sequence[str]) -> Stage:
    if not isinstance(table, dict):
        raise InputError(f"{where} must be a table, not {table!r}")
    check_known(where, table, ("command", "slurm"))
    words = _words(where, table.get("command"))
    own, inside = split(words)
    if inside:
        raise InputError(f"{where} command: {inside[0]} belongs into {where[:-1]}.slurm]")
    settings = _settings(f"{where[:-1]}.slurm]", base, table.get("slurm", {}))
    settings = parse(flags, settings, prog="ldae submit ...")
    try:
        check_settings(settings)
        cli.parse(own[0], own[1:])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except SystemExit:  # the parser has said what it does not take
        raise InputError(f"{where} command: ldae {shlex.join(own)} is refused, see above") from None
    return Stage(name, tuple(own), settings)


def _words(where: str, command: Any) -> list[str]:
    """A command as a list of words, or as a line that is cut as a shell does."""
    if isinstance(command, list) and command and all(isinstance(word, str) for word in command):
        return command
    if not isinstance(command, str) or not command.strip():
        raise InputError(f"{where} needs a command: a line, or a list of words; not {command!r}")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"{where} command: {first_line(error)}") from None
    return words[1:] if words[0] == "ldae" and len(words) > 1 else words


def _settings(where: str, base: Slurm, table: Any) -> Slurm:
    if not isinstance(table, dict):
        raise InputError(f"{where} must be a table, not {table!r}")
    try:
        return replace(base, table)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _send(stages: Sequence[Stage], folder: Path, after: Sequence[str]) -> list[Any]:
    jobs = send.send([stage.command for stage in stages], stages[0].settings, folder, after)
    for job, stage in zip(jobs, stages):
        print(f"job {job.job_id}: {stage.name}; its log is {send.log_of(job)}", flush=True)
    return jobs


def _run_here(stages: Sequence[Stage], folder: Path) -> list[str]:
    """Run jobs of one kind on this machine, and return how they ended."""
    at_once = stages[0].settings.array_parallelism
    states = []
    for start in range(0, len(stages), at_once):
        states += _finish(_send(stages[start : start + at_once], folder, after=()), folder)
    return states


def _finish(jobs: Sequence[Any], folder: Path) -> list[str]:
    """Wait for jobs of this machine, which run now if they are of the cluster debug."""
    for job in jobs:
        try:
            while not job.done():
                time.sleep(0.2)
        except SystemExit:  # the status of one that ran in this process
            pass
    return [
        requeue.state(folder.absolute() / layout.JOBS / job.job_id).get("state", "failed")
        for job in jobs
    ]
