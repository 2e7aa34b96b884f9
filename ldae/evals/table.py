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
    """Write table.md, table.json and table.csv into ``folder``; returns what the second holds.

    The numbers are those of the results.json of ``done``; ``failures`` tells, by that path, why there
    is none.
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
        "protocol": cell.protocol,
        "verb": cell.verb,
        "results": results and _numbers(results),
        "error": failure,
        "file": cell.results.relative_to(folder).as_posix(),
    }


def _numbers(results: dict) -> dict[str, float]:
    """Those that stand alone, the first being what the verb is about; no lists, no records."""
    return {
        name: value
        for name, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _csv(entries: list[dict]) -> str:
    """One line a number."""
    names = ["backbone", "spec", "random_init", "data", "protocol", "verb"]
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow([*names, "metric", "value"])
    for entry in entries:
        for metric, value in (entry["results"] or {}).items():
            lines.writerow([*(entry[name] for name in names), metric, value])
    return file.getvalue()


def _markdown(entries: list[dict]) -> str:
    """A line for each backbone on each data set, a column for each protocol's first number."""
    protocols = dict.fromkeys(entry["protocol"] for entry in entries)
    heads = {name: name for name in protocols}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for entry in sorted(entries, key=lambda entry: _first_seen(entries, entry)):
        row = rows.setdefault((entry["data"], entry["backbone"]), {})
        protocol = entry["protocol"]
        row[protocol] = "failed" if entry["error"] else "to do"
        for metric, value in list((entry["results"] or {}).items())[:1]:
            heads[protocol], row[protocol] = f"{protocol}: {metric}", f"{value:.2f}"
    lines = [
        ["data", "backbone", *heads.values()],
        ["---", "---", *("--:" for _ in heads)],
        *([*names, *(row.get(name, "") for name in protocols)] for names, row in rows.items()),
    ]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    told = [f"- {_name(entry)}: {entry['error']}\n" for entry in entries if entry["error"]]
    return text + ("\nFailed:\n\n" + "".join(told) if told else "")


def _first_seen(entries: list[dict], entry: dict) -> int:
    """Backbones are compared on one data set, so data sets come first, in the suite's order."""
    return list(dict.fromkeys(other["data"] for other in entries)).index(entry["data"])


def _name(entry: dict) -> str:
    return f"{entry['protocol']} of {entry['backbone']} on {entry['data']}"
