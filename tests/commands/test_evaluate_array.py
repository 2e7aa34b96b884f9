"""Missing cells that share features are one job of an array, and all jobs fill one table."""

import json
import os
import shlex
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from ldae import cli
from ldae.cluster.requeue import option_values
from ldae.cluster.settings import SlurmSettings
from ldae.cluster.status import read_statuses
from ldae.commands import evaluate as command
from ldae.commands.evaluate import evaluate, send_cells
from ldae.errors import InputError
from ldae.evals import features
from ldae.files import write_json

SUITE = """
[data.digits]
train = "digits"
[protocols.knn]
k = [5]
[protocols.retrieve]
k = [1]
"""
DEBUG = SlurmSettings(cluster="debug")
CELLS = ["pixels-8/digits/knn", "pixels-8/digits/retrieve"]


@pytest.fixture
def sent(monkeypatch) -> list[str]:
    """The cells of all jobs that were run on this machine."""
    cells, original = [], command.run_array

    def run_array(commands, *args):
        for name, words in commands.items():
            cells.extend(option_values(words, "--only"))
            assert name.split(", ") == option_values(words, "--only")
        return original(commands, *args)

    monkeypatch.setattr(command, "run_array", run_array)
    return cells


def queue(folder) -> list[list[str]]:
    """Return the cells of each job with a record in a folder."""
    words = (shlex.split(status.command) for status in read_statuses(folder))
    return [option_values(command, "--only") for command in words]


def test_an_array_fills_the_table_of_one_process(suite, setup, sent, tmp_path):
    alone = evaluate(("pixels:8",), suite=suite, setup=replace(setup, out=tmp_path / "alone"))
    table = send_cells(DEBUG, ("pixels:8",), suite=suite, setup=setup)
    assert table == alone == json.loads((setup.out / "table.json").read_text())
    assert sent == CELLS
    for name in ("table.md", "table.csv"):
        assert (setup.out / name).read_text() == (tmp_path / "alone" / name).read_text()
    # One process takes the cells of an array as finished, and an array those of one process.
    again = evaluate(("pixels:8",), suite=suite, setup=setup)
    assert again == table
    own = replace(setup, out=tmp_path / "alone")
    assert send_cells(DEBUG, ("pixels:8",), suite=suite, setup=own) == alone
    assert not (tmp_path / "alone" / "jobs").exists()


def test_a_job_extracts_the_features_of_its_cells_once(suite, setup, monkeypatch):
    suite.write_text(SUITE + '[protocols.linear-mae]\nverb = "linear"\nprotocol = "mae"\n')
    jobs, extracted, original = [], [], features.encode_share

    def encode_share(encoder, source):
        extracted.append(source.split)
        return original(encoder, source)

    monkeypatch.setattr(features, "encode_share", encode_share)
    monkeypatch.setattr(command, "send_array", lambda commands, *_: jobs.extend(commands.values()))
    send_cells(SlurmSettings(), ("pixels:8", "pixels:4"), suite=suite, setup=setup)
    other = [cell.replace("-8", "-4") for cell in CELLS]
    cells = [option_values(words, "--only") for words in jobs]
    assert cells == [CELLS, ["pixels-8/digits/linear-mae"], other, ["pixels-4/digits/linear-mae"]]
    assert cli.main(jobs[0]) == 0
    assert sorted(extracted) == ["eval", "train"]


def test_the_same_command_again_sends_only_what_is_missing(suite, setup, sent, capsys):
    send_cells(DEBUG, ("pixels:8",), suite=suite, setup=setup)
    send_cells(DEBUG, ("pixels:8",), suite=suite, setup=setup)
    assert sent == CELLS
    assert "2 of 2 cells were finished, 0 sent in 0 jobs" in capsys.readouterr().out
    shutil.rmtree(setup.out / CELLS[1])
    send_cells(DEBUG, ("pixels:8",), suite=suite, setup=setup)
    assert sent == [*CELLS, CELLS[1]]
    assert "knn of pixels-8 on digits: finished before\n" in capsys.readouterr().out
    suite.write_text(SUITE.replace("k = [5]", "k = [7]"))
    send_cells(DEBUG, ("pixels:8",), suite=suite, setup=setup)
    assert sent[3:] == [CELLS[0]]


def test_where_the_images_cannot_be_seen_the_results_count(suite, setup, sent, tmp_path, capsys):
    """Such as on a login node, with the images on the disks of the others."""
    images = tmp_path / "images"
    for name in ("train/a/1", "train/b/2", "val/a/3", "val/b/4"):
        path = images / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), int(name[-1])).save(path)
    suite.write_text(f"[data.d]\ntrain = '{images}'\n[protocols.knn]\nk = [1]")
    table = send_cells(DEBUG, ("pixels:8",), suite=suite, setup=setup)
    images.rename(tmp_path / "elsewhere")
    assert send_cells(DEBUG, ("pixels:8",), suite=suite, setup=setup) == table
    assert sent == ["pixels-8/d/knn"]
    assert "finished before; whether its images have changed is unknown" in capsys.readouterr().out


def test_other_weights_are_sent_again(suite, setup, sent, monkeypatch):
    send_cells(DEBUG, ("pixels:8",), suite=suite, setup=setup)
    with monkeypatch.context() as changed:
        changed.setattr("ldae.evals.running.state_hash", lambda state: "other")
        send_cells(DEBUG, ("pixels:8",), suite=suite, setup=setup)
    assert sorted(sent) == sorted([*CELLS, *CELLS])


def test_a_cell_that_fails_is_in_the_table_with_its_reason(suite, setup, sent):
    """Its job has failed in another process; the others are done."""
    suite.write_text(SUITE + '[data.nowhere]\ntrain = "nowhere"\n')
    with pytest.raises(InputError, match="1 of 2 jobs failed"):
        send_cells(DEBUG, ("pixels:8",), suite=suite, setup=setup)
    text = (setup.out / "table.md").read_text()
    assert text.count("| failed |") == 1 and "| failed | failed |" in text
    assert "- knn of pixels-8 on nowhere: no folder, archive or built-in data set" in text
    states = [status.state for status in read_statuses(setup.out)]
    assert sorted(states) == ["done", "failed"]
    suite.write_text(SUITE + '[data.nowhere]\ntrain = "digits"\n')
    send_cells(DEBUG, ("pixels:8",), suite=suite, setup=setup)
    assert "failed" not in (setup.out / "table.md").read_text()
    assert len(sent) == 6


def test_jobs_get_the_backbones_and_the_setup(suite, setup, sent):
    setup = replace(setup, batch_size=9, seeds=(1, 2))
    suite.write_text(SUITE + "[protocols.linear]\nepochs = 1\nlearning_rates = [0.1]\n")
    send_cells(DEBUG, ("pixels:8", "pixels:4"), suite=suite, only=("pixels-4",), setup=setup)
    cells = [f"pixels-4/digits/{name}" for name in ("knn", "retrieve")]
    cells += [f"pixels-4/digits/linear/seed={seed}" for seed in (1, 2)]
    assert sent == cells
    for cell in cells:
        call = json.loads((setup.out / cell / "results.json").read_text())["call"]
        assert call["settings"]["setup"]["batch_size"] == 9 and call["arguments"] == ["pixels:4"]
    text = (setup.out / "table.md").read_text()
    assert " ± " in text and text.count("to do") == 3  # of the other backbone


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A fake sbatch that keeps the batch script; there is no squeue and no sacct."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f'#!/bin/sh\ncp "$1" "{folder}/script"\necho Submitted batch job 7\n'
    )
    (folder / "srun").write_text("")  # submitit looks for it
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "script"


def test_slurm_gets_one_array_and_no_cell_twice(suite, setup, sbatch, capsys):
    words = ["evaluate", "pixels:8", "pixels:4", "--suite", str(suite), "--out", f"{setup.out}/"]
    words += ["--in-chans", "1", "--workers", "0", "--device", "cpu"]
    flags = ["--slurm", "--slurm.array-parallelism", "1"]
    assert cli.main([*words, *flags]) == 0
    assert "#SBATCH --array=0-1%1\n" in sbatch.read_text()
    assert queue(setup.out) == [CELLS, [cell.replace("-8", "-4") for cell in CELLS]]
    assert (setup.out / "table.md").read_text().count("to do") == 4
    sbatch.unlink()
    capsys.readouterr()
    assert cli.main([*words, *flags]) == 0
    assert not sbatch.exists()
    printed = capsys.readouterr().out
    for number, name in enumerate(("pixels-8", "pixels-4")):
        for verb in ("knn", "retrieve"):
            assert f"{verb} of {name} on digits: in the queue as job 7_{number}\n" in printed
    write_json(setup.out / "jobs" / "7_0" / "state.json", {"state": "failed"})
    assert cli.main([*words, *flags]) == 0
    assert sbatch.exists() and "--array" not in sbatch.read_text()  # a single job


def test_a_cell_in_the_queue_of_another_table_is_sent(suite, setup, sbatch, tmp_path):
    slurm = SlurmSettings(folder=str(tmp_path / "jobs of both"))
    for name in ("one", "other"):
        own = replace(setup, out=tmp_path / name)
        send_cells(slurm, ("pixels:8",), suite=suite, setup=own)
    # The fake gives both arrays the same ids, so the second one has replaced the first.
    commands = [status.command for status in read_statuses(tmp_path / "jobs of both")]
    assert commands and all(str(tmp_path / "other") in command for command in commands)


def test_a_part_of_the_cells_is_run_and_the_table_keeps_the_rest(suite, setup):
    evaluate(("pixels:8",), suite=suite, only=(CELLS[0],), setup=setup)
    table = evaluate(("pixels:8",), suite=suite, only=("pixels-8/digits/retrieve/",), setup=setup)
    assert [bool(cell["results"]) for cell in table["cells"]] == [True, True]
    with pytest.raises(InputError, match="no cell 'pixels-8/digits/kn'; the nearest is .*/knn'"):
        evaluate(("pixels:8",), suite=suite, only=("pixels-8/digits/kn",), setup=setup)


def test_results_that_come_while_the_table_is_written_are_in_it(suite, setup, monkeypatch):
    """Another process ends its cell after this one has read the results."""
    evaluate(("pixels:8",), suite=suite, only=(CELLS[1],), setup=setup)
    late = setup.out / CELLS[1] / "results.json"
    hidden = late.rename(late.with_name("hidden"))
    original, calls = command.write_table, []

    def write_table(*args):
        table = original(*args)
        if hidden.exists():
            hidden.rename(late)
        calls.append(table)
        return table

    monkeypatch.setattr(command, "write_table", write_table)
    table = evaluate(("pixels:8",), suite=suite, only=(CELLS[0],), setup=setup)
    assert all(cell["results"] for cell in table["cells"])
    assert not calls[0]["cells"][1]["results"] and table == calls[-1]


def test_jobs_of_this_machine_run_in_processes_of_their_own(suite, setup):
    slurm = SlurmSettings(cluster="local")
    table = send_cells(slurm, ("pixels:8",), suite=suite, only=(CELLS[0],), setup=setup)
    assert table["cells"][0]["results"] and not table["cells"][1]["results"]
    assert [status.state for status in read_statuses(setup.out)] == ["done"]
