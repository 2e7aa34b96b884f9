import errno

import pytest
import yaml

import ldae
from ldae import console, tree


def test_a_dry_run_is_settings_and_then_facts_in_one_column():
    config = ldae.config("l_dae")
    facts = {"images": "64 in digits", "tokens per image": "16, each of 192 numbers"}
    settings, facts_shown = console.describe(config, facts).split("\n\n")
    leaves = tree.flatten_table(yaml.safe_load(settings))
    assert tree.replace(ldae.Config(), leaves) == config
    assert {line[:18].rstrip(): line[18:] for line in facts_shown.splitlines()} == facts


def test_durations_are_shown_as_a_clock():
    assert console.format_duration(5.9) == "00:00:05"
    assert console.format_duration(3 * 3600 + 62) == "03:01:02"
    assert console.format_duration(93784) == "1d 02:03:04"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_line_is_left_out_on_a_closed_terminal_alone(number, monkeypatch):
    class Broken:
        def write(self, text: str) -> None:
            raise OSError(number, "broken")

    monkeypatch.setattr("sys.stdout", Broken())
    if number == errno.EIO:
        console.print_main("loss 0.5")
    else:
        with pytest.raises(OSError, match="broken"):
            console.print_main("loss 0.5")
