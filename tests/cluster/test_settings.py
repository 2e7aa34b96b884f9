"""Settings of jobs: their flags, their checks, and the folder of a job."""

from pathlib import Path

import pytest

from ldae.cluster.settings import (
    SlurmSettings,
    check_settings,
    folder_of,
    parse_flags,
    parse_time_limit,
    set_tasks,
    split_flags,
)
from ldae.errors import InputError
from ldae.tree import replace


def test_flags_are_split_off_at_any_position():
    argv = [
        "a",
        "--slurm.setup",
        "--x y",
        "--k",
        "5",
        "--slurm",
        "b c",
        "--slurm.time=1:00",
        "--slurmx",
    ]
    command, flags = split_flags(argv)
    assert command == ["a", "--k", "5", "b c", "--slurmx"]
    assert flags == ["--slurm.setup", "--x y", "--slurm", "--slurm.time=1:00"]
    settings = parse_flags(
        ["--slurm", "--slurm.setup=a b", "--slurm.setup=c", "--slurm.nodes", "3"]
    )
    assert settings == SlurmSettings(setup=("a b", "c"), nodes=3)
    base = SlurmSettings(partition="gpu", setup=("a",))
    assert parse_flags(["--slurm.nodes", "2"], base) == replace(base, {"nodes": 2})


@pytest.mark.parametrize(
    "time, expected",
    [("90", 90), ("90:30", 91), ("1:30:00", 90), ("0:00:01", 1), ("2-00", 2880), ("1-02:30", 1590)],
)
def test_time_limits_have_sbatchs_formats(time, expected):
    assert parse_time_limit(time) == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"time": "two days"}, "slurm.time must be like"),
        ({"time": "0"}, "at least a minute"),
        ({"nodes": 0}, "slurm.nodes must be at least 1"),
        ({"setup": ("a\nb",)}, "slurm.setup 'a.nb' must be one line"),
        ({"extra": ("qos=a\n#SBATCH -x",)}, "must be one line"),
        ({"extra": ("--qos=a",)}, "slurm.extra must be an option of sbatch as KEY=VALUE"),
        ({"extra": ("output=x",)}, "slurm.extra output is set by ldae itself"),
        ({"extra": ("ntasks-per-node=4",)}, "ntasks-per-node: use slurm.tasks_per_node"),
        ({"cluster": "local", "nodes": 2}, "local has one machine"),
        ({"cluster": "debug", "gpus_per_node": 2}, "debug has one process, not 2"),
    ],
)
def test_wrong_settings_are_refused(changes, message, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    with pytest.raises(InputError, match=message.replace(".n", ".+")):
        check_settings(SlurmSettings(**changes))


def test_devices_are_the_processes_of_each_machine():
    assert set_tasks(SlurmSettings(nodes=3), 0) == SlurmSettings(nodes=3)
    assert set_tasks(SlurmSettings(nodes=3), 2) == SlurmSettings(nodes=3, tasks_per_node=2)
    assert set_tasks(SlurmSettings(gpus_per_node=2), 2).tasks == 2
    for name in ("tasks_per_node", "gpus_per_node"):
        with pytest.raises(InputError, match=f"--devices 2 contradicts slurm.{name} 4"):
            set_tasks(SlurmSettings(**{name: 4}), 2)


def test_a_machine_without_sbatch_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="no sbatch on this machine; --slurm.cluster local"):
        check_settings(SlurmSettings())


def test_jobs_go_to_the_run_folder_of_the_command(tmp_path):
    (tmp_path / "config.yaml").write_text("kind: pretraining\n")
    assert folder_of(SlurmSettings(), ["x", "--run", "a b"]) == Path("a b")
    assert folder_of(SlurmSettings(), ["x", "--run=a b"]) == Path("a b")
    assert folder_of(SlurmSettings(), [str(tmp_path), "--data", "x"]) == tmp_path
    assert folder_of(SlurmSettings(), ["--data", "x", str(tmp_path)]) == tmp_path
    assert folder_of(SlurmSettings(), ["pixels"]) == Path()
    assert folder_of(SlurmSettings(), ["x", "--run=~/r"]) == Path.home() / "r"
    assert folder_of(SlurmSettings(folder="f"), ["x", "--run", "r"]) == Path("f")


def test_the_resources_are_said_in_words():
    many = SlurmSettings(nodes=2, gpus_per_node=8, time="2-0")
    assert many.resources == "2 machines, each with 8 GPUs, 2-0"
    assert SlurmSettings(gpus_per_node=1).resources == "1 machine with 1 GPU, 1:00:00"
