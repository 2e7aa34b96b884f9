"""``ldae evaluate``: run the evaluations of a suite file into one table, here or as an array."""

import shlex
from pathlib import Path
from typing import Annotated

import tyro

from ldae.cli.protocols import graders
from ldae.cluster.array import run_array, send_array
from ldae.cluster.requeue import option, option_values
from ldae.cluster.settings import SlurmSettings
from ldae.cluster.status import read_statuses
from ldae.console import print_main
from ldae.devices import device_for
from ldae.distributed import process_group
from ldae.errors import InputError, unknown
from ldae.evals.cell import Cell
from ldae.evals.evaluation import Setup
from ldae.evals.open import keep_network
from ldae.evals.running import Keys, Progress, has_results, read_progress, run_cells
from ldae.evals.suite import read_suite
from ldae.evals.table import write_table
from ldae.files import check_writable, read_object
from ldae.precision import recorded_gradients
from ldae.tree import AnyPath, difference

_ONLY = "--only"


@recorded_gradients()
def evaluate(
    backbones: Annotated[tuple[AnyPath, ...], tyro.conf.arg(metavar="BACKBONE")] = (),
    /,
    *,
    suite: Annotated[AnyPath, tyro.conf.arg(metavar="SUITE.toml")],
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CELL")] = (),
    setup: Setup = Setup(),
) -> dict:
    """Run many evaluations into one table: every backbone by every protocol on every data set.

    A suite file names protocols; each is a command that grades (`ldae knn`, `ldae linear`, ...)
    with its settings. The folder of --out gets table.md, table.json, table.csv and the results.json
    of each cell. To continue, run the same command again: a cell is skipped if its results were
    made by the same protocol, with the same weights and images. If a cell fails, the others are
    still run; if it fails on some ranks only, the command ends. Features that several protocols
    need are extracted once. With --seeds, each seed is a cell of its own, and the table shows the
    mean and the standard deviation. The table is that of the last command: give one --out to one
    suite and one list of backbones.

    With --slurm, an array of jobs fills the table as they end. The cells of one backbone and data
    set that read the same features are one job, and any other cell is one. The same command again
    lists what is finished or in the queue, and sends only what is missing.

    Args:
        backbones: run folders, exported folders, timm names, NAME@FILE or pixels[:SIZE], in
            addition to the backbones of the suite; in Python one may stand alone.
        suite: file of [data.NAME] with train and eval, [protocols.NAME] with verb and its settings,
            and [[backbones]] with spec, name, random_init, and published.DATA with a number of each
            protocol, which the table shows beside the result.
        only: run only these cells, by their folders below --out, such as NAME/DATA/PROTOCOL or
            NAME.

    Returns: the content of table.json.

    Raises: InputError for a suite that cannot be run, and at the end when a cell has failed.

    Examples:
        >>> table = ldae.evaluate(
        ...     ("runs/cifar10",), suite="cifar10.toml", setup=ldae.Setup(out="runs/cifar10/suite")
        ... )
        >>> table["cells"][0]["results"]
    """
    if isinstance(backbones, str | Path):
        backbones = (backbones,)
    out, cells = _read(backbones, suite, setup)
    chosen = _choose(cells, only)
    others = [cell for cell in cells if cell not in chosen]

    def report(progress: Progress) -> dict:
        return _write_table(out, cells, progress, others)

    with process_group(device_for(setup.device)):
        _name_lost_cells(out, cells)
        progress = run_cells(chosen, report)
        table = report(progress)
    print_main(f"{len(progress.done)} of {len(chosen)} cells; {out / 'table.md'}")
    if reasons := list(progress.failures.values()):
        raise InputError(
            f"{len(reasons)} of {len(chosen)} cells failed, the first with: {reasons[0]}; "
            f"{out / 'table.md'} has all reasons, and the same command tries them again"
        )
    return table


def _read(
    backbones: tuple[str | Path, ...], suite: str | Path, setup: Setup
) -> tuple[Path, list[Cell]]:
    """Return the folder of the table, and the cells. Raises: InputError, as ``evaluate``."""
    if setup.out is None:
        raise InputError("say where the table goes: --out DIR")
    check_writable(Path(setup.out))
    return Path(setup.out), read_suite(
        Path(suite).expanduser(), tuple(map(str, backbones)), setup, graders()
    )


def _choose(cells: list[Cell], only: tuple[str, ...]) -> list[Cell]:
    """Return the cells of these names, or in these folders.

    Raises: InputError for a name that none has.
    """
    for name in only:
        if not any(_is_in(cell, name) for cell in cells):
            raise unknown("there is no cell", name, [cell.name for cell in cells])
    return [cell for cell in cells if not only or any(_is_in(cell, name) for name in only)]


def _is_in(cell: Cell, folder: str) -> bool:
    return f"{cell.name}/".startswith(f"{folder.rstrip('/')}/")


def _name_lost_cells(out: Path, cells: list[Cell]) -> None:
    """Print how many cells of the last command's table the one of these cells will not have."""
    known = {(cell.backbone, cell.data, cell.column.name) for cell in cells}
    entries = read_object(out / "table.json").get("cells", [])
    places = [(entry["backbone"], entry["data"], entry["protocol"]) for entry in entries]
    if lost := [place for place in places if place not in known]:
        print_main(
            f"{out / 'table.md'} had {len(lost)} cells of another suite or other backbones, such "
            f"as {'/'.join(lost[0])}, which this command leaves out; their results stay in {out}"
        )


def _write_table(out: Path, cells: list[Cell], own: Progress, others: list[Cell]) -> dict:
    """Write the table with the progress of this process and what the files of other cells say.

    Other processes write it too. The one that writes last must have seen all results, so each
    reads them again after it has written, and writes again if there is more.
    """
    found = read_progress(others)
    while True:
        both = Progress(found.done + own.done, found.failures | own.failures)
        table = write_table(out, cells, both)
        before, found = found, read_progress(others)
        if found == before:
            return table


def send_cells(
    slurm: SlurmSettings,
    backbones: tuple[str, ...] = (),
    /,
    *,
    suite: str | Path,
    only: tuple[str, ...] = (),
    setup: Setup = Setup(),
) -> dict:
    """Send the cells that are neither finished nor in the queue as an array of jobs.

    Cells that read the same features are one job, which extracts them once.

    Args:
        slurm: the settings of the jobs; the other arguments are those of ``evaluate``.

    Returns: the content of table.json; it has all results if the jobs ran on this machine.

    Raises: InputError as ``evaluate`` does, for settings with which no job can be sent, and when a
        job on this machine has failed.
    """
    out, cells = _read(backbones, suite, setup)
    chosen = _choose(cells, only)
    command = ("evaluate", *map(str, backbones), "--suite", str(suite), *_flags(setup))
    folder = Path(slurm.folder or out)
    queued = _queued(folder, out)
    with keep_network():
        keys = Keys()
        finished = [cell for cell in chosen if _is_finished(cell, keys)]
    missing = []
    for cell in chosen:
        if cell in finished:
            continue
        if cell.name in queued:
            print(f"{cell}: in the queue as job {queued[cell.name]}")
        else:
            missing.append(cell)
    _name_lost_cells(out, cells)
    found = read_progress(cells)
    found.done = [cell for cell in found.done if cell in finished or cell not in chosen]
    table = write_table(out, cells, found)
    states = []
    names = [[cell.name for cell in group] for group in _share_features(missing)]
    jobs = {", ".join(group): (*command, _ONLY, *group) for group in names}
    if jobs and slurm.cluster == "slurm":
        send_array(jobs, slurm, folder)
    elif jobs:
        states = run_array(jobs, slurm, folder)
        table = write_table(out, cells, read_progress(cells))
    print(
        f"{len(finished)} of {len(chosen)} cells were finished, {len(missing)} sent in "
        f"{len(jobs)} jobs; {out / 'table.md'}"
    )
    if failed := len(states) - states.count("done"):
        raise InputError(
            f"{failed} of {len(states)} jobs failed, see {out / 'table.md'}; `ldae jobs {folder}` "
            "lists them"
        )
    return table


def _is_finished(cell: Cell, keys: Keys) -> bool:
    """Return whether a cell is finished, and print it.

    Where its images or weights cannot be opened, such as on a login node, its results count.
    """
    if not has_results(cell):
        return False
    try:
        keys.of(cell)
    except InputError as error:
        print(f"{cell}: finished before; whether its images have changed is unknown here ({error})")
        return True
    if finished := keys.is_finished(cell):
        print(f"{cell}: finished before")
    return finished


def _share_features(cells: list[Cell]) -> list[list[Cell]]:
    """Group the cells that read the same features; any other cell is alone."""
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        shared = cell.column.protocol.shares_features
        groups.setdefault((cell.network, cell.data) if shared else cell.name, []).append(cell)
    return list(groups.values())


def _queued(folder: Path, out: Path) -> dict[str, str]:
    """Return the ids of the jobs that wait or run, by the names of their cells of this table."""
    states = [state for state in read_statuses(folder) if state.state in ("waiting", "running")]
    words = {state.id: shlex.split(state.command) for state in states}
    return {
        cell: job
        for job, command in words.items()
        if Path(option(command, "--out")).absolute() == out.absolute()
        for cell in option_values(command, _ONLY)
    }


def _flags(setup: Setup) -> list[str]:
    """Return a setup as flags of the command line."""
    words = []
    for name, (_, value) in difference(Setup(), setup).items():
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words
