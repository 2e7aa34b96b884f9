import pytest

from ldae.machine.parts import find_problems

MACHINE = {"cores": 16, "gpus": 1, "fast_bf16": True, "shared": 10**9, "shared_free": 10**9}


@pytest.mark.parametrize(
    "change, cure",
    [
        ({"shared_free": 10**7}, "--shm-size"),
        ({"fast_bf16": False}, "compute capability 8"),
        ({"cores": 4}, "--system.workers 4"),
        ({"gpus": 4}, "--system.workers 4"),
    ],
)
def test_a_problem_names_its_cure(change, cure):
    assert find_problems(MACHINE) == []
    (problem,) = find_problems(MACHINE | change)
    assert cure in problem
