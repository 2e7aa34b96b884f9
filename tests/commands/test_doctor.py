import json

import pytest

from ldae import cli
from ldae.commands import doctor as command
from ldae.commands.doctor import IMAGENET_IMAGES, check_packages, extrapolate, find_problems

RATES = {"decode": 500.0, "copy": 40_000.0, "step": 100.0, "step_flops": 1e9, "save": 4e8}
MACHINE = {"cores": 16, "gpus": 1, "native_bf16": True, "shared": 10**9, "shared_free": 10**9}


def test_the_table_has_a_line_for_each_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_SECONDS", 0.01)
    file = tmp_path / "doctor.json"
    argv = ["--data", "digits", "--scale", "demo", "--device", "cpu", "--json", str(file)]
    assert cli.main(["doctor", *argv, "--run", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    names = "versions device cores shared decode copy matrix step save bound ImageNet".split()
    assert [line.split()[0] for line in out.splitlines()][: len(names)] == names
    assert "extrapolated, not measured" in out and "485.8 GFLOP" in out
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]
    record = json.loads(file.read_text())
    assert all(
        record["rates"][name] > 0 for name in ("decode_one_worker", "decode", "step", "save")
    )


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


def test_on_a_cpu_decoding_and_the_step_share_the_cores():
    found = extrapolate({**RATES, "step_flops": 485e9}, gpus=0)
    assert "copy" not in found["hours"]
    assert found["total_hours"] == found["hours"]["decode"] + found["hours"]["step"]


@pytest.mark.parametrize(
    "change, cure",
    [
        ({"shared_free": 10**7}, "--shm-size"),
        ({"native_bf16": False}, "compute capability 8"),
        ({"cores": 4}, "--system.workers 4"),
        ({"gpus": 4}, "--system.workers 4"),
    ],
)
def test_a_problem_names_its_cure(change, cure):
    assert find_problems(MACHINE) == []
    (problem,) = find_problems(MACHINE | change)
    assert cure in problem


def test_old_and_missing_packages_are_named():
    versions = {"timm": "1.0.9", "torch": "2.10.0+cu128", "pytest": None}.get
    requirements = ["timm>=1.0.15", "torch>=2.5", "tqdm>=4.60"]
    requirements += ["wandb>=0.16; extra == 'wandb'", "pytest>=8; extra == 'test'"]
    problems, optional = check_packages(requirements, versions)
    assert problems == [
        "timm 1.0.9 is too old: pip install 'timm>=1.0.15'",
        "tqdm is not installed: pip install 'tqdm>=4.60'",
    ]
    assert len(optional) == 1 and "ldae[wandb]" in optional[0]


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--data", "nowhere"], "nowhere"),
        (["--scale", "huge"], "huge"),
        (["--run", "/proc/1/nowhere"], "/proc/1"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_wrong_input_is_one_sentence(argv, named, capsys):
    assert cli.main(["doctor", *argv]) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1
