import subprocess
import sys

import pytest

from ldae.machine import hardware
from ldae.machine.hardware import busy_cores, find_problems

MACHINE = {
    "cores": 16, "busy": 0.1, "gpus": 1, "fast_bf16": True, "builds_kernels": True,
    "shared": 10**9, "shared_free": 10**9,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, cure",
    [
        ({"shared_free": 10**7}, "--shm-size"),
        ({"fast_bf16": False}, "compute capability 8"),
        ({"cores": 4}, "--system.workers 4"),
        ({"gpus": 4}, "--system.workers 4"),
        ({"busy": 1.9}, "1.9 of 16 cores busy"),
        ({"builds_kernels": False}, "install gcc"),
    ],
)
def test_a_problem_names_its_cure(change, cure):
    assert find_problems(MACHINE) == []
    (problem,) = find_problems(MACHINE | change)
    assert cure in problem


def test_the_memory_is_the_least_limit_of_the_groups_of_a_process(tmp_path, monkeypatch):
    group = tmp_path / "groups" / "job_7" / "step_0"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("1:name=systemd:/\n0::/job_7/step_0\n")
    (group / "memory.max").write_text("max\n")
    monkeypatch.setattr(hardware, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(hardware, "_GROUPS", tmp_path / "groups")
    whole = hardware.memory_of_process()
    (group.parent / "memory.max").write_text("4194304\n")
    assert hardware.memory_of_process() == 4_194_304 < whole


def test_the_busy_cores_are_those_that_work_meanwhile(monkeypatch):
    """The times of a core: in user, nice and system mode, idle, waiting for disks, and others."""
    half, idle = [[70, 5, 25, 200, 100, 0], [0, 0, 0, 400, 0, 0]], [[0] * 6, [0] * 6]
    times = iter([idle, half])
    monkeypatch.setattr(hardware, "_cpu_times", lambda: next(times))
    assert busy_cores(0) == 0.25


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count no times of cores")
def test_a_process_that_computes_keeps_a_core_busy():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            assert busy_cores() > 0.1
        finally:
            process.kill()
