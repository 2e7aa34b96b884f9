"""What follows when a job's command has ended: the end, or another start where it was.

``python -m ldae.cluster.requeue STATUS JOBS`` is the last line of the batch script: it outlives every rank,
and needs nothing but SLURM's own commands.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ldae import files
from ldae.errors import LOST_RANK
from ldae.runs import layout

_INTERRUPTED = 128 + signal.SIGINT
LOCAL_REQUEUE = 144  # the status by which submitit's local cluster is asked for another start
_PAUSES = (1, 2, 4, 8)  # seconds: KillWait, by default 30, is all that a batch script may have left
_NO_PROGRESS = (
    "ended for the second time with nothing new saved since; it is not started again by itself"
)


def started(folder: Path, rank: int) -> None:
    """Note that a rank of the job of ``folder`` runs, in this process."""
    _status_of(folder, rank).unlink(missing_ok=True)
    if rank == 0:
        _note(folder, state="running", said="", host=socket.gethostname(), pid=os.getpid())


def ended(folder: Path, rank: int, status: int) -> None:
    """Note with which status a rank ends. What srun returns can be that of one that it killed for it."""
    files.write(_status_of(folder, rank), str(status).encode())


def _status_of(folder: Path, rank: int) -> Path:
    return folder / f"{rank}{layout.RANK_STATUS}"


def ended_here(status: int, folder: Path) -> int:
    """The same decision as after a job of SLURM, for a job of this machine; the status to end with.

    Only USR2, its time limit's signal, is followed by another start: whoever sends TERM means it.
    """
    asked = status == 128 + signal.SIGUSR2
    told = "" if asked or status < 128 else f"stopped by {_signal(status)}"
    if asked and not _progress(folder):
        asked, told = False, _NO_PROGRESS
    return LOCAL_REQUEUE if _conclude(folder, status, asked, told) else status


def after_slurm(status: int, jobs: Path) -> None:
    """Ask SLURM for another start of the job that this batch script is, where that may help.

    It may when a rank was killed, could not be started, or stopped because it was asked to by a signal:
    of preemption, of the time limit. It may not after wrong input or an exception, when the owner has
    cancelled the job or interrupted it (SIGINT), and when the job was given another start since the
    last checkpoint already. A requeue that SLURM has begun by itself is left alone.
    """
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    folder = jobs / job
    status = _reason(status, folder)
    if not _may_help(status):
        _conclude(folder, status, False, "")
        return
    known = _known_to_slurm(job)
    if int(known.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        _note(folder, state="waiting", said="SLURM requeued the job")
    elif _is_cancelled(known):
        _conclude(folder, status, False, "cancelled: it stays ended")
    elif not _progress(folder):
        _conclude(folder, status, False, _NO_PROGRESS)
    elif _conclude(folder, status, True, ""):
        _requeue(job, folder)


def _requeue(job: str, folder: Path) -> None:
    """Ask until it is taken, for a while: a controller that is asked by many at once times out."""
    for pause in (0, *_PAUSES):
        time.sleep(pause)
        asked = _run("scontrol", "requeue", job)
        if asked.returncode == 0:
            return
    _note(folder, state="failed", said=f"no requeue: {asked.stderr.strip()}")


def _reason(status: int, folder: Path) -> int:
    """The status that tells why a job ended: that of a rank which ended by itself, and not srun's.

    srun returns the highest, which can be that of a rank that it killed for the sake of another. Where no
    rank has ended by itself, a node did not start it, or lost it.
    """
    ranks = []
    for path in sorted(folder.glob(f"*{layout.RANK_STATUS}")):
        ranks.append(int(path.read_text()))
        path.unlink()  # the next start may not come so far
    if status in (0, _INTERRUPTED):
        return status
    if any(ranks):
        return min(filter(None, ranks), key=_may_help)
    return status if _may_help(status) else LOST_RANK


def _may_help(status: int) -> bool:
    return status == LOST_RANK or (status > 128 and status != _INTERRUPTED)


def _known_to_slurm(job: str) -> dict[str, str]:
    """What SLURM says of the job, by its names; nothing if it does not answer."""
    return dict(re.findall(r"(\w+)=(\S*)", _run("scontrol", "show", "job", "-o", job).stdout))


def _is_cancelled(known: dict[str, str]) -> bool:
    """Whether somebody ended the job, and not its time limit, a preemption or a lost node.

    A job that SLURM is ending says COMPLETING, whatever for, until its batch script is gone.
    """
    if known.get("JobState") not in ("CANCELLED", "COMPLETING"):
        return False
    return known.get("Reason") != "TimeLimit" and known.get("PreemptTime", "None") == "None"


def _progress(folder: Path) -> bool:
    """Whether the job has saved something since it was last given another start.

    That is images seen of the run's checkpoints, or files below --out.
    """
    before = state(folder).get("saved_before")
    now = saved(folder)
    _note(folder, saved_before=now)
    return now != before


def saved(folder: Path) -> int:
    """A number that changes when a job's command saves something.

    Images that the newest checkpoints of its --run have seen; else those of a probe that trains, and
    files below --out.
    """
    try:
        record = json.loads((folder / layout.JOB_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it ended sooner than its sender wrote
        return 0
    here, words = Path(record["directory"]), record["command"]
    if run := option(words, "--run"):
        return _images_seen(here / run)
    if out := option(words, "--out"):
        places = (here / out, here / f"{out}{files.PARTS}")
        found = (path for place in places for path in place.rglob("*"))
        return _images_seen(here / out) + sum(path.suffix != files.PARTIAL for path in found)
    backbone = here.joinpath(*words[1:2])
    return _images_seen(backbone if backbone.is_dir() else here / layout.EVALS)


def _images_seen(folder: Path) -> int:
    """The sum over all folders of checkpoints: of a run, of its tokenizer, of probes."""
    newest: dict[Path, int] = {}
    for path in folder.glob(f"**/{layout.CHECKPOINTS}/*"):
        newest[path.parent] = max(newest.get(path.parent, 0), layout.images_seen(path) or 0)
    return sum(newest.values())


def option(words: Sequence[str], name: str) -> str:
    """The value of an option of a command line; empty without it."""
    for word, value in zip(words, [*words[1:], ""]):
        if word == name:
            return value
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return ""


def _conclude(folder: Path, status: int, again: bool, told: str) -> bool:
    """Tell how a job ended, in its log and in its record; returns ``again``."""
    requeues = state(folder).get("requeues", 0)
    if again:
        told = f"{_signal(status)}; requeued"
        _note(folder, state="waiting", said=told, status=status, requeues=requeues + 1)
    else:
        end = "done" if status == 0 else "cancelled" if told.startswith("cancelled") else "failed"
        _note(folder, state=end, said=told, status=status)
    if told:
        print(f"ldae: {told}", flush=True)
    return again


def _signal(status: int) -> str:
    if status == LOST_RANK:
        return "a rank was lost"
    try:
        return signal.Signals(status - 128).name
    except ValueError:
        return f"status {status}"


def state(folder: Path) -> dict:
    """How a job stands, as it was last noted; empty before it began."""
    try:
        return json.loads((folder / layout.JOB_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _note(folder: Path, **news: object) -> None:
    files.write_json(folder / layout.JOB_STATE, state(folder) | news)


def _run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


if __name__ == "__main__":
    after_slurm(int(sys.argv[1]), Path(sys.argv[2]))
    sys.exit(int(sys.argv[1]))
