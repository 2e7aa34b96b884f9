"""``ldae jobs``: list the jobs that were sent from run folders, with their states."""

from collections import Counter
from pathlib import Path

from ldae.cluster.status import Status, read_statuses
from ldae.errors import InputError
from ldae.tree import AnyPath


def jobs(folder: AnyPath = Path(), /) -> list[Status]:
    """List the jobs that were sent from run folders, with their states.

    Args:
        folder: a run folder, or a folder with run folders up to three levels below it.

    Returns: the jobs, in the order in which they were sent.

    Raises: InputError when there is none.

    Examples:
        >>> [job.id for job in ldae.jobs("runs") if job.state == "failed"]
    """
    statuses = read_statuses(Path(folder))
    if not statuses:
        raise InputError(f"no job was sent from {folder}, or from a run folder below it")
    width = max(len(status.id) for status in statuses)
    for status in statuses:
        print(f"{status.state:9}  {status.id:{width}}  ldae {status.command}")
        if status.message:
            print(f"{'':9}  {'':{width}}    {status.message}")
    counts = Counter(status.state for status in statuses)
    counted = "1 job" if len(statuses) == 1 else f"{len(statuses)} jobs"
    print(f"{counted}: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    return statuses
