"""Fixtures of the tests on a real SLURM, which `make test-slurm` starts."""

import os
from pathlib import Path

import pytest
from slurm.cluster import SentJob

from ldae.cluster.send import send as send_job
from ldae.cluster.settings import SlurmSettings
from ldae.tree import replace, to_yaml

SLOW = Path(__file__).parent / "slow"


@pytest.fixture(scope="session", autouse=True)
def cluster():
    if "SLURM_CONF" not in os.environ:
        pytest.fail("there is no SLURM; `make test-slurm` starts one and runs these tests in it")


@pytest.fixture
def send(tiny, tmp_path):
    """send(settings, step, dies_at): send a pre-training of 32 steps as a job.

    Each step takes ``step`` seconds more, and the process kills itself at step ``dies_at``.
    """

    def make(
        settings: SlurmSettings, step: float = 0.1, dies_at: int = 0, run: str = "a run", **changes
    ) -> SentJob:
        config = tiny(
            optim__epochs=4,
            system__workers=1,
            system__log_every=2,
            system__save_minutes=0.02,
            system__rank_timeout=2,
            **changes,
        )
        (tmp_path / "tiny.yaml").write_text(to_yaml(config))
        setup = (f"export PYTHONPATH='{SLOW}' LDAE_TEST_STEP={step} LDAE_TEST_DIES_AT={dies_at}",)
        command = ("pretrain", str(tmp_path / "tiny.yaml"), "--run", str(tmp_path / run))
        settings = replace(settings, {"setup": setup, "time": settings.time})
        (job,) = send_job([command], settings, tmp_path / run)
        return SentJob(job, tmp_path / run)

    return make
