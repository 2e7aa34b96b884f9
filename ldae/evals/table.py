"""The results of cells as one table: Markdown to read, JSON and CSV with every number."""

import csv
import io
import json
from pathlib import Path

from ldae.distributed import is_main
from ldae.evals.suite import Cell
from ldae.files import write, write_json

_PUBLISHED = "{}: published"  # the second column of a protocol


def write_table(
    folder: Path, cells: list[Cell], done: list[Cell], failures: dict[Path, str]
) -> dict:
    """Write table.md, table.json and table.csv into ``folder``; return the content of table.json.

    The numbers come from results.json of the cells ``done``. ``failures`` maps the path of a failed
    cell's results to the reason.
    """
    entries = [_entry(folder, cell, cell in done, failures.get(cell.results)) for cell in cells]
    if is_main():
        write_json(folder / "table.json", {"cells": entries})
        write(folder / "table.csv", _csv(entries).encode())
        write(folder / "table.md", _markdown(entries).encode())
    return {"cells": entries}


def _entry(folder: Path, cell: Cell, done: bool, failure: str | None) -> dict:
    results = None
    if done and is_main():  # other ranks may not see the file yet
        results = json.loads(cell.results.read_text(encoding="utf-8"))["results"]
    return {
        "backbone": cell.backbone,
        "spec": cell.spec,
        "random_init": cell.setup.random_init,
        "data": cell.data,
        "protocol": cell.column.name,
        "verb": cell.column.grader.name,
        "headline": cell.column.protocol.headlines[0],
        "published": cell.published,
        "results": results and _numbers(results),
        "error": failure,
        "file": cell.results.relative_to(folder).as_posix(),
    }


def _numbers(results: dict) -> dict[str, float]:
    """Return the results that are single numbers, not lists or records."""
    return {
        name: value
        for name, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _csv(entries: list[dict]) -> str:
    """Write one line for each number, that of the metric "published" first."""
    names = ["backbone", "spec", "random_init", "data", "protocol", "verb"]
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow([*names, "metric", "value"])
    for entry in entries:
        published = {} if entry["published"] is None else {"published": entry["published"]}
        for metric, value in (published | (entry["results"] or {})).items():
            lines.writerow([*(entry[name] for name in names), metric, value])
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
            row[protocol] = f"{entry['results'][entry['headline']]:.2f}"
        if entry["published"] is not None:
            row[_PUBLISHED.format(protocol)] = str(entry["published"])
    lines = [
        ["data", "backbone", *heads.values()],
        ["---", "---", *("--:" for _ in heads)],
        *([*names, *(row.get(head, "") for head in heads)] for names, row in rows.items()),
    ]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    failed = [
        f"- {entry['protocol']} of {entry['backbone']} on {entry['data']}: {entry['error']}\n"
        for entry in entries
        if entry["error"]
    ]
    return text + ("\nFailed:\n\n" + "".join(failed) if failed else "")
