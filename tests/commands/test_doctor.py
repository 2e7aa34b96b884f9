import json
from importlib import metadata

import numpy as np
import pytest

from ldae import cli
from ldae.machine import rates


def test_the_table_has_a_line_for_each_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rates, "_SECONDS", 0.01)
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


def test_a_checkout_that_is_not_installed_is_measured_too(tmp_path, monkeypatch):
    def version(package: str):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(rates, "_SECONDS", 0.01)
    monkeypatch.setattr(metadata, "distribution", version)
    assert cli.main(["doctor", "--data", "digits", "--scale", "demo", "--device", "cpu"]) == 0


def test_images_of_any_channels_are_decoded_and_bad_ones_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rates, "_SECONDS", 0.01)
    for number in range(20):
        np.save(tmp_path / f"{number}.npy", np.full((40, 40, 5), number, np.uint8))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    argv = ["doctor", "--data", str(tmp_path), "--scale", "demo", "--device", "cpu"]
    assert cli.main([*argv, "--in-chans", "5"]) == 0
    assert cli.main(argv) == 2  # of five channels none are readable as three


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
