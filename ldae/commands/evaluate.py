"""The verb that fills a table: backbones by protocols on data sets, each cell once."""

import functools
import itertools
import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from ldae.backbones.open import load_backbone, load_classifier
from ldae.cli import graders
from ldae.distributed import barrier, device_for, is_main, process_group
from ldae.errors import InputError, LostRank, first_line
from ldae.evals.evaluation import Setup, changes
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
    setup: Annotated[Setup, tyro.conf.arg(name="")] = Setup(),
) -> dict:
    """Grade backbones by all protocols on all data sets of a suite, into one table.

    The folder of --out takes table.md, table.json and table.csv, and each cell's results.json. The
    same command again goes on: cells are skipped whose results are there and were made by the same
    settings and the same weights. A cell that fails is told, and the others go on. Features that
    several protocols need are extracted once.

    Args:
        backbones: run folders, exported folders, timm names, NAME@FILE or pixels[:SIZE], beside those
            of the suite.
        suite: file of [data.NAME] with train and eval, [protocols.NAME] with verb and its settings,
            and [[backbones]] with spec, name, random_init.
        setup: how the backbones are opened and run, where the suite does not say otherwise.

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
            f"{len(failures)} of {len(cells)} cells failed, as {setup.out / 'table.md'} tells; the "
            f"same command tries them again"
        )
    return table


def _try(
    cell: Cell, fingerprint: functools.cache, done: list[Cell], failures: dict[Path, str]
) -> None:
    """Fill a cell, or note why it failed: a long night's other cells shall not be lost for one."""
    try:
        asked = _asked(cell, fingerprint)
        record = cell.run()
        if is_main():  # again, with what makes it a cell: until then it is none
            write_json(cell.results, record | {"suite": asked})
        done.append(cell)
    except (Interrupted, LostRank):  # it is asked to end, or nothing goes on
        raise
    except Exception as error:
        failures[cell.results] = _sentence(error)
        print(f"ldae: {cell}: {failures[cell.results]}", file=sys.stderr, flush=True)


def _is_finished(cell: Cell, fingerprint: functools.cache) -> bool:
    """Whether results.json is there, and was made by these settings and weights."""
    try:
        record = json.loads(cell.results.read_text(encoding="utf-8"))
        made_by = record["suite"]
        if _without_weights(made_by) != _without_weights(_asked(cell, lambda *_: "")):
            return False
        return isinstance(record["results"], dict) and made_by == _asked(cell, fingerprint)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    except InputError:  # of a backbone that can not be opened: the cell itself shall say so
        return False


def _asked(cell: Cell, fingerprint: functools.cache) -> dict:
    """What decides the numbers of a cell, as JSON knows it."""
    setup = cell.setup
    asked = {
        "verb": cell.verb,
        "backbone": cell.spec,
        "random_init": setup.random_init,
        "weights": fingerprint(*cell.opened, cell.takes_classifier),
        "data": cell.train,
        "eval_data": cell.eval,
        "settings": cell.settings,
        "setup": changes(replace(setup, random_init=False)),
    }
    return json.loads(json.dumps(asked))


def _without_weights(asked: dict) -> dict:
    return {key: value for key, value in asked.items() if key != "weights"}


def _fingerprint(
    spec: str, random_init: bool, in_chans: int, img_size: int | None, seed: int, whole: bool
) -> str:
    """sha256 of the weights: a run folder's name says nothing of how far it has come.

    ``whole`` is with the classifier.
    """
    if whole:
        return state_hash(load_classifier(spec, in_chans, img_size).state_dict())
    options = {"random_init": random_init, "in_chans": in_chans, "img_size": img_size, "seed": seed}
    return state_hash(load_backbone(spec, **options).state_dict())


def _sentence(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    traceback.print_exc()
    return f"{type(error).__name__}: {first_line(error)}"
