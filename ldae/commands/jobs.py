"""The verb that tells how the jobs below a folder stand."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

from ldae.errors import InputError
from ldae.runs.layout import JOB_RECORD, JOB_STATE, JOBS

_DEPTH = 3  # folders between the given one and that of jobs: runs/paper/l_dae/jobs
_STATES = {"COMPLETED": "done", "RUNNING": "running", "COMPLETING": "running"}


_STATES |= dict.fromkeys(("PENDING", "REQUEUED", "CONFIGURING", "SUSPENDED"), "waiting")


class Status(NamedTuple):
    """One job, for a line."""

    id: str
    state: str
    """running, waiting, done, failed or cancelled."""
    command: str
    told: str
    """The last line of its log, or what it waits for."""


def jobs(folder: Path = Path(), /) -> None:
    """List the jobs that were sent from run folders: what runs, waits, failed or is done.

    Args:
        folder: a run folder, or one with run folders up to three levels below it.
    """
    found = statuses(folder)
    if not found:
        raise InputError(f"no job was sent from {folder}, or from a run folder below it")
    width = max(len(status.id) for status in found)
    for status in found:
        print(f"{status.state:9}  {status.id:{width}}  ldae {status.command}")
        if status.told:
            print(f"{'':9}  {'':{width}}    {status.told}")
    counts = {status.state: 0 for status in found}
    for status in found:
        counts[status.state] += 1
    print(f"{len(found)} jobs: " + ", ".join(f"{n} {state}" for state, n in counts.items()))


def statuses(folder: Path) -> list[Status]:
    """Of all jobs below a folder, in the order in which they were sent."""
    levels = ("*/" * depth for depth in range(_DEPTH + 1))
    paths = [path for level in levels for path in folder.glob(f"{level}{JOBS}/*/{JOB_RECORD}")]
    found = ((_read(path), path.parent) for path in paths)
    records = sorted(
        ((record, place) for record, place in found if _is_job(record)),
        key=lambda pair: str(pair[0].get("sent", "")),
    )
    known = _known_to_slurm([record["id"] for record, _ in records if _is_slurms(record)])
    return [_status(record, place, known) for record, place in records]


def _is_job(record: dict) -> bool:
    """Whether a record is one that ``send`` writes, and not a damaged or an older one."""
    words = record.get("command")
    return isinstance(record.get("id"), str) and (
        isinstance(words, list) and all(isinstance(word, str) for word in words)
    )


def _status(record: dict, place: Path, known: dict[str, tuple[str, str]]) -> Status:
    state = _read(place / JOB_STATE)
    told = str(state.get("said", ""))
    if record["id"] in known:
        now, told_by_slurm = known[record["id"]]
        told = told_by_slurm or told
    elif state.get("state") == "running" and not _lives(state):
        now, told = "failed", "its process is gone"
    else:
        now = str(state.get("state", "waiting"))
    if now != "waiting" and not told:
        told = _last_line(place)
    return Status(*map(_printable, (record["id"], now, shlex.join(record["command"]), told)))


def _printable(text: str) -> str:
    """On one line, and with no power over the terminal."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _is_slurms(record: dict) -> bool:
    return record.get("cluster") == "slurm"


def _lives(state: dict) -> bool:
    """Whether the process of a job on this machine is there; on others it is believed to be."""
    if state.get("host") != socket.gethostname():
        return True
    try:
        os.kill(state["pid"], 0)
    except (ProcessLookupError, PermissionError, KeyError, TypeError, OverflowError):
        return False
    return True


def _known_to_slurm(ids: list[str]) -> dict[str, tuple[str, str]]:
    """Job -> (state, what it waits for or why it failed); nothing where there is no SLURM."""
    if not ids or not shutil.which("squeue"):
        return {}
    # By their arrays, for it knows no single task of one that was cancelled before it began.
    arrays = sorted({job.partition("_")[0] for job in ids})
    ended = ("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(arrays))
    queued = ("squeue", "--me", "-r", "-h", "-o", "%i|%T|%r")
    known = {}
    for command in (ended, queued):  # the queue's word is the newer one
        done = subprocess.run(command, capture_output=True, text=True)
        for line in done.stdout.splitlines() if done.returncode == 0 else ():
            job, word, *reason = line.split("|")
            word = word.split()[0] if word else ""  # "CANCELLED by 1000"
            state = _STATES.get(word, "cancelled" if word == "CANCELLED" else "failed")
            waits_for = reason[0] if reason and state == "waiting" else ""
            why = word if state == "failed" and word != "FAILED" else ""
            known |= dict.fromkeys(_tasks(job), (state, waits_for or why))
    return known


def _tasks(job: str) -> list[str]:
    """The jobs of an array that sacct has on one line, ``7_[0-2,4%3]``; or the one job."""
    array, bracket, tasks = job.partition("_[")
    found = []
    for part in re.split(r"[,%]", tasks.rstrip("]"))[: tasks.count(",") + 1] if bracket else ():
        first, _, last = part.partition("-")
        found += [f"{array}_{task}" for task in range(int(first), int(last or first) + 1)]
    return found or [job]


def _last_line(place: Path) -> str:
    """Of the log of rank 0, what the command itself said."""
    logs = sorted(place.glob("*_0_log.out"))
    if not logs:
        return ""
    with open(logs[0], "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]  # a bar's states end in \r
    own = [
        line for line in lines if line and not re.match(r"submitit \w+ \(|srun: |slurmstepd", line)
    ]
    return own[-1] if own else ""


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
