"""A job runs its command line unchanged, with the code that sent it. SLURM's commands are fakes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import submitit

import ldae
from ldae import cli
from ldae.cluster import requeue, send
from ldae.cluster.settings import SlurmSettings
from ldae.errors import InputError
from ldae.runs.environment import git_state

STRANGE = "no 'such' \"row\"\n $HOME `x` *"  # a word with everything that a shell would change


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of fakes: sbatch stores the script, and srun runs its command as the only task."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "SUBMITIT")):
            monkeypatch.delenv(name)
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sbatch": f'cp "$1" "{folder}/script"; echo Submitted batch job 7',
        "srun": 'while [ "${1#-}" != "$1" ]; do [ "$1" = --output ] && shift; shift; done\n'
        "export SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0\n"
        'export SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=sln1; exec "$@"',
        "scontrol": "exit 1",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def run_script(cluster: Path, **environment) -> subprocess.CompletedProcess:
    """Run a batch script as SLURM does, in a folder that holds another package ldae."""
    elsewhere = cluster / "elsewhere" / "ldae"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").write_text("raise SystemExit('the code has changed')")
    return subprocess.run(
        ["bash", cluster / "script"],
        capture_output=True,
        text=True,
        cwd=elsewhere.parent,
        env=os.environ | {"SLURM_JOB_ID": "7"} | environment,
    )


def script_of(cluster: Path) -> str:
    return (cluster / "script").read_text()


@pytest.mark.parametrize("name", ["50%", "a\\b", "a:b", "it's", 'a"b', "a\nb"])
def test_a_folder_that_a_batch_script_cannot_contain_is_refused(name, tmp_path, cluster):
    with pytest.raises(InputError, match="cannot contain"):
        send.send([("show",)], SlurmSettings(), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_job_runs_its_command_line_with_the_code_that_sent_it(tmp_path, cluster, capfd):
    """Words arrive unchanged, in a folder with a space, and the exit status is recorded."""
    folder = tmp_path / "a run"
    (job,) = send.send([("show", STRANGE)], SlurmSettings(tasks_per_node=1), folder)
    record = json.loads((folder / "jobs" / "7" / "job.json").read_text())
    assert record["command"] == ["show", STRANGE] and record["id"] == job.job_id == "7"
    done = run_script(cluster)
    assert f"there is no row {STRANGE!r}" in done.stderr, done
    assert done.returncode == 2
    assert requeue.read_state(folder / "jobs" / "7")["state"] == "failed"


def test_the_batch_script_holds_the_settings(tmp_path, cluster):
    settings = SlurmSettings(
        partition="gpu", nodes=2, gpus_per_node=4, cpus_per_task=3, time="1-00", warning=30,
        account="mine", constraint="a100|h100", setup=("module load x",),
        extra=("qos=high", "exclusive", "mail-user=a b"),
    )  # fmt: skip
    send.send([("show",)], settings, tmp_path, after=["5", "6"])
    script = script_of(cluster)
    for line in (
        "partition=gpu", "nodes=2", "gpus-per-node=4", "ntasks-per-node=4", "cpus-per-task=3",
        "time=1440", "signal=USR2@30", "account=mine", "constraint='a100|h100'", "qos=high",
        "exclusive", "mail-user='a b'", "dependency=afterok:5:6", "kill-on-invalid-dep=yes",
        "requeue", "open-mode=append", "job-name=ldae-show",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script, line
    assert re.search("^module load x$", script, re.M)
    assert "--kill-on-bad-exit=1" in script and "srun --unbuffered" in script


def test_defaults_of_the_users_shell_and_the_name_of_the_job_are_kept(
    tmp_path, cluster, monkeypatch
):
    for name, value in {"ACCOUNT": "group", "PARTITION": "cpu", "QOS": "low"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    settings = SlurmSettings(partition="gpu", extra=("job-name=mine",))
    send.send([("show",)], settings, tmp_path)
    lines = re.findall("#SBATCH --((?:account|partition|qos|job-name).*)", script_of(cluster))
    assert sorted(lines) == ["account=group", "job-name=mine", "partition=gpu", "qos=low"]


def test_a_folder_that_the_machine_of_the_job_does_not_have_is_named(
    tmp_path, cluster, monkeypatch
):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    send.send([("show",)], SlurmSettings(), tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").rmdir()
    done = run_script(cluster)
    assert done.returncode == 2 and f"{tmp_path / 'gone'} cannot be entered on" in done.stderr
    assert requeue.read_state(tmp_path / "jobs" / "7")["state"] == "failed"


def test_a_job_that_was_sent_before_the_disk_was_full_is_named(tmp_path, cluster, monkeypatch):
    def write_json(path, content):
        raise InputError(f"{path} cannot be written: Disk quota exceeded")

    monkeypatch.setattr(send.files, "write_json", write_json)
    with pytest.raises(InputError, match="quota exceeded; job 7 was sent: scancel it"):
        send.send([("show",)], SlurmSettings(), tmp_path)


def test_a_refusal_by_sbatch_is_quoted(tmp_path, cluster):
    (cluster / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition >&2; exit 1")
    with pytest.raises(InputError, match="SLURM refused the job: .*invalid partition"):
        send.send([("show",)], SlurmSettings(), tmp_path)


def test_the_code_is_copied_once(tmp_path):
    package = Path(ldae.__file__).parent
    first = send._copy_code(tmp_path)
    assert send._copy_code(tmp_path) == first and len(list(tmp_path.iterdir())) == 1
    for path in package.rglob("*.py"):
        copy = first / "ldae" / path.relative_to(package)
        assert copy.read_bytes() == path.read_bytes()
    script = (
        "import json; from ldae.runs import environment; "
        "print(environment.__file__, json.dumps(environment.git_state()))"
    )
    environment = os.environ | {"PYTHONPATH": str(first)}
    out = subprocess.check_output([sys.executable, "-P", "-c", script], env=environment, text=True)
    file, git = out.strip().split(" ", 1)
    assert file.startswith(str(first)) and json.loads(git) == git_state()


TASK = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "sln[1-2]",
}  # fmt: skip


LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def task(monkeypatch):
    """task(without=): set the environment that srun sets for rank 3 of 4 on two nodes."""
    for name in LAUNCH:  # monkeypatch restores them afterwards
        monkeypatch.setenv(name, "")
        os.environ.pop(name)

    def make(without: str = ""):
        variables = TASK | {"SUBMITIT_EXECUTOR": "slurm", "CUDA_VISIBLE_DEVICES": "4,5"}
        for name, value in variables.items():
            if name != without:
                monkeypatch.setenv(name, value)
        return submitit.JobEnvironment()

    return make


def test_a_task_has_the_variables_of_torchrun(task):
    send._set_launch_variables(task())
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "sln1"}
    assert {name: os.environ[name] for name in expected} == expected
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"  # as SLURM set it


def test_all_ranks_choose_the_same_port_and_another_one_at_the_next_start(task, monkeypatch):
    ports = []
    for start, rank in [("0", "0"), ("0", "3"), ("1", "0"), ("1", "3")]:
        environment = task()
        monkeypatch.delenv("MASTER_PORT", raising=False)
        monkeypatch.setenv("SLURM_RESTART_COUNT", start)
        monkeypatch.setenv("SLURM_PROCID", rank)
        send._set_launch_variables(environment)
        ports.append(int(os.environ["MASTER_PORT"]))
    assert ports[0] == ports[1] != ports[2] == ports[3]
    assert all(1024 <= port < 32768 for port in ports)  # Linux assigns ports from 32768


def test_a_port_that_setup_exports_is_kept(task, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    send._set_launch_variables(task())
    assert os.environ["MASTER_PORT"] == "29500"


@pytest.mark.parametrize("name", [name for name in TASK if name != "SLURM_JOB_ID"])
def test_an_incomplete_task_environment_is_refused(name, task):
    with pytest.raises(InputError, match=f"incomplete, missing {name}$"):
        send._set_launch_variables(task(without=name))


def test_a_job_does_not_inherit_the_variables_of_srun_and_torchrun(task, monkeypatch):
    task()
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("SLURM_CONF", "here")
    with send._job_environment(None):
        assert not set(TASK) & set(os.environ) and "MASTER_PORT" not in os.environ
        assert os.environ["SLURM_CONF"] == "here"
    assert os.environ["SLURM_NTASKS"] == "4"


@pytest.mark.parametrize("command, state", [(("show", "1"), "done"), (("show", STRANGE), "failed")])
def test_the_local_cluster_needs_no_slurm(command, state, tmp_path):
    (job,) = send.send([command], SlurmSettings(cluster="local"), tmp_path / "a run")
    job.wait()
    assert requeue.read_state(tmp_path / "a run" / "jobs" / job.job_id)["state"] == state
    output = "row 1, dit" if state == "done" else repr(STRANGE)
    assert output in send.log_path(job).read_text()


def test_the_debug_cluster_runs_the_job_in_this_process(tmp_path, capsys):
    argv = ["knn", "pixels", "--data", "scattered-digits:50", "--k", "5", "--workers", "0"]
    argv += ["--out", str(tmp_path / "out"), "--slurm", "--slurm.cluster", "debug"]
    with pytest.raises(SystemExit) as end:
        cli.main([*argv, "--slurm.folder", str(tmp_path)])
    assert end.value.code == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("job ")]
    assert re.match(
        r"job DEBUG_\w+: ldae knn \(1 machine with no GPU, 1:00:00\); its log is /", line
    )
    assert (tmp_path / "out" / "results.json").exists()


def test_a_wrong_command_is_refused_before_it_is_sent(tmp_path, cluster, capsys):
    flags = ["--slurm", "--slurm.folder", str(tmp_path / "jobs")]
    with pytest.raises(SystemExit):
        cli.main(["knn", "pixels", "--dat", "x", *flags])
    assert "--data" in capsys.readouterr().err
    assert cli.main(["pretrain", "l_dea", "--run", str(tmp_path / "run"), *flags]) == 2
    with pytest.raises(SystemExit):
        cli.main(["knn", "pixels", "--data", "x", "--slurm.partion", "y"])
    assert "--slurm.partition" in capsys.readouterr().err
    assert cli.main(["jobs", *flags]) == 2 and "takes no --slurm" in capsys.readouterr().err
    assert not (cluster / "script").exists() and not (tmp_path / "jobs").exists()
    finetune = ["finetune", str(tmp_path / "not yet"), "--recipe", "mae", "--data", "x"]
    assert cli.main([*finetune, "--run", str(tmp_path / "run"), *flags]) == 0
    assert (cluster / "script").exists()
