"""Pipelines: errors name the file and the key, and jobs after the pre-training are independent."""

import os
import re
import shlex

import pytest

from ldae.cluster.settings import SlurmSettings
from ldae.cluster.status import read_statuses
from ldae.commands.submit import read_pipeline, submit
from ldae.errors import InputError
from ldae.tree import to_yaml

STUDY = """
[slurm]
cluster = "local"
time = "2:00:00"
[pretrain]
command = "ldae pretrain l_dae --data 'my images' --run runs/a"
slurm = { tasks_per_node = 8, time = "2-00" }
[jobs.knn]
command = ["knn", "runs/a", "--data", "my images"]
[jobs.finetune]
command = "finetune runs/a --recipe mae --data x --run runs/b"
slurm = { tasks_per_node = 2 }
"""


@pytest.fixture
def study(tmp_path):
    def make(text: str = STUDY):
        path = tmp_path / "study.toml"
        path.write_text(text)
        return path

    return make


def test_a_pipeline_is_a_list_of_commands_with_settings(study):
    base = SlurmSettings(cluster="local", time="2:00:00")
    first, others = read_pipeline(study())
    data = ("--data", "my images")
    assert first.command == ("pretrain", "l_dae", *data, "--run", "runs/a")
    assert first.settings == SlurmSettings(cluster="local", tasks_per_node=8, time="2-00")
    assert [stage.name for stage in others] == ["knn", "finetune"]
    assert others[0].command == ("knn", "runs/a", *data) and others[0].settings == base
    assert others[1].settings == SlurmSettings(cluster="local", time="2:00:00", tasks_per_node=2)
    first, others = read_pipeline(study(), ["--slurm.account", "mine"])
    assert first.settings.account == others[0].settings.account == "mine"


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[slurm]", "[slrm]", r"the pipeline has no setting 'slrm'; the nearest is 'slurm'"),
        ("[jobs.knn]", "[job.knn]", "no setting 'job'"),
        ('time = "2:00:00"', 'tim = "1"', r"\[slurm\]: there is no setting 'tim'.*'time'"),
        ('time = "2:00:00"', "nodes = 'x'", r"\[slurm\]: setting 'nodes' takes int, not 'x'"),
        (
            "tasks_per_node = 2",
            "nodes = 2",
            r"\[jobs.finetune\]: slurm.cluster local has one machine",
        ),
        ("tasks_per_node = 2", "node = 2", r"\[jobs.finetune.slurm\]: there is no setting 'node'"),
        (
            "slurm = { tasks_per_node = 2 }",
            "after = 1",
            r"\[jobs.finetune\] has no setting 'after'",
        ),
        (
            "tasks_per_node = 2",
            'cluster = "debug"',
            r"\[jobs.finetune\] has the cluster debug, and \[pretrain\] has local",
        ),
        ('command = ["knn",', 'command = ["kn",', r"\[jobs.knn\]: there is no command 'kn'"),
        ('"--data", "my', '"--dta", "my', r"\[jobs.knn\] command: .*--dta.* is refused"),
        ('["knn", "runs/a", "--data", "my images"]', "[]", r"\[jobs.knn\] needs a command"),
        ('"my images"]', '"x", "--slurm"]', r"--slurm belongs in \[jobs.knn.slurm\]"),
        (
            '"--data", "my images"]',
            '"--data", "x", "--devices", "2"]',
            r"\[jobs.knn\]: a job has slurm.tasks_per_node ranks on each machine, not --devices",
        ),
        ("ldae pretrain", "fit-tokenizer", r"\[pretrain\] command must be pretrain ... --run"),
        ("'my images'", "'my images", r"\[pretrain\] command: No closing quotation"),
        ("[pretrain]", "[pretrain", "it is not a TOML file"),
    ],
)
def test_an_error_names_the_file_and_the_key(old, new, message, study, capsys):
    assert old in STUDY
    with pytest.raises(InputError, match="study.toml: ") as error:
        read_pipeline(study(STUDY.replace(old, new, 1)))
    assert re.search(message, str(error.value)), error.value


def test_a_missing_file_and_an_empty_file_are_refused(study, tmp_path):
    with pytest.raises(InputError, match="no.toml: it cannot be read"):
        read_pipeline(tmp_path / "no.toml")
    with pytest.raises(InputError, match=r"there is no \[pretrain\]"):
        read_pipeline(study(""))


@pytest.fixture
def debug(study, tiny, tmp_path):
    """debug(source): a study of three jobs in this process; the evaluation "wrong" has no data."""

    def make(source: str):
        (tmp_path / "tiny.yaml").write_text(to_yaml(tiny(data__source=source)))
        run, row = (shlex.quote(str(tmp_path / name)) for name in ("a run", "tiny.yaml"))
        knn = "--data scattered-digits:50 --k 5 --workers 0"
        return study(f"""
[slurm]
cluster = "debug"
[pretrain]
command = "pretrain {row} --run {run}"
[jobs.wrong]
command = "knn {run} --data nowhere"
[jobs.knn]
command = "knn {run} {knn}"
""")

    return make


def test_a_failed_evaluation_does_not_stop_the_others(debug, tmp_path):
    with pytest.raises(InputError, match="1 of 2 jobs failed"):
        submit(debug("scattered-digits:64"))
    statuses = read_statuses(tmp_path / "a run")
    assert sorted(status.state for status in statuses) == ["done", "done", "failed"]
    assert list((tmp_path / "a run").glob("evals/*/results.json"))


def test_no_job_starts_after_a_failed_pretraining(debug, tmp_path):
    with pytest.raises(InputError, match="pretrain failed, so no other job was started"):
        submit(debug("nowhere"))
    assert [status.state for status in read_statuses(tmp_path / "a run")] == ["failed"]


def test_a_refused_job_says_that_the_pretraining_was_sent(study, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f"#!/bin/sh\n[ -e '{folder}/sent' ] && {{ echo 'sbatch: error: no' >&2; exit 1; }}\n"
        f"touch '{folder}/sent'; echo Submitted batch job 7\n"
    )
    (folder / "srun").write_text("")  # submitit looks for it
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    flags = ["--slurm.cluster", "slurm", "--slurm.folder", str(tmp_path)]
    with pytest.raises(InputError, match="no; pretrain was sent before, as job 7: scancel it"):
        submit(study(), flags=flags)
