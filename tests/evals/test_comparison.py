"""A verdict follows from the numbers, what has changed, and what versions and devices explain."""

import copy
import math

import pytest

from ldae.evals.comparison import compare

RECORD = {
    "task": "knn",
    "protocol": {"name": "dino", "k": [10]},
    "backbone": {"spec": "vit", "sha256": "a"},
    "data": {"spec": "x", "eval_spec": "y", "fingerprint": "1", "eval_fingerprint": "2"},
    "results": {"top1": 90.0, "top5": 99.0, "sweep": [1.0]},
    "environment": {"device": "cpu", "cpu_threads": 1, "packages": {"torch": "2.10"}},
    "call": {"command": "knn"},
}


@pytest.fixture
def records():
    """records(**changes): the record, with changes of entries by their dotted names; a__b is a.b"""

    def make(**changes) -> dict:
        record = copy.deepcopy(RECORD)
        for name, value in changes.items():
            *parents, key = name.split("__")
            part = record
            for parent in parents:
                part = part[parent]
            part[key] = value
        return record

    return make


def verdict(then: dict, now: dict, tolerance: float = 0.1) -> str:
    return compare(then, now, ["top1", "top5"], tolerance)["verdict"]


def test_equal_results_are_equal_whatever_has_changed(records):
    assert verdict(records(), records()) == "equal"
    now = records(environment__device="cuda:0", backbone__sha256="b")
    compared = compare(records(), now, ["top1"], 0.1)
    assert compared["verdict"] == "equal" and "weights of vit" in compared["sentence"]


@pytest.mark.parametrize("change", [{"results__top1": 90.0 + 1e-12}, {"results__sweep": [2.0]}])
def test_without_a_change_the_last_bit_counts(change, records):
    assert verdict(records(), records(**change)) == "different"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"environment__packages__torch": "2.11"}, "torch 2.10 then, 2.11 now"),
        ({"environment__cpu_threads": 2}, "cpu_threads 1 then, 2 now"),
        ({"environment__device": "cuda:1"}, "device cpu then, cuda now"),
    ],
)
def test_a_version_or_device_explains_as_much_as_the_tolerance(change, words, records):
    for difference, expected in ((0.09, "close"), (-0.09, "close"), (0.11, "different")):
        now = records(**change, results__top1=90.0 + difference)
        compared = compare(records(), now, ["top1", "top5"], 0.1)
        assert compared["verdict"] == expected and compared["explained"] == [words]
        assert words in compared["sentence"]
        assert compared["numbers"]["top1"]["difference"] == pytest.approx(difference)
    assert verdict(records(), records(**change, results__sweep=[2.0])) == "close"


def test_one_image_may_always_differ(records):
    data = RECORD["data"] | {"eval_images": 60}
    for images, expected in ((1, "close"), (2, "different")):
        now = records(environment__cpu_threads=2, results__top1=90.0 - 100 * images / 60)
        assert verdict(records(data=data), now | {"data": data}) == expected


def test_a_gpu_explains_what_a_cpu_does_not(records):
    for device, expected in (("cpu", "different"), ("cuda:0", "close")):
        then, now = (records(environment__device=device, results__top1=t) for t in (90.0, 90.05))
        assert verdict(then, now) == expected
    then, now = (records(environment__device=f"cuda:{n}") for n in (0, 1))
    assert compare(then, now, ["top1"], 0.1)["explained"] == [
        "a GPU adds in an order that is not fixed"
    ]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"backbone__sha256": "b"}, "the weights of vit have changed"),
        ({"data__fingerprint": "3"}, "the train images of x have changed"),
        ({"data__eval_fingerprint": "3"}, "the graded images of y have changed"),
        ({"protocol__k": [20]}, "protocol.k was [10] and is [20]"),
    ],
)
def test_other_weights_images_and_settings_explain_nothing_away(change, words, records):
    now = records(**change, environment__cpu_threads=2, results__top1=90.01)
    compared = compare(records(), now, ["top1"], 0.1)
    assert compared["verdict"] == "different" and compared["changed"] == [words]
    assert words in compared["sentence"]


def test_parts_that_only_one_record_has_are_no_change(records):
    now = records(protocol__new=3, environment__ranks=2)
    compared = compare(records(), now, ["top1"], 0.1)
    assert compared["changed"] == compared["explained"] == []


@pytest.mark.parametrize("task", ["finetune", "detect"])
def test_the_trained_weights_of_a_fine_tuning_are_a_result(task, records):
    then = records(task=task, protocol__starts_from="s")
    now = records(task=task, protocol__starts_from="s", backbone__sha256="b")
    assert compare(then, now, ["top1"], 0.1)["changed"] == []
    now["protocol"]["starts_from"] = "t"
    assert compare(then, now, ["top1"], 0.1)["changed"] == ["the weights of vit have changed"]


def test_the_first_of_the_weights_of_several_seeds_stand_for_all(records):
    """Older records have the first alone."""
    older, several = records(), records(backbone__sha256=["a", "b"])
    for then, now in ((several, older), (older, several)):
        assert compare(then, now, ["top1"], 0.1)["changed"] == []
    other = records(backbone__sha256=["c", "b"])
    assert compare(older, other, ["top1"], 0.1)["changed"] == ["the weights of vit have changed"]


def test_a_distance_may_differ_by_a_share_of_its_value(records):
    for factor, expected in ((1.0009, "close"), (1.0011, "different")):
        then = records(results={"fid": 20.0})
        now = records(results={"fid": 20.0 * factor}, environment__cpu_threads=2)
        assert compare(then, now, ["fid"], 0.1)["verdict"] == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_is_different(value, records):
    now = records(results__top1=value, environment__cpu_threads=2)
    assert verdict(records(), now) == "different"


def test_a_missing_number_is_different(records):
    now = records(results={"top5": 99.0}, environment__cpu_threads=2)
    assert verdict(records(), now) == "different"
