"""However a job is killed, its run ends with the weights of an undisturbed run."""

import fcntl
import os
import re
import signal
import socket
import time

import pytest
import torch
from slurm.cluster import SentJob, shell

from ldae.cluster.send import _choose_port
from ldae.cluster.settings import SlurmSettings
from ldae.cluster.status import read_statuses
from ldae.runs.checkpoints import Checkpoints
from ldae.tree import replace

LAYOUTS = {"two tasks": SlurmSettings(tasks_per_node=2), "two nodes": SlurmSettings(nodes=2)}
KILLS = {
    "USR2": lambda job: shell("scancel", "--signal=USR2", job.id),
    "TERM": lambda job: shell("scancel", "--signal=TERM", job.id),
    "requeue": lambda job: shell("scontrol", "requeue", job.id),
    "a lost rank": lambda job: os.kill(job.pid_of(rank=1), signal.SIGKILL),
    "a lost rank 0": lambda job: os.kill(job.pid_of(rank=0), signal.SIGKILL),
}


@pytest.fixture
def assert_undisturbed(send, tmp_path_factory):
    """assert_undisturbed(job): its weights equal those of an undisturbed run on two ranks."""
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    saved = session / "undisturbed.pt"

    def check(job: SentJob) -> None:
        with open(session / "undisturbed.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the first pytest process runs it for all
            if not saved.exists():
                other = send(SlurmSettings(tasks_per_node=2), step=0, run="undisturbed")
                assert other.finish() == "COMPLETED" and other.field("Restarts") == "0"
                torch.save(other.weights(), saved)
        weights, undisturbed = job.weights(), torch.load(saved, weights_only=True)
        assert weights.keys() == undisturbed.keys()
        for name in weights:
            assert torch.equal(weights[name], undisturbed[name]), name

    return check


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_job_finishes_as_if_undisturbed(layout, kill, send, assert_undisturbed):
    job = send(LAYOUTS[layout], step=0.3)
    job.wait_for_steps()
    before = int(job.field("Restarts"))  # SLURM on a busy machine may fail to start a step
    KILLS[kill](job)
    assert job.finish() == "COMPLETED", job.report()
    assert int(job.field("Restarts")) == before + 1, job.report()
    assert job.state().get("requeues", 0) == before + (0 if kill == "requeue" else 1), job.report()
    assert job.state()["state"] == "done"
    assert_undisturbed(job)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_job_longer_than_its_time_limit_finishes_as_if_undisturbed(
    layout, send, assert_undisturbed
):
    """The limit has whole minutes, checked every 30 s: the signal comes after 85 to 115 s."""
    job = send(replace(LAYOUTS[layout], {"time": "2", "warning": 5}), step=4)
    assert job.finish() == "COMPLETED", job.report()
    assert int(job.field("Restarts")) == job.state()["requeues"] >= 1, job.report()
    assert "ldae: SIGUSR2; requeued" in job.output(), job.report()
    assert_undisturbed(job)


def test_a_cancelled_job_saves_and_is_not_requeued(send):
    job = send(SlurmSettings(tasks_per_node=2))
    job.wait_for_steps()
    shell("scancel", job.id)
    assert job.finish() == "CANCELLED"
    assert [status.state for status in read_statuses(job.run)] == ["cancelled"]
    sentence = r"stopped at image (\d+) of 256; all progress is saved"
    stopped = int(re.search(sentence, job.output())[1])
    assert Checkpoints(job.run).load()["images_seen"] == stopped
    time.sleep(20)  # a requeued job would start after 10 s
    assert job.field("JobState") == "CANCELLED" and job.field("Restarts") == "0"


def test_a_job_that_dies_twice_without_progress_is_not_requeued(send):
    job = send(SlurmSettings(), step=0, dies_at=2)
    assert job.finish() == "FAILED"
    assert job.field("Restarts") == "1"
    assert job.state()["state"] == "failed"
    assert "nothing new was saved since the last requeue" in job.output()


def test_a_taken_port_costs_one_start(send, assert_undisturbed):
    job = send(SlurmSettings(tasks_per_node=2, extra=("hold",)))
    with socket.create_server(("", _choose_port(job.id))):
        shell("scontrol", "release", job.id)
        assert job.finish() == "COMPLETED", job.report()
    assert job.field("Restarts") == "1" and "could not join the other ranks at sln" in job.output()
    assert_undisturbed(job)


def test_wrong_input_is_not_requeued(send):
    """srun kills the second rank because the first failed, and returns the second one's status."""
    job = send(SlurmSettings(tasks_per_node=2), step=0, data__source="no such folder")
    assert job.finish() == "FAILED"
    assert job.field("Restarts") == "0" and job.state()["state"] == "failed"
