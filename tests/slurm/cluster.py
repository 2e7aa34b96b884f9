"""A job of the real SLURM, with what tests ask about it."""

import re
import subprocess
import time
from pathlib import Path

import torch

from ldae.cluster import requeue, send
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.layout import JOBS


def wait_for(condition, what: str, limit: float = 600):
    """Call ``condition`` until its value is true, and return the value; limit in seconds."""
    until = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < until, f"no {what} within {limit:g} seconds"
        time.sleep(0.2)
    return value


def shell(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class SentJob:
    """A job that was sent from a run folder."""

    def __init__(self, job, run: Path) -> None:
        self.id, self.run, self.log = job.job_id, run, send.log_path(job)

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def state(self) -> dict:
        return requeue.read_state(self.run / JOBS / self.id)

    def field(self, name: str) -> str:
        """Return a field of ``scontrol show job``."""
        return re.search(rf"\b{name}=(\S*)", shell("scontrol", "show", "job", "-o", self.id))[1]

    def images(self) -> int:
        """Return the images seen, as in the last progress line of the log."""
        lines = re.findall(r"^images +([\d,]+)/", self.output(), re.M)
        return int(lines[-1].replace(",", "")) if lines else 0

    def ended(self) -> bool:
        return self.field("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def wait_for_steps(self) -> None:
        self._wait(lambda: self.images() >= 16 or self.ended(), "first steps")
        assert self.images() >= 16, f"job {self.id} ended before its first steps\n{self.report()}"

    def finish(self) -> str:
        """Wait for the end of the job, and return its state."""
        self._wait(self.ended, "end")
        return self.field("JobState")

    def _wait(self, condition, what: str) -> None:
        try:
            wait_for(condition, f"{what} of job {self.id}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.report()}") from None

    def report(self) -> str:
        """Return SLURM's record, the state and the log, for the message of a failed assertion."""
        record = shell("scontrol", "show", "job", "-o", self.id)
        return f"{record}{self.state()}\n{self.output()}"

    def weights(self) -> dict[str, torch.Tensor]:
        return Checkpoints(self.run).load()["model"]

    def pid_of(self, rank: int) -> int:
        """Return the id of the process that SLURM started for a rank, on this machine."""
        # The batch script also has the SLURM_PROCID 0, but its step has no number.
        variables = {f"SLURM_JOB_ID={self.id}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                parent = int(re.search(r"PPid:\s+(\d+)", (process / "status").read_text())[1])
                is_task = Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd"
                if is_task and variables <= set((process / "environ").read_text().split("\0")):
                    return int(process.name)
            except (OSError, ValueError):
                continue
        raise AssertionError(f"job {self.id} has no rank {rank}")
