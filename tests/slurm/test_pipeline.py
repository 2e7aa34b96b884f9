"""Pipelines on a real SLURM: the jobs that follow wait for the pre-training."""

import shlex

from slurm.cluster import wait_for

from ldae.cluster.status import read_statuses
from ldae.commands.submit import submit
from ldae.tree import to_yaml

KNN = "--data scattered-digits:50 --k 5 --workers 0 --device cpu"


def write_pipeline(tmp_path, config, run) -> None:
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    row, folder = shlex.quote(str(tmp_path / "tiny.yaml")), shlex.quote(str(run))
    (tmp_path / "study.toml").write_text(f"""
[slurm]
array_parallelism = 2
[pretrain]
command = "pretrain {row} --run {folder}"
slurm = {{ tasks_per_node = 2 }}
[jobs.knn]
command = "knn {folder} {KNN}"
[jobs.wrong]
command = "knn {folder} {KNN} --eval-data nowhere"
[jobs.export]
command = "export {folder} {folder}/exported"
""")


def test_a_failed_evaluation_is_reported_and_the_others_finish(tiny, tmp_path):
    run = tmp_path / "a run"
    write_pipeline(tmp_path, tiny(optim__epochs=1), run)
    submit(tmp_path / "study.toml")
    first, *others = read_statuses(run)
    array, _ = others[0].id.split("_")
    assert [other.id for other in others] == [f"{array}_{n}" for n in range(3)]
    script = run / "jobs" / array / f"{array}_submission.sh"
    assert "--array=0-2%2\n" in script.read_text() and f"afterok:{first.id}" in script.read_text()
    ended = ("done", "failed", "cancelled")
    wait_for(lambda: all(s.state in ended for s in read_statuses(run)), "end of all jobs")
    statuses = read_statuses(run)
    assert [status.state for status in statuses] == ["done", "done", "failed", "done"], statuses
    assert "nowhere" in statuses[2].message and statuses[2].message.startswith("ldae: ")
    assert list(run.glob("evals/*/results.json")) and (run / "exported" / "config.json").exists()


def test_no_job_starts_after_a_failed_pretraining(tiny, tmp_path):
    run = tmp_path / "run"
    write_pipeline(tmp_path, tiny(data__source="nowhere"), run)
    submit(tmp_path / "study.toml")
    ended = ("failed", "cancelled")
    wait_for(lambda: all(s.state in ended for s in read_statuses(run)), "end of all jobs")
    assert [status.state for status in read_statuses(run)] == ["failed"] + 3 * ["cancelled"]
