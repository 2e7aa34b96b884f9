"""What a job asks for is taken as it is said, or refused by name."""

from pathlib import Path

import pytest

from ldae.cluster.settings import Slurm, check_settings, folder_of, minutes, parse, split
from ldae.errors import InputError
from ldae.tree import replace


def test_flags_are_split_off_wherever_they_stand():
    given = [
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
    own, flags = split(given)
    assert own == ["a", "--k", "5", "b c", "--slurmx"]
    assert flags == ["--slurm.setup", "--x y", "--slurm", "--slurm.time=1:00"]
    settings = parse(["--slurm", "--slurm.setup=a b", "--slurm.setup=c", "--slurm.nodes", "3"])
    assert settings == Slurm(setup=("a b", "c"), nodes=3)
    base = Slurm(partition="gpu", setup=("a",))
    assert parse(["--slurm.nodes", "2"], base) == replace(base, {"nodes": 2})


@pytest.mark.parametrize(
    "time, expected",
    [("90", 90), ("90:30", 91), ("1:30:00", 90), ("0:00:01", 1), ("2-00", 2880), ("1-02:30", 1590)],
)
def test_time_limits_are_sbatchs(time, expected):
    assert minutes(time) == expected


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"time": "two days"}, "slurm.time must be like"),
        ({"time": "0"}, "at least a minute"),
        ({"nodes": 0}, "slurm.nodes must be at least 1"),
        ({"setup": ("a\nb",)}, "slurm.setup 'a.nb' must be one line"),
        ({"extra": ("qos=a\n#SBATCH -x",)}, "must be one line"),
        ({"extra": ("--qos=a",)}, "slurm.extra must be KEY=VALUE"),
        ({"extra": ("output=x",)}, "slurm.extra output is set by ldae itself"),
        ({"cluster": "local", "nodes": 2}, "local is one machine"),
        ({"cluster": "debug", "gpus_per_node": 2}, "debug is one process, not 2"),
    ],
)
def test_wrong_settings_are_told(changes, told, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    with pytest.raises(InputError, match=told.replace(".n", ".+")):
        check_settings(replace(Slurm(), changes))


def test_without_sbatch_it_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="no sbatch here; --slurm.cluster local"):
        check_settings(Slurm())


def test_a_jobs_folder_is_that_of_its_run(tmp_path):
    (tmp_path / "config.yaml").write_text("kind: pretraining\n")
    assert folder_of(Slurm(), ["x", "--run", "a b"]) == Path("a b")
    assert folder_of(Slurm(), ["x", "--run=a b"]) == Path("a b")
    assert folder_of(Slurm(), [str(tmp_path), "--data", "x"]) == tmp_path
    assert folder_of(Slurm(), ["pixels"]) == Path()
    assert folder_of(Slurm(folder="f"), ["x", "--run", "r"]) == Path("f")
