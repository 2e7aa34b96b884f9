"""``ldae evaluate``: run the evaluations of a suite file into one table."""

import functools
import itertools
import json
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ldae.cli import graders
from ldae.console import print_main
from ldae.data.open import open_source
from ldae.distributed import (
    agree,
    device_for,
    gather_values,
    is_lost_connection,
    is_main,
    process_group,
)
from ldae.errors import InputError, LostRank, first_line
from ldae.evals.embedded import images_or_embedded
from ldae.evals.evaluation import (
    Setup,
    changes,
    keep_network,
    open_backbone,
    open_classifier,
)
from ldae.evals.features import cache_features
from ldae.evals.suite import Cell, read_suite
from ldae.evals.table import write_table
from ldae.files import check_writable, state_hash, write_json
from ldae.train.interrupt import Interrupted
from ldae.tree import AnyPath


def evaluate(
    backbones: Annotated[tuple[str, ...], tyro.conf.arg(metavar="BACKBONE")] = (),
    /,
    *,
    suite: Annotated[AnyPath, tyro.conf.arg(metavar="SUITE.toml")],
    setup: Setup = Setup(),
) -> dict:
    """Run many evaluations into one table: every backbone by every protocol on every data set.

    A suite file names protocols; each is a command that grades (`ldae knn`, `ldae linear`, ...)
    with its settings. The folder of --out gets table.md, table.json, table.csv and the results.json
    of each cell. To continue, run the same command again: a cell is skipped if its results were
    made by the same protocol, with the same weights and images. If a cell fails, the others are
    still run; if it fails on some ranks only, the command ends. Features that several protocols
    need are extracted once.

    Args:
        backbones: run folders, exported folders, timm names, NAME@FILE or pixels[:SIZE], in
            addition to the backbones of the suite.
        suite: file of [data.NAME] with train and eval, [protocols.NAME] with verb and its settings,
            and [[backbones]] with spec, name, random_init, and published.DATA with a number of each
            protocol, which the table shows beside the result.

    Returns: the content of table.json.

    Raises: InputError for a suite that cannot be run, and at the end when a cell has failed.

    Examples:
        >>> table = ldae.evaluate(
        ...     ("runs/cifar10",), suite="cifar10.toml", setup=ldae.Setup(out="runs/cifar10/suite")
        ... )
        >>> table["cells"][0]["results"]
    """
    if setup.out is None:
        raise InputError("say where the table goes: --out DIR")
    out = Path(setup.out)
    check_writable(out)
    cells = read_suite(Path(suite), tuple(map(str, backbones)), setup, graders())
    keys = _Keys()
    failures: dict[Path, str] = {}
    with process_group(device_for(setup.device)), keep_network():
        # Rank 0 decides, once all ranks have read: on other machines, files may have other times.
        finished = gather_values([keys.is_finished(cell) for cell in cells])[0]
        done = list(itertools.compress(cells, finished))
        numbered = enumerate(cells, 1)
        for _, group in itertools.groupby(numbered, lambda pair: (pair[1].opened, pair[1].data)):
            with cache_features():
                for number, cell in group:
                    state = ", finished before" if cell in done else ""
                    print_main(f"cell {number} of {len(cells)}: {cell}{state}")
                    if cell not in done:
                        _run(cell, keys, done, failures)
                        write_table(out, cells, done, failures)
        table = write_table(out, cells, done, failures)
    print_main(f"{len(done)} of {len(cells)} cells; {out / 'table.md'}")
    if failures:
        raise InputError(
            f"{len(failures)} of {len(cells)} cells failed, see {out / 'table.md'}; run the "
            "same command to try them again"
        )
    return table


def _run(cell: Cell, keys: "_Keys", done: list[Cell], failures: dict[Path, str]) -> None:
    """Run a cell, or record why it failed, so that the other cells are not lost.

    Raises: InputError, to end all ranks, when not all of them fail in the same way: ranks that go
        on alone would wait for the others in different places.
    """
    try:
        key = keys.of(cell)
        record = cell.run()
        if is_main():  # rewritten with the key, without which the cell does not count as finished
            write_json(cell.results, record | {"suite": key})
        done.append(cell)
    except (Interrupted, LostRank):  # the whole command has to end
        raise
    except Exception as error:
        if is_lost_connection(error):
            raise
        sentence = _sentence(error)
        if not agree(f"failure of {cell}", sentence):
            raise InputError(f"{cell}: {sentence}") from error
        failures[cell.results] = sentence
        print(f"ldae: {cell}: {sentence}", file=sys.stderr, flush=True)


class _Keys:
    """The keys of cells: everything that decides their numbers. Weights and images are read once.

    They have fingerprints because they change under the same name: as a run goes on, or when an
    image is replaced.
    """

    def __init__(self) -> None:
        self._weights = functools.cache(_weights)
        self._images = functools.cache(_images)

    def of(self, cell: Cell) -> dict:
        """Return the key of a cell, in JSON's types.

        Raises: InputError when the images or the backbone cannot be opened.
        """
        graded = cell.eval or cell.train
        learned, split = (cell.train, "train") if cell.learns else (graded, "eval")
        return _settings(cell) | {
            "fingerprint": self._images(learned, split),
            "eval_fingerprint": self._images(graded, "eval"),
            "weights": self._weights(*cell.opened, cell.takes_classifier),
        }

    def is_finished(self, cell: Cell) -> bool:
        """Return whether results.json exists and was made with the key of the cell."""
        try:
            record = json.loads(cell.results.read_text(encoding="utf-8"))
            key = record["suite"]
            if not _settings(cell).items() <= key.items():  # before images and weights are read
                return False
            return isinstance(record["results"], dict) and key == self.of(cell)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return False  # also after an InputError, which running the cell will report


def _settings(cell: Cell) -> dict:
    """Return the part of a cell's key that the suite decides, in JSON's types."""
    column = cell.column
    settings = {
        "verb": column.grader.name,
        "backbone": cell.spec,
        "random_init": cell.setup.random_init,
        "data": cell.train,
        "eval_data": cell.eval,
        "settings": asdict(column.protocol) | column.options,
        "setup": changes(replace(cell.setup, random_init=False)),
    }
    return json.loads(json.dumps(settings))


def _images(spec: str, split: Literal["train", "eval"]) -> str:
    return open_source(spec, split, images_or_embedded).fingerprint()


def _weights(spec: str, setup: Setup, with_head: bool) -> str:
    load = open_classifier if with_head else open_backbone
    return state_hash(load(spec, setup).state_dict())


def _sentence(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    traceback.print_exc()
    return f"{type(error).__name__}: {first_line(error)}"
