"""Jobs on this machine: how many run at a time, and how they end with the command that waits."""

import os
import signal
import time
from contextlib import suppress

import pytest

from ldae.cluster import array, requeue
from ldae.cluster.send import log_path
from ldae.cluster.settings import SlurmSettings


@pytest.mark.parametrize("gpus, at_once", [(0, [2, 1]), (1, [1, 1, 1])])
def test_jobs_with_gpus_run_one_after_the_other(gpus, at_once, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(array, "send_array", lambda commands, *_: sent.append(len(commands)))
    monkeypatch.setattr(array, "wait_for", lambda *_: ["done"])
    settings = SlurmSettings(cluster="local", gpus_per_node=gpus, array_parallelism=2)
    array.run_array({name: ["show"] for name in "abc"}, settings, tmp_path)
    assert sent == at_once


class DebugJob:
    """A job in this process that ends with an exit status."""

    def __init__(self, status: int) -> None:
        self.job_id, self.status, self.has_run = f"DEBUG_{status}", status, False

    def done(self) -> bool:
        self.has_run = True
        raise SystemExit(self.status)


def test_ctrl_c_in_a_debug_job_ends_the_others_and_a_failure_does_not(tmp_path):
    failed, stopped, last = jobs = [DebugJob(2), DebugJob(130), DebugJob(0)]
    with pytest.raises(KeyboardInterrupt):
        array.wait_for(jobs, tmp_path)
    assert failed.has_run and stopped.has_run and not last.has_run


def test_ctrl_c_lets_a_local_job_end_by_itself(tmp_path, monkeypatch):
    """A terminal sends Ctrl-C to the process that starts the ranks, too."""
    pipe, sleep = tmp_path / "pipe", time.sleep
    os.mkfifo(pipe)
    settings = SlurmSettings(cluster="local", setup=("echo set up",))
    (job,) = array.send_array({"submit": ("submit", str(pipe))}, settings, tmp_path)

    def interrupt(seconds: float) -> None:
        sleep(seconds)
        with suppress(OSError):  # the command does not read yet
            os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            monkeypatch.setattr(time, "sleep", sleep)
            os.kill(int(job.job_id), signal.SIGINT)
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        array.wait_for([job], tmp_path)
    assert requeue.read_state(tmp_path / "jobs" / job.job_id)["said"] == "stopped by SIGTERM"
    log = log_path(job).read_text()
    assert log.startswith("set up") and "ldae: stopped" in log
