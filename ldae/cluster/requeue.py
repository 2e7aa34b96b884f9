"""The end of a job: when its command has ended, the job ends too, or is requeued to resume.

``python -m ldae.cluster.requeue STATUS JOBS`` is the last line of the batch script. This process
outlives all ranks, and needs nothing but SLURM's own commands.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ldae import files
from ldae.errors import LOST_RANK
from ldae.runs import layout

_INTERRUPTED = 128 + signal.SIGINT
LOCAL_REQUEUE = 144  # exit status that makes submitit's local cluster start the job again
_LOCAL_STARTS = 6  # submitit's limit
_LAST_START = (
    "a job on this machine is started six times at most; the same command goes on, or send it with "
    "a longer slurm.time"
)
# Seconds between requests. A batch script has at least SLURM's KillWait, 30 s by default: the time
# from SIGTERM to SIGKILL.
_PAUSES = (1, 2, 4, 8)
_NO_PROGRESS = (
    "nothing new was saved since the last requeue, so the job is not requeued again; if it reached "
    "its time limit, send it with a longer slurm.time"
)


def record_start(folder: Path, rank: int) -> None:
    """Record that this process runs a rank of the job.

    Args:
        folder: the folder of the job, with job.json.
    """
    _status_file(folder, rank).unlink(missing_ok=True)
    if rank == 0:
        _update_state(folder, state="running", said="", host=socket.gethostname(), pid=os.getpid())


def record_end(folder: Path, rank: int, status: int) -> None:
    """Record the exit status of a rank.

    srun's own status may be that of a rank that it killed because another one failed.
    """
    files.write(_status_file(folder, rank), str(status).encode())


def _status_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}{layout.RANK_STATUS}"


def finish_local(status: int, folder: Path) -> int:
    """Record how a job on this machine ended, decide on a requeue, and return the exit status.

    Only SIGUSR2, the signal of the time limit, requeues the job. SIGTERM ends the job for good.
    """
    if status != 128 + signal.SIGUSR2:
        _conclude(folder, status, f"stopped by {_signal_name(status)}" if status >= 128 else "")
    elif not _has_progressed(folder):
        _conclude(folder, status, _NO_PROGRESS)
    elif read_state(folder).get("requeues", 0) + 1 >= _LOCAL_STARTS:
        _conclude(folder, status, _LAST_START)
    else:
        _conclude_requeue(folder, status)
        return LOCAL_REQUEUE
    return status


def finish_slurm(status: int, jobs: Path) -> None:
    """Record how the job of this batch script ended, and ask SLURM to requeue it if that may help.

    A requeue may help when a rank was killed, could not be started, or was stopped by a signal of
    preemption or of the time limit. It cannot help after wrong input or an exception. The job ends
    for good when its owner cancelled or interrupted it (SIGINT), and when nothing new was saved
    since the last requeue. A requeue that SLURM itself has begun is left alone.

    Args:
        status: exit status of srun.
        jobs: the folder of all jobs.
    """
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    folder = jobs / job
    status = _cause(status, folder)
    if not _may_help(status):
        _conclude(folder, status)
        return
    info = _query_slurm(job)
    if int(info.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        _update_state(folder, state="waiting", said="SLURM requeued the job")
    elif _is_cancelled(info):
        _conclude(folder, status, "cancelled: the job is not requeued", state="cancelled")
    elif not _has_progressed(folder):
        _conclude(folder, status, _NO_PROGRESS)
    else:
        _conclude_requeue(folder, status)
        _requeue(job, folder)


def _requeue(job: str, folder: Path) -> None:
    """Ask SLURM for the requeue, repeatedly: a controller with many requests may time out."""
    for pause in (0, *_PAUSES):
        time.sleep(pause)
        answer = _run("scontrol", "requeue", job)
        if answer.returncode == 0:
            return
    _update_state(folder, state="failed", said=f"the requeue failed: {answer.stderr.strip()}")


def _cause(status: int, folder: Path) -> int:
    """Return the exit status that explains why a job ended, and delete the records of its ranks.

    srun returns the highest status, which may be that of a rank that it killed because another one
    failed. When no rank recorded a failure, a rank was never started, or its node was lost.
    """
    ranks = []
    for path in sorted(folder.glob(f"*{layout.RANK_STATUS}")):
        ranks.append(int(path.read_text()))
        path.unlink()  # the next start may end before this rank writes a status
    if status in (0, _INTERRUPTED):
        return status
    if any(ranks):  # prefer a failure that a requeue cannot help
        return min(filter(None, ranks), key=_may_help)
    return status if _may_help(status) else LOST_RANK


def _may_help(status: int) -> bool:
    """Return whether a requeue may help after this exit status."""
    return status == LOST_RANK or (status > 128 and status != _INTERRUPTED)


def _query_slurm(job: str) -> dict[str, str]:
    """Return the fields that ``scontrol show job`` prints, or {} when SLURM does not answer."""
    return dict(re.findall(r"(\w+)=(\S*)", _run("scontrol", "show", "job", "-o", job).stdout))


def _is_cancelled(info: dict[str, str]) -> bool:
    """Return whether somebody cancelled the job, unlike a time limit, preemption or lost node.

    While its batch script runs, an ending job has the state COMPLETING, whatever ended the job.
    """
    if info.get("JobState") not in ("CANCELLED", "COMPLETING"):
        return False
    return info.get("Reason") != "TimeLimit" and info.get("PreemptTime", "None") == "None"


def _has_progressed(folder: Path) -> bool:
    """Return whether the job has saved anything since its last requeue, and record how much."""
    before = read_state(folder).get("saved_before")
    now = measure_progress(folder)
    _update_state(folder, saved_before=now)
    return now != before


def measure_progress(folder: Path) -> int:
    """Return a number that changes whenever the command of a job saves something.

    With --run, it counts the images that the newest checkpoints of the run have seen. With --out,
    it counts the files there, of the parts that --only names, the images that a probe there has
    seen, and the bytes in which embed logs its blocks. Of a cache it counts the space on the disk.
    Otherwise it counts what lies beside the backbone: the images that probes have seen, results,
    such as of single seeds, and the passes of grids.
    """
    record = files.read_object(folder / layout.JOB_RECORD)
    if not record:  # the job ended before its sender wrote it
        return 0
    here, words = Path(record["directory"]), [*map(os.path.expanduser, record["command"])]
    if words[0] == "cache":
        written = (here / f"{word}{files.PARTIAL}" for word in words[1:])
        return sum(path.stat().st_blocks for path in written if path.is_file())
    if run := option(words, "--run"):
        return _images_seen(here / os.path.expanduser(run))
    if out := os.path.expanduser(option(words, "--out")):
        parts = [f"{out}/{part}" for part in option_values(words, "--only")] or [out]
        places = [here / name for part in parts for name in (part, f"{part}{files.PARTS}")]
        saved = [path for place in places for path in place.rglob("*")]
        logged = sum(path.stat().st_size for path in saved if path.name == layout.EMBEDDED)
        return sum(map(_images_seen, places)) + _count_whole(saved) + logged
    named = {here / word for word in words[1:]}
    # A backbone has a folder of evaluations; `ldae rerun` writes beside what it repeats.
    places = {path / layout.EVALS for path in named if os.path.isdir(path / layout.EVALS)}
    places |= {path.parent for path in named if path.name == layout.RESULTS}
    places |= {path for path in named if os.path.isfile(path / layout.RESULTS)}
    places = places or {here / layout.EVALS}
    patterns = (f"**/{layout.GRID_PASSES}/*", f"**/{layout.RESULTS}")
    kept = [path for place in places for pattern in patterns for path in place.glob(pattern)]
    return sum(map(_images_seen, places)) + _count_whole(kept)


def _count_whole(paths: Iterable[Path]) -> int:
    """Count the files that are not being written."""
    return sum(path.suffix != files.PARTIAL for path in paths)


def _images_seen(folder: Path) -> int:
    """Sum the images seen over all checkpoint folders: of a run, its tokenizer and its probes."""
    newest: dict[Path, int] = {}
    for path in folder.glob(f"**/{layout.CHECKPOINTS}/*"):
        newest[path.parent] = max(newest.get(path.parent, 0), layout.images_seen(path) or 0)
    return sum(newest.values())


def option(words: Sequence[str], name: str) -> str:
    """Return the value of an option in a command line, or an empty string without the option."""
    return next(iter(option_values(words, name)), "")


def option_values(words: Sequence[str], name: str) -> list[str]:
    """Return the values of an option that may have several, which end before the next option."""
    values, is_inside = [], False
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            is_inside = option == name
            values += [value] if is_inside and equals else []
        elif is_inside:
            values.append(word)
    return values


def _conclude(folder: Path, status: int, message: str = "", **changes: object) -> None:
    """Record that a job ended, with changes to its state; print the message to its log."""
    end = {"state": "failed" if status else "done", "said": message, "status": status}
    _update_state(folder, **end | changes)
    if message:
        print(f"ldae: {message}", flush=True)


def _conclude_requeue(folder: Path, status: int) -> None:
    """Record that a job was requeued; print the reason to its log."""
    requeues = read_state(folder).get("requeues", 0) + 1
    message = f"{_signal_name(status)}; requeued"
    _conclude(folder, status, message, state="waiting", requeues=requeues)


def _signal_name(status: int) -> str:
    if status == LOST_RANK:
        return "a rank was lost"
    try:
        return signal.Signals(status - 128).name
    except ValueError:
        return f"status {status}"


def read_state(folder: Path) -> dict:
    """Return the recorded state of a job, or {} before its first start."""
    return files.read_object(folder / layout.JOB_STATE)


def _update_state(folder: Path, **changes: object) -> None:
    files.write_json(folder / layout.JOB_STATE, read_state(folder) | changes)


def _run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


if __name__ == "__main__":
    finish_slurm(int(sys.argv[1]), Path(sys.argv[2]))
    sys.exit(int(sys.argv[1]))
