"""Which end of a job is followed by another start. SLURM's answers here are those that it gave."""

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
    """job(answer): the folder of job 7, of which scontrol, called on the path, says this."""
    for name in list(os.environ):
        if name.startswith("SLURM"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script, answers = tmp_path / "scontrol", tmp_path / "answer"
    script.write_text(
        f"#!/bin/sh\n[ $1 = show ] && exec cat '{answers}'\necho $@ >> '{tmp_path}/asked'\n"
    )
    script.chmod(0o755)

    def make(answer: str):
        answers.write_text(answer)
        folder = tmp_path / "jobs" / "7"
        record = {"id": "7", "command": ["pretrain", "--run", "a run"], "directory": str(tmp_path)}
        requeue.files.write_json(folder / "job.json", record)
        requeue.started(folder, 0)
        return folder

    return make


def asked(tmp_path) -> list[str]:
    path = tmp_path / "asked"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "status, answer, again, state",
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
        (1, RUNNING, True, "waiting"),  # of srun, which could not start a rank
        (130, RUNNING, False, "failed"),  # the owner's Ctrl-C
        (0, RUNNING, False, "done"),
    ],
)
def test_what_follows_the_end_of_a_job(status, answer, again, state, job, tmp_path):
    folder = job(answer)
    requeue.after_slurm(status, folder.parent)
    assert asked(tmp_path) == (["requeue 7"] if again else [])
    assert requeue.state(folder)["state"] == state


@pytest.mark.parametrize("status", [1, 2])
def test_what_ended_by_itself_is_not_tried_again(status, job, tmp_path):
    folder = job(RUNNING)
    requeue.ended(folder, 0, status)
    requeue.after_slurm(status, folder.parent)
    assert not asked(tmp_path) and requeue.state(folder)["state"] == "failed"


def test_a_rank_that_says_why_is_believed_and_not_the_one_that_was_killed_for_it(job, tmp_path):
    folder = job(RUNNING)
    requeue.ended(folder, 0, 140)
    requeue.ended(folder, 1, 2)
    requeue.after_slurm(143, folder.parent)
    assert requeue.state(folder)["state"] == "failed" and not asked(tmp_path)
    requeue.ended(folder, 0, 140)  # the next start knows nothing of that 2
    requeue.ended(folder, 1, 0)
    requeue.after_slurm(143, folder.parent)
    assert asked(tmp_path) == ["requeue 7"]
    assert requeue.state(folder)["said"] == "SIGUSR2; requeued"


def test_between_two_requeues_something_must_be_saved(job, tmp_path, capsys):
    folder = job(RUNNING)
    checkpoints = tmp_path / "a run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for images, requeues in [(0, 1), (8, 2), (9, 3)]:
        (checkpoints / f"images-{images:012d}.pt").touch()
        requeue.after_slurm(137, folder.parent)
        assert len(asked(tmp_path)) == requeue.state(folder)["requeues"] == requeues
    capsys.readouterr()
    requeue.after_slurm(137, folder.parent)
    assert len(asked(tmp_path)) == 3
    assert requeue.state(folder)["state"] == "failed"
    assert "second time with nothing new saved" in capsys.readouterr().out


@pytest.mark.parametrize("refusals, said", [(2, "SIGTERM; requeued"), (9, "no requeue: busy")])
def test_a_refused_requeue_is_asked_for_again_and_told_in_the_end(
    refusals, said, job, tmp_path, monkeypatch
):
    folder = job(RUNNING)
    monkeypatch.setattr(requeue, "_PAUSES", (0, 0))
    (tmp_path / "scontrol").write_text(f"""#!/bin/sh
[ $1 = show ] && exec cat '{tmp_path}/answer'
echo >> '{tmp_path}/asked'
[ $(wc -l < '{tmp_path}/asked') -gt {refusals} ] || {{ echo busy >&2; exit 1; }}
""")
    requeue.after_slurm(143, folder.parent)
    assert len(asked(tmp_path)) == 3
    state = requeue.state(folder)
    assert state["said"] == said
    assert state["state"] == ("waiting" if refusals == 2 else "failed")


def test_one_task_of_an_array_is_requeued_and_not_all_of_it(job, tmp_path, monkeypatch):
    job(RUNNING)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue.after_slurm(143, tmp_path / "jobs")
    assert asked(tmp_path) == ["requeue 7_3"]
    assert json.loads((tmp_path / "jobs" / "7_3" / "state.json").read_text())["requeues"] == 1


def test_on_one_machine_the_time_limit_goes_on_and_term_is_meant(job, tmp_path):
    folder = job("")
    usr2, term = 128 + signal.SIGUSR2, 128 + signal.SIGTERM
    assert requeue.ended_here(usr2, folder) == requeue.LOCAL_REQUEUE
    assert requeue.ended_here(usr2, folder) == usr2  # nothing was saved
    assert requeue.ended_here(term, folder) == term
    assert requeue.ended_here(0, folder) == 0 and requeue.state(folder)["state"] == "done"


def test_progress_is_images_of_a_run_and_of_its_tokenizer(job, tmp_path):
    folder = job("")
    for place, images in (("checkpoints", (8, 16)), ("tokenizer/checkpoints", (5,))):
        (tmp_path / "a run" / place).mkdir(parents=True)
        for number in images:
            (tmp_path / "a run" / place / f"images-{number:012d}.pt").touch()
        (tmp_path / "a run" / place / "images-000000000099.pt.partial").touch()
    assert requeue.saved(folder) == 16 + 5
    (folder / "job.json").unlink()
    assert requeue.saved(folder) == 0


@pytest.mark.parametrize(
    "command, kept",
    [
        ("sample x --out=pictures", "pictures/000000.png"),
        ("sample x --out some.npz", "some.npz.parts/000000.npy"),
        ("linear x --protocol mae", "x/evals/linear-imagenet/checkpoints/images-000000016384.pt"),
        ("linear timm --protocol mae", "evals/timm/linear/checkpoints/images-000000016384.pt"),
        ("linear x --protocol mae --out y", "y/checkpoints/images-000000016384.pt"),
    ],
)
def test_what_a_command_without_a_run_saves_is_progress_too(command, kept, job, tmp_path):
    folder = job("")
    (tmp_path / "x").mkdir()
    record = {"command": command.split(), "directory": str(tmp_path)}
    requeue.files.write_json(folder / "job.json", record)
    assert requeue.saved(folder) == 0
    path = tmp_path / kept
    path.parent.mkdir(parents=True)
    path.with_name(f"{path.name}.partial").touch()
    before = requeue.saved(folder)
    path.touch()
    assert requeue.saved(folder) > before
    if path.suffix == ".pt":  # of which there is but the newest
        first = requeue.saved(folder)
        path.rename(path.with_name("images-000000032768.pt"))
        assert requeue.saved(folder) > first
