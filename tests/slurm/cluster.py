"""A job of the real SLURM, as a test looks at it."""

import re
import subprocess
import time
from pathlib import Path

import torch

from ldae import requeue, sending
from ldae.log import JOBS
from ldae.train.checkpoint import Checkpoints


def wait_for(condition, what: str, limit: float = 600):
    """The first true answer of ``condition``."""
    until = time.monotonic() + limit
    while not (answer := condition()):
        assert time.monotonic() < until, f"{what}: not in {limit:g} seconds"
        time.sleep(0.2)
    return answer


def shell(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Sent:
    """A job, as a test looks at it."""

    def __init__(self, job, run: Path) -> None:
        self.id, self.run, self.log = job.job_id, run, sending.log_of(job)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def state(self) -> dict:
        return requeue.state(self.run / JOBS / self.id)

    def known(self, name: str) -> str:
        """What SLURM says of it."""
        return re.search(rf"\b{name}=(\S*)", shell("scontrol", "show", "job", "-o", self.id))[1]

    def images(self) -> int:
        """Images seen, by the last line of progress."""
        lines = re.findall(r"^images +([\d,]+)/", self.said(), re.M)
        return int(lines[-1].replace(",", "")) if lines else 0

    def wait_for_steps(self) -> None:
        wait_for(lambda: self.images() >= 16, f"steps of job {self.id}")

    def finish(self) -> str:
        """Wait for its end; how it ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        wait_for(lambda: self.known("JobState") in ended, f"the end of job {self.id}")
        return self.known("JobState")

    def weights(self) -> dict[str, torch.Tensor]:
        return Checkpoints(self.run).load()["model"]

    def pid_of(self, rank: int) -> int:
        """Of the process that SLURM started for a rank; the nodes are this machine."""
        # The batch script has a SLURM_PROCID of 0, too, but is no step with a number.
        wanted = {f"SLURM_JOB_ID={self.id}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                parent = int(re.search(r"PPid:\s+(\d+)", (process / "status").read_text())[1])
                is_task = Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd"
                if is_task and wanted <= set((process / "environ").read_text().split("\0")):
                    return int(process.name)
            except (OSError, ValueError):
                continue
        raise AssertionError(f"job {self.id} has no rank {rank}")
