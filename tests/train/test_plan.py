"""The length of a run, and the division of its batches."""

import pytest
import torch

from ldae.errors import InputError
from ldae.settings import OptimSettings, SystemSettings
from ldae.train.plan import Plan, plan_run

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def micro_batches(batch_size, device_batch, device=CPU):
    optim, system = OptimSettings(batch_size=batch_size), SystemSettings(device_batch=device_batch)
    return plan_run(100, optim, system, device).micro_batches


def test_a_plan_divides_the_batch_or_is_refused():
    optim = OptimSettings(batch_size=32, epochs=2)
    assert plan_run(100, optim, SystemSettings(), CPU) == Plan(100, 224, 32, 1)
    assert [micro_batches(32, most) for most in (0, 8, 32, 64)] == [1, 4, 1, 1]
    with pytest.raises(InputError, match="batch_size.*30.*4 equal parts.*device_batch 8"):
        micro_batches(30, 8)
    with pytest.raises(InputError, match="optim.batch_size 0"):
        micro_batches(0, 8)


@pytest.mark.parametrize("most, searched", [("auto", True), (0, False), (8, False)])
def test_a_division_is_searched_on_a_gpu_if_no_number_is_given(most, searched):
    optim, system = OptimSettings(batch_size=32), SystemSettings(device_batch=most)
    assert plan_run(100, optim, system, GPU).searched == searched
    assert not plan_run(100, optim, system, CPU).searched


def test_divisions_give_equal_micro_batches_of_whole_groups():
    assert Plan(100, 240, 24, 1).divisions() == [1, 2, 3, 4, 6, 8, 12, 24]
    assert Plan(100, 240, 24, 1, multiple=4).divisions() == [1, 2, 3, 6]
    divided = Plan(100, 240, 24, 1, searched=True).divided(6)
    assert divided.micro_batch == 4 and not divided.searched
