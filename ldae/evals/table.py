"""The results of cells as one table: Markdown to read, JSON and CSV with every number."""

import csv
import io
import json
from pathlib import Path

from ldae.distributed import is_main
from ldae.evals.suite import Cell
from ldae.files import write, write_json


def write_table(
    folder: Path, cells: list[Cell], done: list[Cell], failures: dict[Path, str]
) -> dict:
    """Write table.md, table.json and table.csv into ``folder``, and return what table.json holds.

    The numbers are those of the results.json of the cells ``done``; ``failures`` has, by that path, the
    reasons of the cells that failed.
    """
    entries = [_entry(folder, cell, cell in done, failures.get(cell.results)) for cell in cells]
    if is_main():
        write_json(folder / "table.json", {"cells": entries})
        write(folder / "table.csv", _csv(entries).encode())
        write(folder / "table.md", _markdown(entries).encode())
    return {"cells": entries}


def _entry(folder: Path, cell: Cell, done: bool, failure: str | None) -> dict:
    results = None
    if done and is_main():  # who wrote it
        results = json.loads(cell.results.read_text(encoding="utf-8"))["results"]
    return {
        "backbone": cell.backbone,
        "spec": cell.spec,
        "random_init": cell.setup.random_init,
        "data": cell.data,
        "protocol": cell.column.name,
        "verb": cell.column.grader.name,
        "headline": cell.column.protocol.headlines[0],
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
    """Write one line for each number."""
    names = ["backbone", "spec", "random_init", "data", "protocol", "verb"]
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow([*names, "metric", "value"])
    for entry in entries:
        for metric, value in (entry["results"] or {}).items():
            lines.writerow([*(entry[name] for name in names), metric, value])
    return file.getvalue()


def _markdown(entries: list[dict]) -> str:
    """Write a line for each backbone on each data set, and a column for each protocol's headline."""
    heads = {entry["protocol"]: f"{entry['protocol']}: {entry['headline']}" for entry in entries}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for entry in sorted(entries, key=lambda entry: _first_seen(entries, entry)):
        row = rows.setdefault((entry["data"], entry["backbone"]), {})
        protocol = entry["protocol"]
        row[protocol] = "failed" if entry["error"] else "to do"
        if entry["results"]:
            row[protocol] = f"{entry['results'][entry['headline']]:.2f}"
    lines = [
        ["data", "backbone", *heads.values()],
        ["---", "---", *("--:" for _ in heads)],
        *([*names, *(row.get(name, "") for name in heads)] for names, row in rows.items()),
    ]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    told = [f"- {_name(entry)}: {entry['error']}\n" for entry in entries if entry["error"]]
    return text + ("\nFailed:\n\n" + "".join(told) if told else "")


def _first_seen(entries: list[dict], entry: dict) -> int:
    """Return the place of a data set in the suite: backbones are compared on one data set."""
    return list(dict.fromkeys(other["data"] for other in entries)).index(entry["data"])


def _name(entry: dict) -> str:
    return f"{entry['protocol']} of {entry['backbone']} on {entry['data']}"
