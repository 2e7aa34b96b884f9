"""The results of cells as one table: Markdown to read, JSON and CSV with every number."""

import csv
import io
import json
from pathlib import Path

from ldae.distributed import is_main
from ldae.evals.cell import Cell
from ldae.evals.running import Progress
from ldae.evals.seeds import SEEDS, SPREAD, summarise
from ldae.files import write, write_json
from ldae.markdown import markdown_table

_PUBLISHED = "{}: published"  # the second column of a protocol


def write_table(folder: Path, cells: list[Cell], progress: Progress) -> dict:
    """Write table.md, table.json and table.csv into ``folder``; return the content of table.json.

    The numbers come from results.json of the cells that are done. Several seeds are one entry: its
    results are the means over the seeds that are done.
    """
    places: dict[tuple, list[Cell]] = {}
    for cell in cells:
        places.setdefault(cell.place, []).append(cell)
    entries = [
        _several(folder, repeats, progress)
        if repeats[0].is_repeated
        else _common(repeats[0]) | _found(folder, repeats[0], progress)
        for repeats in places.values()
    ]
    if is_main():
        write_json(folder / "table.json", {"cells": entries})
        write(folder / "table.csv", _csv(entries).encode())
        write(folder / "table.md", _markdown(entries).encode())
    return {"cells": entries}


def _common(cell: Cell) -> dict:
    """Return what an entry says about a cell before it is run."""
    return {
        "backbone": cell.backbone,
        "spec": cell.spec,
        "random_init": cell.setup.random_init,
        "data": cell.data,
        "protocol": cell.column.name,
        "verb": cell.column.grader.name,
        "headline": cell.column.protocol.headline,
        "published": cell.published,
    }


def _found(folder: Path, cell: Cell, progress: Progress) -> dict:
    """Return the numbers of a cell, or why it failed, and the file that has them."""
    results = None
    if cell in progress.done and is_main():  # other ranks may not see the file yet
        results = json.loads(cell.results.read_text(encoding="utf-8"))["results"]
    return {
        "results": results and _numbers(results),
        "error": progress.failures.get(cell.results),
        "file": cell.results.relative_to(folder).as_posix(),
    }


def _several(folder: Path, cells: list[Cell], progress: Progress) -> dict:
    """Return the entry of the cells of several seeds, with the headlines alone as results."""
    seeds = {cell.setup.seed: _found(folder, cell, progress) for cell in cells}
    done = {seed: found["results"] for seed, found in seeds.items() if found["results"]}
    headlines = [
        name
        for name in cells[0].column.protocol.headlines
        if all(name in numbers for numbers in done.values())
    ]
    means = done and summarise(
        {seed: {name: numbers[name] for name in headlines} for seed, numbers in done.items()}
    )
    errors = [f"seed {seed}: {found['error']}" for seed, found in seeds.items() if found["error"]]
    return _common(cells[0]) | {
        "results": {name: means[name] for name in headlines} if means else None,
        "error": "; ".join(errors) or None,
        "file": None,
        SPREAD: means[SPREAD] if means else None,
        SEEDS: {str(seed): found for seed, found in seeds.items()},
    }


def _numbers(results: dict) -> dict[str, float]:
    """Return the results that are single numbers, not lists or records."""
    return {
        name: value
        for name, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _csv(entries: list[dict]) -> str:
    """Write one line for each number, that of the metric "published" first.

    The last column is the spread over several seeds.
    """
    names = ["backbone", "spec", "random_init", "data", "protocol", "verb"]
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow([*names, "metric", "value", SPREAD])
    for entry in entries:
        published = {} if entry["published"] is None else {"published": entry["published"]}
        spread = entry.get(SPREAD) or {}
        for metric, value in (published | (entry["results"] or {})).items():
            place = [entry[name] for name in names]
            lines.writerow([*place, metric, value, spread.get(metric, "")])
    return file.getvalue()


def _markdown(entries: list[dict]) -> str:
    """Write a line a backbone on a data set, and a column for the headline of each protocol.

    A protocol with published numbers has a second column for these.
    """
    with_published = {entry["protocol"] for entry in entries if entry["published"] is not None}
    heads: dict[str, str] = {}
    for entry in entries:
        protocol = entry["protocol"]
        heads[protocol] = f"{protocol}: {entry['headline']}"
        if protocol in with_published:
            heads[_PUBLISHED.format(protocol)] = _PUBLISHED.format(protocol)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    data = list(dict.fromkeys(entry["data"] for entry in entries))  # in the order of the suite
    for entry in sorted(entries, key=lambda entry: data.index(entry["data"])):
        row = rows.setdefault((entry["data"], entry["backbone"]), {})
        protocol = entry["protocol"]
        row[protocol] = "failed" if entry["error"] else "to do"
        if entry["results"]:
            row[protocol] = _headline(entry)
        if entry["published"] is not None:
            row[_PUBLISHED.format(protocol)] = str(entry["published"])
    cells = ([*names, *(row.get(head, "") for head in heads)] for names, row in rows.items())
    table = markdown_table(["data", "backbone", *heads.values()], cells, text=2)
    failed = [
        f"- {entry['protocol']} of {entry['backbone']} on {entry['data']}: {entry['error']}\n"
        for entry in entries
        if entry["error"]
    ]
    return table + ("\nFailed:\n\n" + "".join(failed) if failed else "")


def _headline(entry: dict) -> str:
    """Return the headline of an entry, of several seeds with its spread and, meanwhile, a count."""
    name = entry["headline"]
    if name not in entry["results"]:  # its k was left out, since there are few images
        return "-"
    text = f"{entry['results'][name]:.2f}"
    if SEEDS not in entry:
        return text
    done = sum(found["results"] is not None for found in entry[SEEDS].values())
    count = "" if done == len(entry[SEEDS]) else f" ({done} of {len(entry[SEEDS])} seeds)"
    return f"{text} ± {entry[SPREAD][name]:.2f}{count}"
