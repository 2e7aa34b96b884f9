"""``ldae evaluate``: run the evaluations of a suite file into one table."""

import functools
import itertools
import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from ldae.cli import graders
from ldae.console import print_main
from ldae.distributed import barrier, device_for, is_lost_connection, is_main, process_group
from ldae.errors import InputError, LostRank, first_line
from ldae.evals.evaluation import Setup, changes, open_backbone, open_classifier
from ldae.evals.features import cache_features
from ldae.evals.suite import Cell, read_suite
from ldae.evals.table import write_table
from ldae.files import check_writable, state_hash, write_json
from ldae.train.interrupt import Interrupted


def evaluate(
    backbones: Annotated[tuple[str, ...], tyro.conf.arg(metavar="BACKBONE")] = (),
    /,
    *,
    suite: Annotated[Path, tyro.conf.arg(metavar="SUITE.toml")],
    setup: Setup = Setup(),
) -> dict:
    """Run many evaluations into one table: every backbone by every protocol on every data set.

    A suite file names protocols; each is a command that grades (`ldae knn`, `ldae linear`, ...)
    with its settings. The folder of --out gets table.md, table.json, table.csv and the results.json
    of each cell. To continue, run the same command again: a cell is skipped if its results were
    made with the same settings and weights. If a cell fails, the others are still run. Features
    that several protocols need are extracted once.

    Args:
        backbones: run folders, exported folders, timm names, NAME@FILE or pixels[:SIZE], in
            addition to the backbones of the suite.
        suite: file of [data.NAME] with train and eval, [protocols.NAME] with verb and its settings,
            and [[backbones]] with spec, name, random_init.

    Returns: the content of table.json.

    Raises: InputError for a suite that cannot be run, and at the end when a cell has failed.
    """
    if setup.out is None:
        raise InputError("say where the table goes: --out DIR")
    check_writable(setup.out)
    cells = read_suite(suite, backbones, setup, graders())
    fingerprint = functools.cache(_fingerprint)
    failures: dict[Path, str] = {}
    with process_group(device_for(setup.device)):
        done = [cell for cell in cells if _is_finished(cell, fingerprint)]
        barrier()  # so that all ranks have read before the first one writes
        numbered = enumerate(cells, 1)
        for _, group in itertools.groupby(numbered, lambda pair: (pair[1].opened, pair[1].data)):
            with cache_features():
                for number, cell in group:
                    state = ", finished before" if cell in done else ""
                    print_main(f"cell {number} of {len(cells)}: {cell}{state}")
                    if cell not in done:
                        _run(cell, fingerprint, done, failures)
                        write_table(setup.out, cells, done, failures)
        table = write_table(setup.out, cells, done, failures)
    print_main(f"{len(done)} of {len(cells)} cells; {setup.out / 'table.md'}")
    if failures:
        raise InputError(
            f"{len(failures)} of {len(cells)} cells failed, see {setup.out / 'table.md'}; run the "
            "same command to try them again"
        )
    return table


def _run(
    cell: Cell, fingerprint: functools.cache, done: list[Cell], failures: dict[Path, str]
) -> None:
    """Run a cell, or record why it failed, so that the other cells are not lost."""
    try:
        key = _key(cell, fingerprint)
        record = cell.run()
        if is_main():  # rewritten with the key, without which the cell does not count as finished
            write_json(cell.results, record | {"suite": key})
        done.append(cell)
    except (Interrupted, LostRank):  # the whole command has to end
        raise
    except Exception as error:
        if is_lost_connection(error):
            raise
        failures[cell.results] = _sentence(error)
        print(f"ldae: {cell}: {failures[cell.results]}", file=sys.stderr, flush=True)


def _is_finished(cell: Cell, fingerprint: functools.cache) -> bool:
    """Return whether results.json exists and was made with these settings and weights."""
    try:
        record = json.loads(cell.results.read_text(encoding="utf-8"))
        key = record["suite"]
        if key != _key(cell, lambda *_: key["weights"]):  # before the weights are read
            return False
        return isinstance(record["results"], dict) and key == _key(cell, fingerprint)
    except (OSError, ValueError, TypeError, KeyError):
        return False
    except InputError:  # the backbone cannot be opened, which running the cell will report
        return False


def _key(cell: Cell, fingerprint: functools.cache) -> dict:
    """Return everything that decides the numbers of a cell, in JSON's types."""
    setup = cell.setup
    key = {
        "verb": cell.column.grader.name,
        "backbone": cell.spec,
        "random_init": setup.random_init,
        "weights": fingerprint(*cell.opened, cell.takes_classifier),
        "data": cell.train,
        "eval_data": cell.eval,
        "settings": cell.column.settings,
        "setup": changes(replace(setup, random_init=False)),
    }
    return json.loads(json.dumps(key))


def _fingerprint(spec: str, setup: Setup, with_head: bool) -> str:
    """Return the sha256 of the weights, which differ as a run goes on under the same name."""
    load = open_classifier if with_head else open_backbone
    return state_hash(load(spec, setup).state_dict())


def _sentence(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    traceback.print_exc()
    return f"{type(error).__name__}: {first_line(error)}"
