"""A job of the real SLURM, as a test looks at it."""

import re
import subprocess
import time
from pathlib import Path

import torch

from ldae.cluster import requeue, send
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.layout import JOBS


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
        self.id, self.run, self.log = job.job_id, run, send.log_of(job)

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

    def ended(self) -> bool:
        return self.known("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def wait_for_steps(self) -> None:
        self._wait(lambda: self.images() >= 16 or self.ended(), "steps")
        assert self.images() >= 16, f"job {self.id} ended before its first steps\n{self.told()}"

    def finish(self) -> str:
        """Wait for its end; how it ended."""
        self._wait(self.ended, "the end")
        return self.known("JobState")

    def _wait(self, condition, what: str) -> None:
        try:
            wait_for(condition, f"{what} of job {self.id}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    def told(self) -> str:
        """All that there is to find out what went wrong."""
        record = shell("scontrol", "show", "job", "-o", self.id)
        return f"{record}{self.state()}\n{self.said()}"

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
