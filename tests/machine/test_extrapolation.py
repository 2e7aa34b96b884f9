import pytest

from ldae.machine.extrapolation import IMAGENET_IMAGES, extrapolate

RATES = {"decode": 500.0, "copy": 40_000.0, "step": 100.0, "step_flops": 1e9, "save": 4e8}


@pytest.mark.parametrize(
    "change, bound",
    [
        ({}, "step"),
        ({"step": 1e9}, "decode"),
        ({"step": 1e9, "decode": 1e9}, "copy"),
        ({"save": 1e3}, "save"),
    ],
)
def test_the_slowest_part_bounds_a_run(change, bound):
    found = extrapolate(RATES | change, gpus=1)
    assert found["bound"] == bound
    assert found["total_hours"] == max(found["hours"].values()) == found["hours"][bound]


def test_the_extrapolation_is_arithmetic():
    found = extrapolate(RATES, gpus=1)
    assert found["images"] == 400 * IMAGENET_IMAGES
    assert found["flops_an_image"] == pytest.approx(485.8e9, rel=1e-4)
    assert found["hours"]["decode"] == pytest.approx(400 * IMAGENET_IMAGES / 500 / 3600)
    step = 400 * IMAGENET_IMAGES * 485.83016448 / 100 / 3600
    assert found["hours"]["step"] == pytest.approx(step)
    saves, checkpoint = step * 6, 12 * 342e6
    assert found["hours"]["save"] == pytest.approx(saves * checkpoint / 4e8 / 3600, rel=0.01)
    two = extrapolate(RATES, gpus=2)["hours"]
    assert two["step"] == pytest.approx(step / 2) and two["decode"] == found["hours"]["decode"]


def test_on_a_cpu_all_parts_share_the_cores():
    found = extrapolate({**RATES, "step_flops": 485e9}, gpus=0)
    assert found["hours"].keys() == {"decode", "step", "save"}
    assert found["total_hours"] == pytest.approx(sum(found["hours"].values()))


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_run_is_saved_as_often_as_its_hours_ask_for(gpus):
    """Also where decoding, and not the step, makes it long."""
    few, many = (extrapolate(RATES | {"decode": rate}, gpus)["hours"] for rate in (0.01, 0.02))
    assert few["save"] / many["save"] == pytest.approx(2, rel=0.5) and few["decode"] > few["step"]
