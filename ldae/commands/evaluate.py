"""``ldae evaluate``: a table of backbones by protocols on data sets, as a suite file says."""

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
from ldae.distributed import barrier, device_for, is_lost_connection, is_main, process_group
from ldae.errors import InputError, LostRank, first_line
from ldae.evals.evaluation import Setup, changes, open_backbone, open_classifier
from ldae.evals.features import extracted_once
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

    A suite file names the protocols, each of which is one of the commands that grade (`ldae knn`,
    `ldae linear`, ...) with its settings. The folder of --out gets table.md, table.json and table.csv,
    and the results.json of each cell. The same command again goes on: a cell is skipped if its results
    were made by the same settings and the same weights. If a cell fails, the others go on. Features
    that several protocols need are extracted once.

    Args:
        backbones: run folders, exported folders, timm names, NAME@FILE or pixels[:SIZE], beside those
            of the suite.
        suite: file of [data.NAME] with train and eval, [protocols.NAME] with verb and its settings,
            and [[backbones]] with spec, name, random_init.

    Returns: what table.json holds.

    Raises: InputError for a suite that does not fit, and at the end when a cell has failed.
    """
    if setup.out is None:
        raise InputError("say where the table goes: --out DIR")
    check_writable(setup.out)
    cells = read_suite(suite, backbones, setup, graders())
    fingerprint = functools.cache(_fingerprint)
    failures: dict[Path, str] = {}
    with process_group(device_for(setup.device)):
        done = [cell for cell in cells if _is_finished(cell, fingerprint)]
        barrier()  # all ranks have looked before the first writes
        numbered = enumerate(cells, 1)
        for _, group in itertools.groupby(numbered, lambda pair: (pair[1].opened, pair[1].data)):
            with extracted_once():
                for number, cell in group:
                    skipped = cell in done
                    if is_main():
                        state = ", finished before" if skipped else ""
                        print(f"cell {number} of {len(cells)}: {cell}{state}", flush=True)
                    if not skipped:
                        _try(cell, fingerprint, done, failures)
                        write_table(setup.out, cells, done, failures)
        table = write_table(setup.out, cells, done, failures)
    if is_main():
        print(f"{len(done)} of {len(cells)} cells; {setup.out / 'table.md'}")
    if failures:
        raise InputError(
            f"{len(failures)} of {len(cells)} cells failed, see {setup.out / 'table.md'}; the same "
            "command tries them again"
        )
    return table


def _try(
    cell: Cell, fingerprint: functools.cache, done: list[Cell], failures: dict[Path, str]
) -> None:
    """Fill a cell, or record why it failed, so that the other cells are not lost."""
    try:
        asked = _asked(cell, fingerprint)
        record = cell.run()
        if is_main():  # again, with the cell's key: without it the cell does not count as finished
            write_json(cell.results, record | {"suite": asked})
        done.append(cell)
    except (Interrupted, LostRank):  # the command was asked to end, or cannot go on
        raise
    except Exception as error:
        if is_lost_connection(error):
            raise
        failures[cell.results] = _sentence(error)
        print(f"ldae: {cell}: {failures[cell.results]}", file=sys.stderr, flush=True)


def _is_finished(cell: Cell, fingerprint: functools.cache) -> bool:
    """Return whether results.json is there and was made by these settings and weights."""
    try:
        record = json.loads(cell.results.read_text(encoding="utf-8"))
        made_by = record["suite"]
        if made_by != _asked(cell, lambda *_: made_by["weights"]):  # before the weights are read
            return False
        return isinstance(record["results"], dict) and made_by == _asked(cell, fingerprint)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    except InputError:  # the backbone cannot be opened, which the cell itself will report
        return False


def _asked(cell: Cell, fingerprint: functools.cache) -> dict:
    """Return the cell's key, which is everything that decides its numbers, in JSON's types."""
    setup = cell.setup
    asked = {
        "verb": cell.column.grader.name,
        "backbone": cell.spec,
        "random_init": setup.random_init,
        "weights": fingerprint(*cell.opened, cell.takes_classifier),
        "data": cell.train,
        "eval_data": cell.eval,
        "settings": cell.column.settings,
        "setup": changes(replace(setup, random_init=False)),
    }
    return json.loads(json.dumps(asked))


def _fingerprint(spec: str, setup: Setup, whole: bool) -> str:
    """Return the sha256 of the weights, with the classifier if ``whole``.

    A run folder's name does not say how far the run has come.
    """
    load = open_classifier if whole else open_backbone
    return state_hash(load(spec, setup).state_dict())


def _sentence(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    traceback.print_exc()
    return f"{type(error).__name__}: {first_line(error)}"
