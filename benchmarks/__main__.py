"""Run the benchmarks that measure speed, one after another, and keep one JSON for each machine.

python -m benchmarks [NAME...] [--out FOLDER] [--device DEVICE]
python -m benchmarks --list
python -m benchmarks --table
python -m benchmarks --write README.md docs/*.md

Each benchmark runs in its own process, and its measurement takes the place of the former one of
this machine. A benchmark that fails is reported, and the others still run; the status is then 1.
`gpu` stands for all benchmarks whose names begin with `gpu-`. They run only when they are named.
"""

import argparse
import ast
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.machines import MACHINES, machine_of, merge, table
from benchmarks.registry import BENCHMARKS, GPU, Benchmark
from benchmarks.tables import write_tables
from ldae.console import format_duration
from ldae.devices import device_for
from ldae.errors import InputError, report, unknown
from ldae.runs.environment import environment

ROOT = Path(__file__).parent.parent
RESULTS = Path("runs", "benchmarks")  # of each benchmark, below ROOT
ALL = BENCHMARKS | GPU


def main(argv: list[str] | None = None) -> int:
    """Run benchmarks, list them or print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="by default all without gpu-*")
    parser.add_argument("--out", type=Path, default=MACHINES, help="folder of the machines' files")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="give gpu-* tiny sizes, to try them")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument("--table", action="store_true", help="print the table of all machines")
    parser.add_argument(
        "--write", type=Path, nargs="+", metavar="PAGE", help="write the tables of pages anew"
    )
    args = parser.parse_args(argv)
    try:
        if args.write:
            for page in args.write:
                write_tables(page)
        elif args.table:
            print(table(args.out), end="")
        elif args.list:
            for name, benchmark in ALL.items():
                print(f"{name:26}{summary(benchmark)}")
        else:
            return run_all(chosen(args.names), args)
    except InputError as error:
        report(error)
        return error.exit_status
    return 0


def chosen(names: list[str]) -> list[str]:
    """Return the named benchmarks, by default all that need no GPU.

    Raises: InputError for a name that does not exist, with the nearest one.
    """
    found: list[str] = []
    for name in names or BENCHMARKS:
        if name not in (*ALL, "gpu"):
            raise unknown("there is no benchmark", name, ALL, " (`python -m benchmarks --list`)")
        found += GPU if name == "gpu" else [name]
    return found


def summary(benchmark: Benchmark) -> str:
    """Return the command of a benchmark, and the first line of its file's docstring."""
    doc = ast.get_docstring(ast.parse((ROOT / "benchmarks" / benchmark.file).read_text())) or ""
    command = shlex.join([benchmark.file, *benchmark.arguments])
    return f"{doc.splitlines()[0]}  ({command})"


def run_all(names: list[str], args: argparse.Namespace) -> int:
    """Run benchmarks and merge their measurements; return 1 if one of them failed, else 0."""
    device = device_for(args.device)
    machine = machine_of(environment(device))
    failed = []
    for number, name in enumerate(names, 1):
        load, begun = os.getloadavg()[0], time.monotonic()
        print(f"\n[{number}/{len(names)}] {name}, load {load:.1f}", flush=True)
        try:
            record = run(name, str(device), args.tiny) | {"load_before": round(load, 2)}
        except InputError as error:
            print(f"{name} failed: {error}", flush=True)
            failed.append(name)
            record = {"error": str(error), "environment": environment(device)}
        file = merge(args.out, machine, name, record)
        print(f"{name}: {format_duration(time.monotonic() - begun)}, {file}", flush=True)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return int(bool(failed))


def run(name: str, device: str, tiny: bool = False) -> dict:
    """Run a benchmark in its own process, and return its measurement.

    Raises: InputError when it fails or exceeds its time limit.
    """
    benchmark, out = ALL[name], RESULTS / f"{name}.json"
    words = [str(Path("benchmarks", benchmark.file)), *benchmark.arguments, "--out", str(out)]
    words += ["--device", device] if benchmark.takes_device else []
    words += ["--tiny"] if tiny and name in GPU else []
    (ROOT / out).unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its own processes can be ended with it
    )
    late = threading.Event()

    def stop() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def end_late() -> None:
        late.set()
        stop()

    timer = threading.Timer(benchmark.seconds or threading.TIMEOUT_MAX, end_late)
    timer.daemon = True
    timer.start()
    last = ""
    try:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
        process.wait()
    finally:
        timer.cancel()
        stop()
    if late.is_set():
        raise InputError(f"it took longer than its limit of {benchmark.seconds:g} s")
    if process.returncode:
        raise InputError(f"it ended with status {process.returncode}: {last}")
    try:
        return json.loads((ROOT / out).read_text())
    except (OSError, ValueError):
        raise InputError(f"it wrote no {out}") from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # ends the benchmark too
    sys.exit(main())
