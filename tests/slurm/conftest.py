"""What the tests that need a SLURM share. `make test-slurm` starts one, and runs them in it."""

import os
from pathlib import Path

import pytest
from slurm.cluster import Sent

from ldae.cluster.send import send as send_job
from ldae.cluster.settings import Slurm
from ldae.tree import replace, to_yaml

SLOW = Path(__file__).parent / "slow"


@pytest.fixture(scope="session", autouse=True)
def a_cluster():
    if "SLURM_CONF" not in os.environ:
        pytest.fail("there is no SLURM here: `make test-slurm` starts one, and runs these tests")


@pytest.fixture
def send(tiny, tmp_path):
    """send(settings, step=, dies_at=): a pre-training of 32 steps as a job; each takes so long."""

    def make(
        settings: Slurm, step: float = 0.1, dies_at: int = 0, run: str = "a run", **changes
    ) -> Sent:
        config = tiny(
            optim__epochs=4,
            system__workers=1,
            system__log_every=2,
            system__save_minutes=0.02,
            system__rank_timeout=2,
            **changes,
        )
        (tmp_path / "tiny.yaml").write_text(to_yaml(config))
        slow = (f"export PYTHONPATH='{SLOW}' LDAE_TEST_STEP={step} LDAE_TEST_DIES_AT={dies_at}",)
        command = ("pretrain", str(tmp_path / "tiny.yaml"), "--run", str(tmp_path / run))
        settings = replace(settings, {"setup": slow, "time": settings.time})
        (job,) = send_job([command], settings, tmp_path / run)
        return Sent(job, tmp_path / run)

    return make
