"""Jobs with the same settings: sent as one array, or run on this machine a few at a time."""

import itertools
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldae.cluster import requeue
from ldae.cluster.send import log_path, send
from ldae.cluster.settings import SlurmSettings
from ldae.runs import layout


def send_array(
    commands: Mapping[str, Sequence[str]],
    settings: SlurmSettings,
    folder: Path,
    after: Sequence[str] = (),
) -> list[Any]:
    """Submit commands by name as ``send`` does, and print the ids and the logs of the jobs.

    Returns: submitit's jobs, in the order of the commands.
    """
    jobs = send(list(commands.values()), settings, folder, after)
    for job, name in zip(jobs, commands):
        what = f"{name} ({settings.resources})"
        print(f"job {job.job_id}: {what}; its log is {log_path(job)}", flush=True)
    return jobs


def run_array(
    commands: Mapping[str, Sequence[str]], settings: SlurmSettings, folder: Path
) -> list[str]:
    """Run commands by name on this machine, ``array_parallelism`` at a time.

    Jobs with GPUs run one after the other, because all of them get the same GPUs.

    Returns: the final states of the jobs.
    """
    states, waiting = [], iter(commands.items())
    at_once = 1 if settings.gpus_per_node else settings.array_parallelism
    while part := dict(itertools.islice(waiting, at_once)):
        states += wait_for(send_array(part, settings, folder), folder)
    return states


def wait_for(jobs: Sequence[Any], folder: Path) -> list[str]:
    """Wait for jobs on this machine, and return their final states.

    With the cluster debug, ``done`` runs the job in this process.

    Raises: KeyboardInterrupt after Ctrl-C or a signal to end, once all jobs have saved and ended.
    """
    try:
        _wait(jobs)
    except KeyboardInterrupt:
        running = [job for job in jobs if job.job_id.isdecimal() and not job.done()]
        for job in running:  # of the cluster local: the id is that of its process
            os.kill(int(job.job_id), signal.SIGTERM)
        _wait(running)
        raise
    return [
        requeue.read_state(folder.absolute() / layout.JOBS / job.job_id).get("state", "failed")
        for job in jobs
    ]


def _wait(jobs: Sequence[Any]) -> None:
    """Wait for jobs. Raises: KeyboardInterrupt when a signal has ended one in this process."""
    for job in jobs:
        try:
            while not job.done():
                time.sleep(0.2)
        except SystemExit as end:  # the exit status of a debug job
            if end.code > 128:
                raise KeyboardInterrupt(end.code - 128) from None
