"""The command jobs, with jobs in every state."""

import os
import socket

import pytest

from ldae import files
from ldae.cluster.status import read_statuses
from ldae.commands import jobs
from ldae.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """add(job, place, cluster, text, sender, **state): write a job's folder; there is no SLURM."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()

    def add(
        job: str,
        place: str = "runs/a",
        cluster: str = "slurm",
        text: str = "",
        sender: dict | None = None,
        **state,
    ):
        path = tmp_path / place / "jobs" / job
        command = ["knn", "a b", "--data", "x"]
        record = {"id": job, "command": command, "cluster": cluster, "sent": f"2026-{job:>09}"}
        files.write_json(path / "job.json", record | (sender or {}))
        if state:
            files.write_json(path / "state.json", state)
        (path / f"{job}_0_log.out").write_text(text)

    return add


def test_without_slurm_the_records_are_shown(folder, tmp_path, capsys):
    folder("1", state="done", text="top1 50\n")
    folder("2", state="waiting", said="SIGUSR2; requeued")
    folder(
        "3", state="failed", text="submitit INFO (2026) - x\nldae: no such data\nsrun: error: 2\n"
    )
    folder("4", place="other", text="bar 10%\rbar 20%\r\n")  # sent, not begun
    jobs.jobs(tmp_path)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "done 1 ldae knn 'a b' --data x",
        "top1 50",
        "waiting 2 ldae knn 'a b' --data x",
        "SIGUSR2; requeued",
        "failed 3 ldae knn 'a b' --data x",
        "ldae: no such data",
        "waiting 4 ldae knn 'a b' --data x",
        "4 jobs: 1 done, 2 waiting, 1 failed",
    ]


def test_the_last_state_of_a_progress_bar_is_shown(folder, tmp_path):
    here = {"host": socket.gethostname(), "pid": os.getpid()}
    folder("1", cluster="local", text="bar 10%\rbar 20%\r", state="running", **here)
    assert read_statuses(tmp_path) == [("1", "running", "knn 'a b' --data x", "bar 20%")]


def test_a_job_that_has_started_again_does_not_show_its_last_end(folder, tmp_path):
    start = "submitit INFO (2026) - Starting with JobEnvironment(job_id=1)\n"
    stopped = f"{start}bar 10%\nldae: stopped\n"
    folder("1", text=stopped, state="running")
    folder("2", text=f"{stopped}{start}submitit INFO (2026) - x\n", state="running")
    folder("3", text=f"{stopped}{start}bar 20%\n", state="running")
    messages = [status.message for status in read_statuses(tmp_path)]
    assert messages == ["ldae: stopped", "", "bar 20%"]


def test_a_job_without_its_process_has_failed(folder, tmp_path):
    gone = {"host": socket.gethostname(), "pid": 2**22 + 1}  # above Linux's largest process id
    folder("1", cluster="local", state="running", **gone)
    folder("2", cluster="local", state="running", **(gone | {"host": "another machine"}))
    here = gone | {"pid": os.getpid()}
    folder("3", cluster="local", sender=gone)  # before its first start
    folder("4", cluster="debug", sender=here)
    folder("5", cluster="local", sender=gone, state="waiting", said="SIGUSR2; requeued")
    folder("6", cluster="local", sender=here, state="waiting", **gone)  # between two starts
    folder("7", cluster="local", sender=gone, state="running", **here)
    folder("8", cluster="local", sender=gone, state="done", **gone)
    states = [status.state for status in read_statuses(tmp_path)]
    assert states == [
        *("failed", "running"), "failed", "waiting", "failed", "waiting", "running", "done"
    ]  # fmt: skip


def test_slurms_answer_goes_before_the_records(folder, tmp_path):
    answers = {
        "sacct": [
            "1|COMPLETED",
            "2|CANCELLED by 0",
            "3|OUT_OF_MEMORY",
            "4|RUNNING",
            "5_0|FAILED",
            "7_[0-1,3...]|CANCELLED by 0",
        ],
        "squeue": ["4|PENDING|BeginTime", "6_1|RUNNING|None", "9|RUNNING|None"],
    }
    for name, lines in answers.items():
        script = tmp_path / "bin" / name
        refused = 'case "$*" in *_*) exit 1;; esac\n'  # as sacct does a task that never began
        refused += 'test "$SLURM_BITSTR_LEN" = 0 || exit 1\n'  # it would abbreviate lists of tasks
        script.write_text(f"#!/bin/sh\n{refused}" + "".join(f"echo '{line}'\n" for line in lines))
        script.chmod(0o755)
    for job in ("1", "2", "3", "4", "5_0", "6_1", "7_0", "7_1", "7_3"):
        folder(job, state="running", host="node", pid=1, text="images 8/16\n")
    assert [(status.id, status.state, status.message) for status in read_statuses(tmp_path)] == [
        ("1", "done", "images 8/16"),
        ("2", "cancelled", "images 8/16"),
        ("3", "failed", "OUT_OF_MEMORY"),
        ("4", "waiting", "BeginTime"),
        ("5_0", "failed", "images 8/16"),
        ("6_1", "running", "images 8/16"),
        ("7_0", "cancelled", "images 8/16"),
        ("7_1", "cancelled", "images 8/16"),
        ("7_3", "cancelled", "images 8/16"),
    ]


def test_a_job_that_slurm_does_not_know_any_more_has_been_cancelled(folder, tmp_path):
    """On a cluster without accounting, a job that did not begin leaves nothing else."""
    (tmp_path / "bin" / "sacct").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho '2|PENDING|Priority'\n")
    for name in ("sacct", "squeue"):
        (tmp_path / "bin" / name).chmod(0o755)
    folder("1")
    folder("2")
    folder("3", state="done")
    folder("4", state="running", host="node", pid=1)
    folder("5", cluster="local")
    states = ["cancelled", "waiting", "done", "cancelled", "waiting"]
    assert [status.state for status in read_statuses(tmp_path)] == states
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")  # SLURM does not answer
    assert [status.state for status in read_statuses(tmp_path)][0] == "waiting"


def test_a_cluster_without_sacct_answers_by_squeue(folder, tmp_path):
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho '1|PENDING|Priority'\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    folder("1")
    assert read_statuses(tmp_path) == [("1", "waiting", "knn 'a b' --data x", "Priority")]


def test_a_folder_without_jobs_is_refused(tmp_path):
    with pytest.raises(InputError, match="no job was sent from"):
        jobs.jobs(tmp_path)


RECORDS = ([], {"id": 5}, {"id": "5"}, {"id": "5", "command": [1]}, "text")
STATES = ([], {"state": "running"}, {"state": "running", "host": socket.gethostname(), "pid": "x"})


def test_damaged_records_are_skipped(folder, tmp_path, capsys):
    for number, record in enumerate(RECORDS):
        files.write_json(tmp_path / "runs" / "a" / "jobs" / f"bad{number}" / "job.json", record)
    for number, state in enumerate(STATES):
        folder(f"{number}", cluster="local")
        files.write_json(tmp_path / "runs" / "a" / "jobs" / f"{number}" / "state.json", state)
    folder("7", state="done", text="\x1b[31mred")
    jobs.jobs(tmp_path)
    out = capsys.readouterr().out
    assert "4 jobs: " in out and "\x1b" not in out and "x1b[31mred" in out
