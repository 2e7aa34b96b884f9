"""Whatever ends a job, its run is the one that nothing disturbed."""

import fcntl
import os
import re
import signal
import socket
import time

import pytest
import torch
from slurm.cluster import Sent, shell

from ldae.cluster.settings import Slurm
from ldae.commands.jobs import statuses
from ldae.runs.checkpoints import Checkpoints
from ldae.tree import replace

LAYOUTS = {"two tasks": Slurm(tasks_per_node=2), "two nodes": Slurm(nodes=2)}
KILLS = {
    "USR2": lambda job: shell("scancel", "--signal=USR2", job.id),
    "TERM": lambda job: shell("scancel", "--signal=TERM", job.id),
    "requeue": lambda job: shell("scontrol", "requeue", job.id),
    "a lost rank": lambda job: os.kill(job.pid_of(rank=1), signal.SIGKILL),
    "a lost rank 0": lambda job: os.kill(job.pid_of(rank=0), signal.SIGKILL),
}


@pytest.fixture
def assert_undisturbed(send, tmp_path_factory):
    """assert_undisturbed(job): its weights are those of a run of two ranks that nobody touched."""
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    saved = session / "undisturbed.pt"

    def check(job: Sent) -> None:
        with open(session / "undisturbed.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the first of pytest's processes runs it, for all
            if not saved.exists():
                other = send(Slurm(tasks_per_node=2), step=0, run="undisturbed")
                assert other.finish() == "COMPLETED" and other.known("Restarts") == "0"
                torch.save(other.weights(), saved)
        weights, undisturbed = job.weights(), torch.load(saved, weights_only=True)
        assert weights.keys() == undisturbed.keys()
        for name in weights:
            assert torch.equal(weights[name], undisturbed[name]), name

    return check


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_job_finishes_as_if_nothing_had_happened(layout, kill, send, assert_undisturbed):
    job = send(LAYOUTS[layout], step=0.3)
    job.wait_for_steps()
    before = int(job.known("Restarts"))  # a busy machine's SLURM fails to start a step now and then
    KILLS[kill](job)
    assert job.finish() == "COMPLETED", job.told()
    assert int(job.known("Restarts")) == before + 1, job.told()
    assert job.state().get("requeues", 0) == before + (0 if kill == "requeue" else 1), job.told()
    assert job.state()["state"] == "done"
    assert_undisturbed(job)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_does_one_that_outlives_its_time_limit(layout, send, assert_undisturbed):
    """Whole minutes, looked at each half minute: the signal comes 85 to 115 seconds after the start."""
    job = send(replace(LAYOUTS[layout], {"time": "2", "warning": 5}), step=4)
    assert job.finish() == "COMPLETED", job.told()
    assert int(job.known("Restarts")) == job.state()["requeues"] >= 1, job.told()
    assert "ldae: SIGUSR2; requeued" in job.said(), job.told()
    assert_undisturbed(job)


def test_what_its_owner_cancels_saves_and_stays_ended(send):
    job = send(Slurm(tasks_per_node=2))
    job.wait_for_steps()
    shell("scancel", job.id)
    assert job.finish() == "CANCELLED"
    assert [status.state for status in statuses(job.run)] == ["cancelled"]
    stopped = int(re.search(r"stopped at image (\d+) of 256; it is saved", job.said())[1])
    assert Checkpoints(job.run).load()["images_seen"] == stopped
    time.sleep(20)  # after 10, a requeued job starts
    assert job.known("JobState") == "CANCELLED" and job.known("Restarts") == "0"


def test_a_job_that_dies_twice_at_the_same_image_stops_and_says_so(send):
    job = send(Slurm(), step=0, dies_at=2)
    assert job.finish() == "FAILED"
    assert job.known("Restarts") == "1"
    assert job.state()["state"] == "failed"
    assert "ended for the second time with nothing new saved" in job.said()


def test_a_port_that_is_taken_costs_one_start(send, assert_undisturbed):
    job = send(Slurm(tasks_per_node=2, extra=("hold",)))
    with socket.create_server(("", send._port(job.id))):
        shell("scontrol", "release", job.id)
        assert job.finish() == "COMPLETED", job.told()
    assert job.known("Restarts") == "1" and "could not join the other ranks at sln" in job.said()
    assert_undisturbed(job)


def test_wrong_input_is_not_tried_again(send):
    """srun kills the second rank for the first one's sake, and returns the status of that."""
    job = send(Slurm(tasks_per_node=2), step=0, data__source="no such folder")
    assert job.finish() == "FAILED"
    assert job.known("Restarts") == "0" and job.state()["state"] == "failed"
