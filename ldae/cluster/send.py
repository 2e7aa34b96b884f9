"""Sending command lines as jobs: their code, records and logs, and how a job starts."""

import hashlib
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import ldae
from ldae import files
from ldae.cluster import requeue
from ldae.cluster.settings import SlurmSettings, check_settings, parse_time_limit
from ldae.errors import InputError, report
from ldae.runs import layout
from ldae.runs.environment import git_state

# srun sets these for each task; for a missing one, submitit silently assumes rank 0 of 1.
_TASK_VARIABLES = (
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    *("SLURM_NODEID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST"),
)

_OF_THE_SHELL = ("partition", "account", "constraint", "qos", "reservation")

# Below the ports that systems assign to outgoing connections (Linux: from 32768). Otherwise a rank
# that connects before rank 0 listens could be assigned the very port of rank 0, and block it.
_PORTS = range(20000, 32768)


@dataclass(frozen=True)
class Job:
    """A command line as a function, which submitit pickles and the job unpickles and calls."""

    command: tuple[str, ...]
    """The verb and its arguments."""
    directory: str
    """The folder in which relative paths begin."""
    jobs: str
    """The folder of all jobs."""

    def __call__(self) -> NoReturn:
        """Run the command in this process, as ``python -m ldae`` does, and exit with its status."""
        import submitit

        environment = submitit.JobEnvironment()
        folder = Path(self.jobs, environment.job_id)
        rank, argv, status = environment.global_rank, sys.argv, 1
        requeue.record_start(folder, rank)
        try:
            self._enter_directory()
            _set_launch_variables(environment)
            sys.argv = ["ldae", *self.command]
            runpy.run_module("ldae", run_name="__main__")
        except InputError as error:
            report(error)
            status = error.exit_status
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.argv = argv
            requeue.record_end(folder, rank, status)
            if rank == 0 and environment.cluster != "slurm":  # there the batch script does this
                status = requeue.finish_local(status, folder)
        if rank > 0 and status > 128:
            # All ranks stopped on purpose, and rank 0's status is the job's. Rank 0 may still be
            # saving; with --kill-on-bad-exit, srun would kill it if this rank failed.
            status = 0
        # submitit would record a returned value or an exception as the end of the job.
        raise SystemExit(status)

    def _enter_directory(self) -> None:
        try:
            os.chdir(self.directory)
        except OSError as error:
            raise InputError(
                f"{self.directory} cannot be entered on {socket.gethostname()}: {error.strerror}; "
                "send the job from a folder that all machines see"
            ) from error


def _set_launch_variables(environment: Any) -> None:
    """Set the environment variables that torchrun would set.

    Raises: InputError when SLURM has set only some of a task's variables.
    """
    from submitit.helpers import TorchDistributedEnvironment

    if environment.cluster == "slurm":
        missing = [name for name in _TASK_VARIABLES if name not in os.environ]
        if missing:
            raise InputError(
                f"the environment of this SLURM task is incomplete, missing {', '.join(missing)}"
            )
    if environment.num_tasks > 1:
        # A port that a line of slurm.setup has exported stays.
        os.environ.setdefault("MASTER_PORT", str(_choose_port(environment.job_id)))
        # CUDA_VISIBLE_DEVICES stays SLURM's. submitit would set it to the local rank, which is
        # another job's GPU when SLURM gave this job, say, GPUs 4 to 7. ``device_for`` chooses the
        # GPU by LOCAL_RANK.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _choose_port(job: str) -> int:
    """Return the port at which the ranks of a job meet.

    It is the same on all ranks, and another one at each start, because the first may be taken.
    """
    start = os.environ.get("SLURM_RESTART_COUNT", 0)
    return random.Random(f"{job} {start}").choice(_PORTS)


def send(
    commands: Sequence[Sequence[str]],
    settings: SlurmSettings,
    folder: Path,
    after: Sequence[str] = (),
) -> list[Any]:
    """Submit command lines as one job or one array, to run in this directory with this code.

    Args:
        commands: verbs with their arguments.
        settings: the resources that each job asks for.
        folder: gets a folder jobs/ with the code and a folder for each job (job.json, state.json,
            the batch script and a log of each process).
        after: ids of jobs that must succeed first. When one fails, these jobs are cancelled.

    Returns: submitit's jobs. A job of the cluster debug has not run yet; ``results()`` runs it.

    Raises: InputError for invalid settings, for a folder that a batch script cannot contain, and
        when SLURM refuses the job.
    """
    import submitit

    check_settings(settings)
    jobs = _check_folder(folder) / layout.JOBS
    with files.report_write_errors(jobs):
        code = _copy_code(jobs)
        python = {"local_python": _local_python(settings)} if settings.cluster == "local" else {}
        executor = submitit.AutoExecutor(jobs / "%j", cluster=settings.cluster, **python)
    executor.update_parameters(**_parameters(commands, settings, jobs, code, after))
    work = [Job(tuple(command), os.getcwd(), str(jobs)) for command in commands]
    environment = _job_environment(code if settings.cluster == "local" else None)
    with _ignored_interrupts():  # also while the jobs are recorded, which ``ldae jobs`` lists
        try:
            with files.report_write_errors(jobs), environment:
                sent = executor.submit_array(work) if len(work) > 1 else [executor.submit(work[0])]
        except submitit.core.utils.FailedJobError as error:
            reason = str(error).strip().splitlines()[-1]  # the last line that sbatch printed
            raise InputError(f"SLURM refused the job: {reason}") from None
        try:
            _record(sent, commands, settings, jobs, code, after)
        except InputError as error:
            ids = ", ".join(job.job_id for job in sent)
            raise InputError(
                f"{error}; job {ids} was sent: scancel it before you send again"
            ) from None
    return sent


def _record(
    sent: Sequence[Any],
    commands: Sequence[Sequence[str]],
    settings: SlurmSettings,
    jobs: Path,
    code: Path,
    after: Sequence[str],
) -> None:
    """Write the record of each job. Raises: InputError when the disk is full."""
    for job, command in zip(sent, commands):
        record = {
            "id": job.job_id,
            "command": command,
            "directory": os.getcwd(),
            "cluster": settings.cluster,
            "code": code.name,
            "after": list(after),
            "sent": datetime.now().astimezone().isoformat(timespec="microseconds"),
        }
        if settings.cluster != "slurm":
            pid = os.getpid() if settings.cluster == "debug" else int(job.job_id)
            record |= {"host": socket.gethostname(), "pid": pid}
        files.write_json(jobs / job.job_id / layout.JOB_RECORD, record)


def log_path(job: Any) -> Path:
    """Return the log of rank 0, which the batch script writes to as well."""
    return Path(job.task(0).paths.stdout)


def _check_folder(folder: Path) -> Path:
    """Return the absolute path of ``folder``.

    Raises: InputError for a character that a batch script cannot contain. sbatch interprets % and
        \\ in the names of logs and cannot escape quotes, and PYTHONPATH is split at colons.
    """
    folder = folder.absolute()
    character = re.search(r"[%\\:'\"\x00-\x1f\x7f]", str(folder))
    if character:
        raise InputError(
            f"folder {str(folder)!r} has {character[0]!r} in its name, which a SLURM batch script "
            "cannot contain; name another folder"
        )
    return folder


def _parameters(
    commands: Sequence[Sequence[str]],
    settings: SlurmSettings,
    jobs: Path,
    code: Path,
    after: Sequence[str],
) -> dict:
    """Return the parameters of submitit's executor, in which None is a default."""
    verbs = {command[0] for command in commands}
    shared = {
        "name": f"ldae-{verbs.pop()}" if len(verbs) == 1 else "ldae",
        "timeout_min": parse_time_limit(settings.time),
        "nodes": settings.nodes,
        "tasks_per_node": settings.tasks,
        "gpus_per_node": settings.gpus_per_node or None,
        "cpus_per_task": settings.cpus_per_task or None,
        "stderr_to_stdout": True,
    }
    if settings.cluster != "slurm":
        return shared
    # The defaults that a user has in the shell, which submitit takes from the environment.
    shell = {key: os.environ.get(f"SBATCH_{key.upper()}") for key in _OF_THE_SHELL}
    options: dict[str, Any] = {key: shell[key] for key in ("qos", "reservation") if shell[key]}
    for option in settings.extra:
        key, equals, value = option.partition("=")
        options[key.replace("-", "_")] = value if equals else True  # submitit's names, as job_name
    # A lost rank ends the step at once; otherwise the others would wait for it in a collective.
    srun = ["--kill-on-bad-exit=1"]
    if settings.cpus_per_task:  # since SLURM 22.05, srun does not inherit this from sbatch
        srun.append(f"--cpus-per-task={settings.cpus_per_task}")
    path = f"{shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    finish = shlex.join([sys.executable, "-m", "ldae.cluster.requeue"])
    return shared | {
        "slurm_partition": settings.partition or shell["partition"],
        "slurm_account": settings.account or shell["account"],
        "slurm_constraint": settings.constraint or shell["constraint"],
        "slurm_array_parallelism": settings.array_parallelism,
        "slurm_signal_delay_s": settings.warning,
        "slurm_dependency": f"afterok:{':'.join(after)}" if after else None,
        "slurm_additional_parameters": options | {"requeue": True, "kill-on-invalid-dep": "yes"},
        "slurm_srun_args": srun,
        "slurm_setup": [
            *settings.setup,
            # PYTHONSAFEPATH: the current directory may hold another version of ldae.
            f"export PYTHONSAFEPATH=1 PYTHONPATH={path}",
            # SLURM signals the batch script together with its step, for example at the time limit.
            # With the signals trapped, the script waits for the step to save, and then requeues.
            "trap : TERM USR2",
        ],
        "slurm_teardown": [f"exec {finish} $? {shlex.quote(str(jobs))}"],
    }


def _local_python(settings: SlurmSettings) -> str:
    """Return the command by which submitit starts Python in each process of a local job.

    The lines of slurm.setup are in it. As submitit's own set-up, they would put a shell between a
    job and its signals.
    """
    if not settings.setup:
        return shlex.quote(sys.executable)
    lines = [*settings.setup, f'exec {shlex.quote(sys.executable)} "$@"']
    return shlex.join(["sh", "-c", " && ".join(lines), "sh"])


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Let processes that start inside ignore Ctrl-C, which a terminal sends to all of them.

    What starts the ranks of a local job would kill them before they have saved. Python sets signal
    handlers only in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _job_environment(code: Path | None) -> Iterator[None]:
    """Set the environment in which jobs are submitted.

    The variables that SLURM or torchrun set for this process are removed, in case it is a job
    itself. ``code`` is put first on PYTHONPATH.
    """
    from submitit.helpers import clean_env, environment_variables

    changes = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    if code:
        path = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
        changes |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}
    with clean_env(), environment_variables(**changes):
        yield


def _copy_code(jobs: Path) -> Path:
    """Copy this package into a folder named after the hash of its content; return the folder."""
    package = Path(ldae.__file__).parent
    contents = {
        path.relative_to(package.parent): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and path.parent.name != "__pycache__"
    }
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    folder = jobs / f"{layout.CODE}{digest.hexdigest()[:16]}"
    if folder.exists():
        return folder
    jobs.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=jobs, prefix=f".{layout.CODE}"))
    partial.chmod(0o755)
    for name, content in contents.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
    (partial / layout.GIT).write_text(json.dumps(git_state()))
    with suppress(OSError):  # another process was faster and made the same copy
        partial.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)
    return folder
