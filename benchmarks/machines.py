"""The measurements of each machine in one JSON, and the table over all machines."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.registry import BENCHMARKS, GPU, Benchmark, Number
from ldae.data.workers import available_cpus
from ldae.errors import InputError
from ldae.files import write_json
from ldae.markdown import markdown_table

MACHINES = Path(__file__).parent / "results" / "machines"


def machine_of(environment: dict) -> dict:
    """Return the name, the processor, the cores and the GPU of this machine.

    The name is that of the GPU, or that of the processor with its number of cores and its widest
    vector instructions, since processors of one name can differ in them.

    Args:
        environment: as ``ldae.runs.environment`` returns it for the device.
    """
    cpu, gpu, cores = environment["cpu"], environment.get("gpu"), available_cpus()
    model = re.sub(r"\((r|tm)\)|@.*| cpu| processor", "", (gpu or cpu).lower())
    instructions = environment["cpu_instructions"]
    words = model if gpu else f"cpu {model} {cores} {' '.join(instructions[-1:])}"
    name = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    return {"name": name, "cpu": cpu, "instructions": instructions, "cores": cores, "gpu": gpu}


def read(file: Path) -> dict:
    """Return the content of a machine's file; an empty one if there is no file.

    Raises: InputError when the file is not of this format.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        found["machine"]["name"], found["benchmarks"].items()
    except FileNotFoundError:
        return {"machine": {}, "benchmarks": {}}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{file} is not a file of measurements") from None
    return found


def merge(folder: Path, machine: dict, name: str, record: dict) -> Path:
    """Put the record of a benchmark into the machine's file, in place of its former record.

    An error does not take the place of a measurement.
    """
    file = folder / f"{machine['name']}.json"
    found = read(file)
    former = found["benchmarks"].get(name)
    if former is None or "error" in former or "error" not in record:
        benchmarks = found["benchmarks"] | {name: record}
        write_json(file, {"machine": machine, "benchmarks": dict(sorted(benchmarks.items()))})
    return file


def table(folder: Path = MACHINES) -> str:
    """Return the table of all machines in a folder as Markdown.

    A star marks a number that was measured with other arguments than those of the registry.
    """
    machines = [read(file) for file in sorted(folder.glob("*.json"))]
    machines.sort(key=lambda found: (found["machine"]["gpu"] is not None, found["machine"]["name"]))
    names = [found["machine"]["name"] for found in machines]
    columns = [found["benchmarks"] for found in machines]
    if not any(found["machine"]["gpu"] for found in machines):
        names, columns = [*names, "GPU"], [*columns, {}]
    rows = [
        [name, number, *cells]
        for name, benchmark in (BENCHMARKS | GPU).items()
        for number, cells in _rows(name, benchmark, columns)
    ]
    text = markdown_table(["benchmark", "", *names], rows, text=2)
    if any(cell.endswith("*") for _, _, *cells in rows for cell in cells):
        text += "\n\\* measured with other arguments than the benchmark has now\n"
    return text


def _rows(name: str, benchmark: Benchmark, columns: list[dict]) -> Iterator[tuple[str, list[str]]]:
    """Yield each number of a benchmark that a machine has, and its cells."""
    for number in benchmark.numbers:
        cells = [_cell(number, benchmark, column.get(name, {})) for column in columns]
        if any(cells):
            yield number.what, cells


def _cell(number: Number, benchmark: Benchmark, record: dict) -> str:
    value = _find(record, number.keys)
    if value is None:
        return ""
    known = record["environment"]
    threads = ", one thread" if known["device"] == "cpu" and known["cpu_threads"] == 1 else ""
    star = "" if _has_arguments_of(benchmark, record) else " \\*"
    return _text(value, number.form) + threads + star


def _find(record: dict, keys: str) -> object:
    """Return the value at keys separated by slashes, or None."""
    value: object = record
    for key in keys.split("/"):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _text(value: object, form: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return form.format(value).replace("%", " %")


def _has_arguments_of(benchmark: Benchmark, record: dict) -> bool:
    """Return whether a record was measured by the benchmark's command, files and device aside."""
    _, *words = record["environment"]["command"]
    for flag in ("--out", "--device"):
        if flag in words:
            place = words.index(flag)
            del words[place : place + 2]
    return words == list(benchmark.arguments)
