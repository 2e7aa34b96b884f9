"""Several seeds: a result by each, in a folder of its own, and their means and spread."""

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from ldae.console import print_main
from ldae.devices import device_for
from ldae.distributed import gather_values, is_main, process_group
from ldae.errors import InputError
from ldae.evals.call import describe_call
from ldae.evals.cell import Cell, Column
from ldae.evals.naming import default_folder
from ldae.evals.open import check_out, data_of
from ldae.evals.protocol import Grader
from ldae.evals.running import run_cells
from ldae.files import write_json
from ldae.runs import layout

GraderFunction = TypeVar("GraderFunction", bound=Callable[..., dict])

SPREAD = "spread"  # the key of the standard deviations, among results
SEEDS = "seeds"  # the key of the numbers by each seed


def summarise(numbers: Mapping[int, Mapping[str, float]]) -> dict:
    """Return the mean of each number over the seeds, their spread, and the numbers of each seed.

    The spread is the standard deviation of a sample, divided by n - 1; of one seed it is 0.

    Args:
        numbers: the numbers by each seed, with the same names.
    """
    names = next(iter(numbers.values()))
    columns = {name: [one[name] for one in numbers.values()] for name in names}
    spread = {
        name: statistics.stdev(values) if len(values) > 1 else 0.0
        for name, values in columns.items()
    }
    means = {name: statistics.fmean(values) for name, values in columns.items()}
    by_seed = {str(seed): dict(one) for seed, one in numbers.items()}
    return means | {SPREAD: spread, SEEDS: by_seed}


def over_seeds(grader: GraderFunction) -> GraderFunction:
    """Let a grader grade by each seed of its setup, if there are several.

    Each seed has a folder below the folder of results.json. The same command again skips the seeds
    that are finished. Features that do not depend on the seed are extracted once.
    """

    @functools.wraps(grader)
    def grade(*args: Any, **kwargs: Any) -> dict:
        given = signature(grader).bind(*args, **kwargs)
        given.apply_defaults()
        if not given.arguments["setup"].seeds:
            return grader(*args, **kwargs)
        return _grade_seeds(grader, dict(given.arguments))

    return cast(GraderFunction, grade)


def _grade_seeds(function: Callable[..., dict], options: dict[str, Any]) -> dict:
    """Grade by each seed, write the means, and return the content of results.json."""
    grader = Grader(function.__name__, function)
    spec = str(options.pop(next(iter(options))))
    data, eval_data = data_of(spec, options.pop("data")), options.pop("eval_data", None)
    eval_data = None if eval_data is None else str(eval_data)
    protocol, setup = options.pop("protocol"), options.pop("setup")
    settings = {"data": data, "eval_data": eval_data, "protocol": protocol, "setup": setup}
    call = describe_call(grader.name, [spec], **settings, **options)
    task = f"{grader.name}-{protocol.name}"
    places = (task, spec, data, eval_data or data)
    out = setup.out or default_folder(*places, protocol, setup, random_init=setup.random_init)
    setup = replace(setup, out=Path(out))
    column = Column(task, grader, protocol, options, (data,), {})
    cell = Cell(spec, data, column, spec, data, eval_data, setup)
    if not cell.depends_on_seed:
        raise InputError(f"no seed decides the results of {task}: leave --seeds out")
    for name, value in options.items():
        if value and Path in get_args(grader.options[name]):
            raise InputError(f"--{name} is one for all seeds: leave --{name} or --seeds out")
    check_out(setup.out, task)
    with process_group(device_for(setup.device)):
        cells = cell.repeats()
        failures = run_cells(cells).failures
        if not failures:
            # Rank 0 alone may see the files.
            texts = [one.results.read_text(encoding="utf-8") for one in cells if is_main()]
            records = [json.loads(text) for text in gather_values(texts)[0]]
            names = [name for name in protocol.headlines if name in records[0]["results"]]
            return write_means(setup.out, dict(zip(setup.seeds, records)), names, call)
    raise InputError(
        f"{len(failures)} of {len(cells)} seeds failed; run the same command to try them again"
    )


def write_means(
    folder: Path, records: Mapping[int, dict], names: Sequence[str], call: dict
) -> dict:
    """Write results.json with the means over seeds, print them, and return the file's content.

    Args:
        folder: the folder of results.json.
        records: the content of results.json of each seed.
        names: the numbers to summarise.
        call: the call that repeats all of them.
    """
    first = next(iter(records.values()))
    results = summarise(
        {seed: {name: one["results"][name] for name in names} for seed, one in records.items()}
    )
    protocol = _joined(records, "protocol") | {"seed": [*records]}
    changed = [part for part in first["protocol"]["modified"] if not part.startswith("seed=")]
    protocol["modified"] = [*changed, f"seeds={'-'.join(map(str, records))}"]
    backbone = _joined(records, "backbone")
    record = {key: value for key, value in first.items() if key != "suite"}
    record |= {"protocol": protocol, "backbone": backbone, "results": results, "call": call}
    path = folder / layout.RESULTS
    numbers = [f"{name} {results[name]:.2f} ± {results[SPREAD][name]:.2f}" for name in names]
    control = " (random init)" if backbone["random_init"] else ""
    subject = f"{record['task']} of {backbone['spec']}{control} on {record['data']['eval_spec']}"
    print_main(f"{subject}, {len(records)} seeds: {', '.join(numbers)}; {path}")
    if is_main():
        write_json(path, record)
    return record


def _joined(records: Mapping[int, dict], part: str) -> dict:
    """Return a part of the records of several seeds; an entry that differs is a list by seed."""
    parts = [record[part] for record in records.values()]
    joined = {name: [one[name] for one in parts] for name in parts[0]}
    return {
        name: values if any(value != values[0] for value in values) else values[0]
        for name, values in joined.items()
    }
