"""A command line as a job: its code, its logs, and how it is sent and starts."""

import hashlib
import json
import os
import random
import re
import runpy
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import ldae
from ldae import files
from ldae.cluster import requeue
from ldae.cluster.settings import Slurm, check_settings, minutes
from ldae.errors import InputError
from ldae.runs.environment import GIT, git_state
from ldae.runs.layout import JOBS

# What srun tells each task; submitit takes rank 0 of 1 for what is missing.
_OF_A_TASK = (
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    *("SLURM_NODEID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST"),
)


# Below those that systems give to whoever connects: there a rank that asks for the one where rank 0 does
# not listen yet can be given that very port, and hold it against rank 0.
_PORTS = range(20000, 32768)


def _carried(folder: Path) -> Path:
    """``folder`` from the root on. Raises: InputError when a batch script can not hold its name."""
    folder = folder.absolute()
    # sbatch reads % and \ in the names of logs, its own quoting knows no escapes, and PYTHONPATH is
    # cut at colons.
    found = re.search(r"[%\\:'\"\x00-\x1f\x7f]", str(folder))
    if found:
        raise InputError(
            f"folder {str(folder)!r} has {found[0]!r} in its name, which a batch script of SLURM can "
            "not carry; name another folder"
        )
    return folder


@dataclass(frozen=True)
class Job:
    """One command line. It is all that is pickled, and it is opened by the code that pickled it."""

    command: tuple[str, ...]
    """The verb and its arguments."""
    directory: str
    """Where relative paths begin."""
    jobs: str
    """The folder of records."""

    def __call__(self) -> NoReturn:
        """Run the command in this process, as ``python -m ldae`` does, and end with its status."""
        import submitit

        environment = submitit.JobEnvironment()
        os.chdir(self.directory)
        folder = Path(self.jobs, environment.job_id)
        rank, argv, status = environment.global_rank, sys.argv, 1
        requeue.started(folder, rank)
        try:
            _join(environment)
            sys.argv = ["ldae", *self.command]
            runpy.run_module("ldae", run_name="__main__")
        except InputError as error:
            print(f"ldae: {error}", file=sys.stderr)
            status = 2
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.argv = argv
            requeue.ended(folder, rank, status)
            if rank == 0 and environment.cluster != "slurm":  # there the batch script does it
                status = requeue.ended_here(status, folder)
        if rank > 0 and status > 128:
            # The ranks agreed to stop. Rank 0 may be saving yet, which srun would cut short
            # (--kill-on-bad-exit) if this one failed; its status is the job's.
            status = 0
        # Neither a value nor an exception: submitit would write it down as the end of the job.
        raise SystemExit(status)


def _join(environment: Any) -> None:
    """Put into this process's environment what torchrun would.

    Raises: InputError when SLURM has told only half of it.
    """
    from submitit.helpers import TorchDistributedEnvironment

    if environment.cluster == "slurm":
        missing = [name for name in _OF_A_TASK if name not in os.environ]
        if missing:
            raise InputError(
                f"the environment of this SLURM task is half set: {', '.join(missing)} missing"
            )
    if environment.num_tasks > 1:
        os.environ.setdefault("MASTER_PORT", str(_port(environment.job_id)))  # or what setup says
        # CUDA_VISIBLE_DEVICES stays SLURM's: submitit's would be the local rank, which is another
        # job's GPU where SLURM gave this one, say, 4 to 7. ``device_for`` chooses by LOCAL_RANK.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _port(job: str) -> int:
    """Where the ranks of a job meet: known to all of them, and another one at each start of the job,
    for the first could be taken."""
    start = os.environ.get("SLURM_RESTART_COUNT", 0)
    return random.Random(f"{job} {start}").choice(_PORTS)


def send(
    commands: Sequence[Sequence[str]], settings: Slurm, folder: Path, after: Sequence[str] = ()
) -> list[Any]:
    """Submit command lines as one job, or as one array, to run from this directory with this code.

    Args:
        commands: verbs with their arguments.
        folder: takes jobs/ with a folder for each job (job.json, state.json, the batch script and
            a log for each process), and the code.
        after: ids of jobs that must have succeeded before; if one fails, these are cancelled.

    Returns: submitit's jobs. Those of the cluster debug have not run yet: ``results()`` runs them.

    Raises: InputError for settings or a folder that do not fit, or when SLURM refuses.
    """
    import submitit

    check_settings(settings)
    jobs = _carried(folder) / JOBS
    with files.report_write_errors(jobs):
        code = _snapshot(jobs)
        executor = submitit.AutoExecutor(jobs / "%j", cluster=settings.cluster)
    executor.update_parameters(**_parameters(commands, settings, jobs, code, after))
    directory = os.getcwd()
    work = [Job(tuple(command), directory, str(jobs)) for command in commands]
    try:
        with _environment_of_a_job(code if settings.cluster == "local" else None):
            sent = executor.submit_array(work) if len(work) > 1 else [executor.submit(work[0])]
    except submitit.core.utils.FailedJobError as error:  # of sbatch, whose last line is its reason
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"SLURM does not take the job: {reason}") from None
    for job, one in zip(sent, work):
        record = {
            "id": job.job_id,
            "command": one.command,
            "directory": directory,
            "cluster": settings.cluster,
            "code": code.name,
            "after": list(after),
            "sent": datetime.now().astimezone().isoformat(timespec="microseconds"),
        }
        files.write_json(jobs / job.job_id / requeue.RECORD, record)
    return sent


def log_of(job: Any) -> Path:
    """The log of rank 0, which is the batch script's too."""
    return Path(job.task(0).paths.stdout)


def _parameters(
    commands: Sequence[Sequence[str]],
    settings: Slurm,
    jobs: Path,
    code: Path,
    after: Sequence[str],
) -> dict:
    """For submitit's executor; None is left out."""
    verbs = {command[0] for command in commands}
    shared = {
        "name": f"ldae-{verbs.pop()}" if len(verbs) == 1 else "ldae",
        "timeout_min": minutes(settings.time),
        "nodes": settings.nodes,
        "tasks_per_node": settings.tasks,
        "gpus_per_node": settings.gpus_per_node or None,
        "cpus_per_task": settings.cpus_per_task or None,
        "stderr_to_stdout": True,
    }
    if settings.cluster == "local":
        return shared | {"local_setup": list(settings.setup) or None}
    if settings.cluster == "debug":
        return shared
    options = {}
    for option in settings.extra:
        key, equals, value = option.partition("=")
        options[key] = value if equals else True
    # A lost rank ends the step at once, where the others would wait for it in a collective. And
    # from 22.05 on, srun does not inherit --cpus-per-task.
    srun = ["--kill-on-bad-exit=1"]
    if settings.cpus_per_task:
        srun.append(f"--cpus-per-task={settings.cpus_per_task}")
    path = f"{shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return shared | {
        "slurm_partition": settings.partition or None,
        "slurm_account": settings.account or None,
        "slurm_constraint": settings.constraint or None,
        "slurm_array_parallelism": settings.array_parallelism,
        "slurm_signal_delay_s": settings.warning,
        "slurm_dependency": f"afterok:{':'.join(after)}" if after else None,
        "slurm_additional_parameters": options | {"requeue": True, "kill-on-invalid-dep": "yes"},
        "slurm_srun_args": srun,
        "slurm_setup": [
            *settings.setup,
            # The current directory may hold another ldae than the one that was sent.
            f"export PYTHONSAFEPATH=1 PYTHONPATH={path}",
            # SLURM ends the batch script together with its step, when the time is up, say. Caught,
            # the signal lets it wait for the step to save, and decide what follows.
            "trap : TERM USR2",
        ],
        "slurm_teardown": [
            f"exec {shlex.join([sys.executable, '-m', 'ldae.cluster.requeue'])} $? {shlex.quote(str(jobs))}"
        ],
    }


@contextmanager
def _environment_of_a_job(code: Path | None) -> Iterator[None]:
    """Without what SLURM or torchrun told this process, should it be part of a job itself; with
    the code on the path, if given."""
    from submitit.helpers import clean_env, environment_variables

    changes = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    if code:
        path = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
        changes |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}
    with clean_env(), environment_variables(**changes):
        yield


def _snapshot(jobs: Path) -> Path:
    """The folder of a copy of this package, named after what is in it."""
    package = Path(ldae.__file__).parent
    files = {
        path.relative_to(package.parent): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and path.parent.name != "__pycache__"
    }
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    folder = jobs / f"code-{digest.hexdigest()[:16]}"
    if folder.exists():
        return folder
    jobs.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=jobs, prefix=".code-"))
    aside.chmod(0o755)
    for name, content in files.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).write_bytes(content)
    (aside / GIT).write_text(json.dumps(git_state()))
    with suppress(OSError):  # another process made the same
        aside.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)
    return folder
