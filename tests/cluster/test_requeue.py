"""After which ends a job is requeued. SLURM's answers are recorded from a real SLURM."""

import json
import os
import signal

import pytest

from ldae.cluster import requeue
from ldae.errors import LOST_RANK

RUNNING = "JobId=7 JobName=x JobState=RUNNING Reason=None Restarts=0 PreemptMode=n/a"
ENDING = "JobId=7 JobName=x JobState=COMPLETING Reason={} Restarts={} Requeue=1{}"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """job(answer): make the folder of job 7, and a fake scontrol that prints the answer."""
    for name in list(os.environ):
        if name.startswith("SLURM"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script, answer_file = tmp_path / "scontrol", tmp_path / "answer"
    script.write_text(
        f"#!/bin/sh\n[ $1 = show ] && exec cat '{answer_file}'\necho $@ >> '{tmp_path}/requests'\n"
    )
    script.chmod(0o755)

    def make(answer: str):
        answer_file.write_text(answer)
        folder = tmp_path / "jobs" / "7"
        record = {"id": "7", "command": ["pretrain", "--run", "a run"], "directory": str(tmp_path)}
        requeue.files.write_json(folder / "job.json", record)
        requeue.record_start(folder, 0)
        return folder

    return make


def requests(tmp_path) -> list[str]:
    path = tmp_path / "requests"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "status, answer, requeued, state",
    [
        (143, RUNNING, True, "waiting"),
        (140, RUNNING, True, "waiting"),  # USR2
        (137, RUNNING, True, "waiting"),  # kill -9
        (LOST_RANK, RUNNING, True, "waiting"),
        (143, ENDING.format("TimeLimit", 0, ""), True, "waiting"),
        (143, ENDING.format("None", 0, " PreemptTime=2026-01-01T00:00:00"), True, "waiting"),
        (143, ENDING.format("None", 1, ""), False, "waiting"),  # SLURM has requeued it already
        (143, ENDING.format("None", 0, ""), False, "cancelled"),  # scancel
        (143, ENDING.format("None", 0, " PreemptTime=None"), False, "cancelled"),
        (137, RUNNING.replace("RUNNING", "CANCELLED"), False, "cancelled"),
        (1, RUNNING, True, "waiting"),  # srun could not start a rank
        (130, RUNNING, False, "failed"),  # the owner's Ctrl-C
        (0, RUNNING, False, "done"),
    ],
)
def test_requeue_after_each_end_of_a_job(status, answer, requeued, state, job, tmp_path):
    folder = job(answer)
    requeue.finish_slurm(status, folder.parent)
    assert requests(tmp_path) == (["requeue 7"] if requeued else [])
    assert requeue.read_state(folder)["state"] == state


@pytest.mark.parametrize("status", [1, 2])
def test_a_command_that_fails_by_itself_is_not_requeued(status, job, tmp_path):
    folder = job(RUNNING)
    requeue.record_end(folder, 0, status)
    requeue.finish_slurm(status, folder.parent)
    assert not requests(tmp_path) and requeue.read_state(folder)["state"] == "failed"


def test_the_rank_that_failed_decides_and_not_a_rank_that_was_killed_for_it(job, tmp_path):
    folder = job(RUNNING)
    requeue.record_end(folder, 0, 140)
    requeue.record_end(folder, 1, 2)
    requeue.finish_slurm(143, folder.parent)
    assert requeue.read_state(folder)["state"] == "failed" and not requests(tmp_path)
    requeue.record_end(folder, 0, 140)  # the 2 of rank 1 is forgotten
    requeue.finish_slurm(143, folder.parent)
    assert requests(tmp_path) == ["requeue 7"]
    assert requeue.read_state(folder)["said"] == "SIGUSR2; requeued"


def test_a_new_start_forgets_how_a_rank_of_the_last_one_ended(job, tmp_path):
    """The machine may be lost before the batch script reads the status."""
    folder = job(RUNNING)
    requeue.record_end(folder, 0, 2)
    requeue.record_start(folder, 0)
    requeue.finish_slurm(143, folder.parent)
    assert requests(tmp_path) == ["requeue 7"]


def test_a_job_without_progress_since_its_last_requeue_is_not_requeued(job, tmp_path, capsys):
    folder = job(RUNNING)
    checkpoints = tmp_path / "a run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for images, requeues in [(0, 1), (8, 2), (9, 3)]:
        (checkpoints / f"images-{images:012d}.pt").touch()
        requeue.finish_slurm(137, folder.parent)
        assert len(requests(tmp_path)) == requeue.read_state(folder)["requeues"] == requeues
    capsys.readouterr()
    requeue.finish_slurm(137, folder.parent)
    assert len(requests(tmp_path)) == 3
    assert requeue.read_state(folder)["state"] == "failed"
    printed = capsys.readouterr().out
    assert "nothing new was saved since the last requeue" in printed and "slurm.time" in printed


@pytest.mark.parametrize(
    "refusals, said", [(2, "SIGTERM; requeued"), (9, "the requeue failed: busy")]
)
def test_a_refused_requeue_is_tried_again_and_reported_at_last(
    refusals, said, job, tmp_path, monkeypatch
):
    folder = job(RUNNING)
    monkeypatch.setattr(requeue, "_PAUSES", (0, 0))
    (tmp_path / "scontrol").write_text(f"""#!/bin/sh
[ $1 = show ] && exec cat '{tmp_path}/answer'
echo >> '{tmp_path}/requests'
[ $(wc -l < '{tmp_path}/requests') -gt {refusals} ] || {{ echo busy >&2; exit 1; }}
""")
    requeue.finish_slurm(143, folder.parent)
    assert len(requests(tmp_path)) == 3
    state = requeue.read_state(folder)
    assert state["said"] == said
    assert state["state"] == ("waiting" if refusals == 2 else "failed")


def test_one_task_of_an_array_is_requeued_alone(job, tmp_path, monkeypatch):
    job(RUNNING)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue.finish_slurm(143, tmp_path / "jobs")
    assert requests(tmp_path) == ["requeue 7_3"]
    assert json.loads((tmp_path / "jobs" / "7_3" / "state.json").read_text())["requeues"] == 1


def test_a_local_job_is_requeued_after_its_time_limit_but_not_after_sigterm(job):
    folder = job("")
    usr2, term = 128 + signal.SIGUSR2, 128 + signal.SIGTERM
    assert requeue.finish_local(usr2, folder) == requeue.LOCAL_REQUEUE
    assert requeue.finish_local(usr2, folder) == usr2  # nothing was saved
    assert requeue.finish_local(term, folder) == term
    assert requeue.finish_local(0, folder) == 0 and requeue.read_state(folder)["state"] == "done"


def test_a_local_job_says_that_its_last_start_has_ended(job, tmp_path):
    """The command that starts it gives up without a word."""
    folder, usr2 = job(""), 128 + signal.SIGUSR2
    checkpoints = tmp_path / "a run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    ends = []
    for start in range(1, 7):
        requeue.record_start(folder, 0)
        (checkpoints / f"images-{start:012d}.pt").touch()
        ends.append(requeue.finish_local(usr2, folder))
    assert ends == [requeue.LOCAL_REQUEUE] * 5 + [usr2]
    state = requeue.read_state(folder)
    assert state["state"] == "failed" and "started six times at most" in state["said"]


def test_progress_counts_images_of_a_run_and_its_tokenizer(job, tmp_path):
    folder = job("")
    for place, images in (("checkpoints", (8, 16)), ("tokenizer/checkpoints", (5,))):
        (tmp_path / "a run" / place).mkdir(parents=True)
        for number in images:
            (tmp_path / "a run" / place / f"images-{number:012d}.pt").touch()
        (tmp_path / "a run" / place / "images-000000000099.pt.partial").touch()
    assert requeue.measure_progress(folder) == 16 + 5
    (folder / "job.json").unlink()
    assert requeue.measure_progress(folder) == 0


@pytest.mark.parametrize(
    "command, saved",
    [
        ("sample x --out=pictures", "pictures/000000.png"),
        ("sample x --out some.npz", "some.npz.parts/000000.npy"),
        ("linear x --protocol mae", "x/evals/linear-imagenet/checkpoints/images-000000016384.pt"),
        ("linear timm --protocol mae", "evals/timm/linear/checkpoints/images-000000016384.pt"),
        ("linear x --protocol mae --out y", "y/checkpoints/images-000000016384.pt"),
        ("grid x", "x/evals/grid-imagenet/passes/clean-t=10.json"),
        ("grid --data y x", "x/evals/grid-imagenet/passes/clean-t=10.json"),
        ("grid x --out y", "y/passes/clean-t=10.json"),
        ("evaluate --suite s --out y --only a/b/c", "y/a/b/c/results.json"),
        ("evaluate --only a/b/c a/b/d --suite s --out y", "y/a/b/d/results.json"),
        ("linear x --seeds 0 1 2", "x/evals/linear-imagenet/seed=0/results.json"),
        ("rerun x/l/results.json", "x/l/rerun/checkpoints/images-000000016384.pt"),
        ("rerun --device cpu x/l/results.json", "x/l/rerun/seed=0/results.json"),
    ],
)
def test_progress_counts_the_files_of_a_command_without_a_run(command, saved, job, tmp_path):
    folder = job("")
    (tmp_path / "x").mkdir()
    record = {"command": command.split(), "directory": str(tmp_path)}
    requeue.files.write_json(folder / "job.json", record)
    assert requeue.measure_progress(folder) == 0
    path = tmp_path / saved
    path.parent.mkdir(parents=True)
    path.with_name(f"{path.name}.partial").touch()
    before = requeue.measure_progress(folder)
    path.touch()
    assert requeue.measure_progress(folder) > before
    if path.suffix == ".pt":  # only the newest checkpoint is kept
        first = requeue.measure_progress(folder)
        path.rename(path.with_name("images-000000032768.pt"))
        assert requeue.measure_progress(folder) > first


@pytest.mark.parametrize(
    "command, growing",
    [
        ("embed x images --out f.npy", "f.npy.parts/progress.jsonl"),
        ("cache images f.safetensors", "f.safetensors.partial"),
        ("cache --side 64 images f.safetensors --workers 2", "f.safetensors.partial"),
    ],
)
def test_progress_counts_the_growth_of_one_file(command, growing, job, tmp_path):
    folder, path = job(""), tmp_path / growing
    record = {"command": command.split(), "directory": str(tmp_path)}
    requeue.files.write_json(folder / "job.json", record)
    assert requeue.measure_progress(folder) == 0
    path.parent.mkdir(exist_ok=True)
    seen = []
    for size in (2**16, 2**16, 2**17):
        with path.open("wb") as file:
            file.write(bytes([1]) * size)
            os.fsync(file.fileno())
        seen.append(requeue.measure_progress(folder))
    assert 0 < seen[0] == seen[1] < seen[2]


def test_progress_is_seen_below_the_home_that_no_shell_has_named(job, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = job("")
    path = tmp_path / "home" / "run" / "checkpoints" / "images-000000016384.pt"
    path.parent.mkdir(parents=True)
    path.touch()
    for words in (["--run", "~/run"], ["--run=~/run"], ["--out=~/run"]):
        record = {"command": ["pretrain", *words], "directory": str(tmp_path)}
        requeue.files.write_json(folder / "job.json", record)
        assert requeue.measure_progress(folder) >= 16384


def test_progress_of_a_cell_is_not_that_of_others(job, tmp_path):
    folder = job("")
    command = "evaluate --suite s --out y --only a/b/c".split()
    requeue.files.write_json(folder / "job.json", {"command": command, "directory": str(tmp_path)})
    for other in ("y/table.md", "y/a/b/d/results.json"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).touch()
    assert requeue.measure_progress(folder) == 0
