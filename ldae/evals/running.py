"""Run cells: those that are finished are skipped, and one that fails does not stop the others."""

import functools
import itertools
import json
import re
import sys
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from ldae.backbones.preprocessing import preprocessing
from ldae.console import print_main
from ldae.data.open import open_source
from ldae.distributed import agree, gather_values, is_lost_connection, is_main
from ldae.errors import InputError, LostRank, first_line
from ldae.evals.cell import Cell
from ldae.evals.embedded import images_or_embedded
from ldae.evals.evaluation import Setup
from ldae.evals.features import cache_features
from ldae.evals.naming import changes
from ldae.evals.open import keep_network, open_backbone, open_classifier
from ldae.files import as_json, state_hash, write, write_json
from ldae.runs import layout
from ldae.train.interrupt import Interrupted


@dataclass
class Progress:
    """The cells that have results, and the reasons of those that failed, by the path of results."""

    done: list[Cell] = field(default_factory=list)
    failures: dict[Path, str] = field(default_factory=dict)


def run_cells(
    cells: list[Cell], report: Callable[[Progress], object] = lambda progress: None
) -> Progress:
    """Run the cells that are not finished, in the process group of the caller.

    A cell is finished if its results were made by the same settings, with the same weights and
    images. If a cell fails, the others are still run. Cells in a row that need the same features
    extract them once.

    Args:
        cells: the cells, in the order in which they are run.
        report: called after each cell.

    Raises: InputError, to end all ranks, when a cell fails on some ranks only.
    """
    keys, progress = Keys(), Progress()
    with keep_network():
        # Rank 0 decides, once all ranks have read: on other machines, files may have other times.
        finished = gather_values([keys.is_finished(cell) for cell in cells])[0]
        progress.done += itertools.compress(cells, finished)
        numbered = enumerate(cells, 1)
        for _, group in itertools.groupby(numbered, lambda pair: (pair[1].network, pair[1].data)):
            with cache_features():
                for number, cell in group:
                    state = ", finished before" if cell in progress.done else ""
                    print_main(f"cell {number} of {len(cells)}: {cell}{state}")
                    if cell not in progress.done:
                        _run(cell, keys, progress)
                        report(progress)
    return progress


def _run(cell: Cell, keys: "Keys", progress: Progress) -> None:
    """Run a cell, or record why it failed, so that the other cells are not lost.

    Raises: InputError, to end all ranks, when not all of them fail in the same way: ranks that go
        on alone would wait for the others in different places.
    """
    if is_main():
        with suppress(OSError):
            _failure_file(cell).unlink()
    try:
        key = keys.of(cell)
        record = cell.run()
        if is_main():  # rewritten with the key, without which the cell does not count as finished
            write_json(cell.results, record | {"suite": key})
        progress.done.append(cell)
    except (Interrupted, LostRank):  # the whole command has to end
        raise
    except Exception as error:
        if is_lost_connection(error):
            raise
        sentence = _sentence(error)
        # Without numbers, as of the device of each rank and of its free memory.
        if not agree(f"failure of {cell}", re.sub(r"\d[\d.]*", "#", sentence)):
            raise InputError(f"{cell}: {sentence}") from error
        progress.failures[cell.results] = sentence
        print(f"ldae: {cell}: {sentence}", file=sys.stderr, flush=True)
        if is_main():
            _record_failure(cell, sentence)


def _sentence(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    traceback.print_exc()
    return f"{type(error).__name__}: {first_line(error)}"


def _failure_file(cell: Cell) -> Path:
    return cell.results.with_name(layout.FAILURE)


def _record_failure(cell: Cell, sentence: str) -> None:
    """Write the reason of a failure beside the results, for tables that other jobs write."""
    with suppress(InputError):  # the disk may be full, which has been the reason
        write(_failure_file(cell), sentence.encode())


def read_progress(cells: Collection[Cell]) -> Progress:
    """Return what the files of cells say, without opening weights and images.

    Results count that were made by the same settings. Weights or images may have changed since.
    """
    progress = Progress()
    for cell in cells:
        if has_results(cell):
            progress.done.append(cell)
        else:
            with suppress(FileNotFoundError):  # another job may begin the cell again
                progress.failures[cell.results] = _failure_file(cell).read_text(encoding="utf-8")
    return progress


def has_results(cell: Cell) -> bool:
    """Return whether a cell has results that were made by its settings."""
    return _key_of_results(cell) is not None


def _key_of_results(cell: Cell) -> dict | None:
    """Return the key with which the results of a cell were made, if by the cell's settings."""
    try:
        record = json.loads(cell.results.read_text(encoding="utf-8"))
        key = record["suite"]
        # Older keys lack the preprocessing, which the record of the backbone has.
        key.setdefault("preprocessing", record.get("backbone", {}).get("preprocessing"))
        made_so = isinstance(record["results"], dict) and _settings(cell).items() <= key.items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return key if made_so else None


class Keys:
    """The keys of cells: everything that decides their numbers. Weights and images are read once.

    They and the files that a protocol names have hashes because they change under the same name: as
    a run goes on, or when an image is replaced.
    """

    def __init__(self) -> None:
        self._network = functools.cache(_network)
        self._images = functools.cache(_images)

    def of(self, cell: Cell) -> dict:
        """Return the key of a cell, in JSON's types.

        Raises: InputError when the images, the backbone or a file cannot be opened.
        """
        graded = cell.eval or cell.train
        learned, split = (cell.train, "train") if cell.learns else (graded, "eval")
        return _settings(cell) | {
            "fingerprint": self._images(learned, split),
            "eval_fingerprint": self._images(graded, "eval"),
            **self._network(*cell.network, cell.takes_classifier),
            **cell.column.protocol.file_hashes(),
        }

    def is_finished(self, cell: Cell) -> bool:
        """Return whether results.json exists and was made with the key of the cell."""
        key = _key_of_results(cell)  # before images and weights are read
        try:
            return key is not None and key == self.of(cell)
        except (OSError, ValueError):  # the run of the cell reports it
            return False


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
    return as_json(settings)


def _images(spec: str, split: Literal["train", "eval"]) -> str:
    return open_source(spec, split, images_or_embedded).fingerprint()


def _network(spec: str, setup: Setup, with_head: bool) -> dict:
    """Return the hash of the weights, and the preprocessing, which no weight of a CNN shows."""
    model = (open_classifier if with_head else open_backbone)(spec, setup)
    return {
        "weights": state_hash(model.state_dict()),
        "preprocessing": as_json(asdict(preprocessing(model))),
    }
