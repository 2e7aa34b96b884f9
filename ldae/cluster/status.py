"""The states of the jobs sent from a folder: by SLURM's answers, or else by their own records."""

import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

from ldae.cluster.requeue import read_state
from ldae.files import read_object
from ldae.runs.layout import JOB_RECORD, JOBS

_DEPTH = 3  # levels between the given folder and a run folder, such as runs/paper/l_dae
_STATES = {"COMPLETED": "done", "RUNNING": "running", "COMPLETING": "running"}
_STATES |= dict.fromkeys(("PENDING", "REQUEUED", "CONFIGURING", "SUSPENDED"), "waiting")


class Status(NamedTuple):
    """One job, as it is printed."""

    id: str
    state: str
    """running, waiting, done, failed or cancelled."""
    command: str
    message: str
    """The reason of the state, or else the last line of the log."""


def read_statuses(folder: Path) -> list[Status]:
    """Return all jobs below a folder, in the order in which they were sent."""
    levels = ("*/" * depth for depth in range(_DEPTH + 1))
    paths = [path for level in levels for path in folder.glob(f"{level}{JOBS}/*/{JOB_RECORD}")]
    pairs = ((read_object(path), path.parent) for path in paths)
    records = sorted(
        ((record, job_folder) for record, job_folder in pairs if _is_job(record)),
        key=lambda pair: str(pair[0].get("sent", "")),
    )
    ids = [record["id"] for record, _ in records if record.get("cluster") == "slurm"]
    slurm = _query_slurm(ids)
    return [_status(record, job_folder, slurm) for record, job_folder in records]


def _is_job(record: dict) -> bool:
    """Return whether a record has what ``send`` writes; damaged and older records do not."""
    words = record.get("command")
    return isinstance(record.get("id"), str) and (
        isinstance(words, list) and all(isinstance(word, str) for word in words)
    )


def _status(record: dict, job_folder: Path, slurm: dict[str, tuple[str, str]] | None) -> Status:
    """Return the status of a job. SLURM's answer goes before the job's own record.

    ``slurm`` is what ``_query_slurm`` returns.
    """
    recorded = read_state(job_folder)
    is_open = recorded.get("state", "waiting") in ("waiting", "running")
    message = str(recorded.get("said", ""))
    if slurm and record["id"] in slurm:
        state, reason = slurm[record["id"]]
        message = reason or message
    elif slurm is not None and record.get("cluster") == "slurm" and is_open:
        state, message = "cancelled", "SLURM does not know it any more"
    elif is_open and not _is_alive(recorded if recorded.get("state") == "running" else record):
        state, message = "failed", "its process is gone"
    else:
        state = str(recorded.get("state", "waiting"))
    if state != "waiting" and not message:
        message = _last_line(job_folder)
    return Status(*map(_printable, (record["id"], state, shlex.join(record["command"]), message)))


def _printable(text: str) -> str:
    """Escape what would break the line or control the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _is_alive(record: dict) -> bool:
    """Return whether the process that a record names exists; on another machine it is assumed to.

    It is rank 0 of a job that runs, and the process that starts a job that waits.
    """
    if record.get("host") != socket.gethostname():
        return True
    try:
        os.kill(record["pid"], 0)
    except (ProcessLookupError, PermissionError, KeyError, TypeError, OverflowError):
        return False
    return True


def _query_slurm(ids: list[str]) -> dict[str, tuple[str, str]] | None:
    """Return {job: (state, reason for waiting or failing)}; None where SLURM does not answer."""
    if not ids or not shutil.which("squeue"):
        return None
    # Whole arrays, because sacct does not know a single task that was cancelled before its start.
    arrays = sorted({job.partition("_")[0] for job in ids})
    sacct = ("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(arrays))
    squeue = ("squeue", "--me", "-r", "-h", "-o", "%i|%T|%r")
    answers: dict[str, tuple[str, str]] = {}
    whole = os.environ | {"SLURM_BITSTR_LEN": "0"}  # otherwise long lists of tasks are cut
    for command in (sacct, squeue):  # squeue is more up to date
        if not shutil.which(command[0]):
            continue
        done = subprocess.run(command, capture_output=True, text=True, env=whole)
        if done.returncode and command is squeue:
            return answers or None
        if done.returncode:  # without accounting
            continue
        for line in done.stdout.splitlines():
            job, word, *reason = line.split("|")
            word = word.split()[0] if word else ""  # "CANCELLED by 1000"
            state = _STATES.get(word, "cancelled" if word == "CANCELLED" else "failed")
            waits_for = reason[0] if reason and state == "waiting" else ""
            failure = word if state == "failed" and word != "FAILED" else ""
            answers |= dict.fromkeys(_expand_array(job), (state, waits_for or failure))
    return answers


def _expand_array(job: str) -> list[str]:
    """Return the job ids in one line of sacct, where ``7_[0-2,4%3]`` stands for several tasks."""
    array, bracket, tasks = job.partition("_[")
    if not bracket:
        return [job]
    ids = []
    for part in tasks.rstrip("]").partition("%")[0].split(","):  # behind % is the array's limit
        first, _, last = part.rstrip(".").partition("-")  # ... behind an abbreviated list
        if not first:
            continue
        ids += [f"{array}_{task}" for task in range(int(first), int(last or first) + 1)]
    return ids


def _last_line(job_folder: Path) -> str:
    """Return the last line that the command printed to the log of rank 0, since its last start."""
    logs = sorted(job_folder.glob("*_0_log.out"))
    if not logs:
        return ""
    with open(logs[0], "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
        text = file.read().decode(errors="replace")
    text = re.split(r"^submitit .* - Starting with .*$", text, flags=re.M)[-1]
    lines = (line.strip() for line in re.split(r"[\r\n]+", text))  # progress bars use \r
    launcher = r"submitit \w+ \(|srun: |slurmstepd"
    lines = [line for line in lines if line and not re.match(launcher, line)]
    return lines[-1] if lines else ""
