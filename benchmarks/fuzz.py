"""Mutate every kind of file that ldae reads, and count how it answers.

python benchmarks/fuzz.py [--cases 10000] [--seed 0] [--targets NAME...] [--out FILE]

A case replaces parts of one valid file (``mutations.py``) and reads it as a command would
(``fuzz_targets.py``). The file must be read, or refused by InputError in one line. Everything else
is a failure: another exception, a case that takes longer than ten seconds, a file that reading has
changed, or a process that dies. Each target has a process of its own. The records of other targets
in FILE are kept.
"""

import argparse
import faulthandler
import json
import logging
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.fuzz_targets import TARGETS, Target
from benchmarks.mutations import Edit, edits, mutate
from ldae.console import progress
from ldae.errors import InputError
from ldae.files import write_json
from ldae.runs.environment import environment

SECONDS = 10  # of a case
_MEMORY = 16 << 30  # address space of a process, so that a file that asks for more is an error
_MOST_FAILURES = 20  # in the record of a target


class Hang(BaseException):
    """A case took too long. It is no Exception, so that no reader takes it for damage."""


class Fuzzed:
    """The files of a target in a folder, which are mutated one at a time."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self.folder, self.tree = target, folder, target.tree()
        self.mutated = sorted(filter(target.mutated, self.tree))
        self._restore({*self.tree})

    def cases(self) -> st.SearchStrategy[tuple[str, list[Edit]]]:
        """Return a strategy of a file and the edits of its content."""
        return st.tuples(st.sampled_from(self.mutated), edits(self.target.words))

    def answer(self, name: str, edited: list[Edit]) -> str:
        """Mutate a file and read it; return "read" or "refused".

        Raises: Hang, and AssertionError when the refusal has several lines or a file has changed;
            any exception of the reader but InputError.
        """
        content = mutate(self.tree[name], edited)
        (self.folder / name).write_bytes(content)
        answer = "read"
        try:
            with _time_limit():
                self.target.read(self.folder, name)
        except InputError as error:
            answer = "refused"
            assert str(error) and "\n" not in str(error), f"not one line: {str(error)!r}"
        finally:
            files = {path for path in self.folder.rglob("*") if path.is_file()}
            found = {str(path.relative_to(self.folder)): path.read_bytes() for path in files}
            before = self.tree | {name: content}
            changed = {
                path for path in before.keys() | found if before.get(path) != found.get(path)
            }
            self._restore(changed | {name})
        lost = [path for path in changed if Path(path).name not in self.target.written]
        if answer == "read" and self.target.written:
            lost = [path for path in lost if path != name]  # a damaged file was written again
        assert not lost, f"changed by reading: {', '.join(sorted(lost))}"
        return answer

    def _restore(self, paths: set[str]) -> None:
        for path in paths:
            file = self.folder / path
            if path in self.tree:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(self.tree[path])
            else:
                file.unlink(missing_ok=True)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise Hang after ``SECONDS``; end the process if code outside of Python does not return."""

    def stop(*_: object) -> None:
        raise Hang(f"a case took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def fuzz(name: str, count: int, number: int, last: Path) -> dict[str, Any]:
    """Fuzz a target with ``count`` cases; return the record. ``last`` gets each case before it."""
    record: dict[str, Any] = {"cases": 0, "read": 0, "refused": 0, "slowest_seconds": 0.0}
    failures: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder, progress(count, name) as bar:
        fuzzed = Fuzzed(TARGETS[name], Path(folder))

        @seed(number)
        @settings(
            max_examples=count,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(fuzzed.cases())
        def run(case: tuple[str, list[Edit]]) -> None:
            last.write_text(repr(case))
            start = time.perf_counter()
            try:
                record[fuzzed.answer(*case)] += 1
            except (Exception, Hang) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                reason = f"{type(error).__name__}: {error}"
                failures.append(
                    {
                        "case": repr(case)[:1000],
                        "error": reason[:300],
                        "at": f"{where.name}:{where.lineno}",
                    }
                )
            record["cases"] += 1
            record["slowest_seconds"] = max(record["slowest_seconds"], time.perf_counter() - start)
            bar.update()

        run()
    record["slowest_seconds"] = round(record["slowest_seconds"], 3)
    record["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
    return record | {"failed": len(failures), "failures": failures[:_MOST_FAILURES]}


def _in_process(name: str, count: int, number: int) -> dict[str, Any]:
    """Fuzz a target in a process of its own, whose death is a failure."""
    with tempfile.TemporaryDirectory() as folder:
        last, out = Path(folder, "last"), Path(folder, "record.json")
        command = [sys.executable, "-m", "benchmarks.fuzz", "--one", name, "--cases", str(count)]
        command += ["--seed", str(number), "--last", str(last), "--out", str(out)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent)
        if out.exists():
            return json.loads(out.read_text())
        case = last.read_text()[:1000] if last.exists() else "none"
        failure = {"case": case, "error": f"the process ended with {done.returncode}", "at": ""}
        return {"cases": 0, "read": 0, "refused": 0, "failed": 1, "failures": [failure]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fuzz.json"))
    parser.add_argument("--one", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--last", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        logging.disable()
        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        write_json(args.out, fuzz(args.one, args.cases, args.seed, args.last))
        return
    weights = sum(TARGETS[name].weight for name in args.targets)
    records = json.loads(args.out.read_text())["targets"] if args.out.exists() else {}
    for name in args.targets:
        count = -int(-args.cases * TARGETS[name].weight // weights)
        records[name] = _in_process(name, count, args.seed)
        print(
            name,
            {key: value for key, value in records[name].items() if key != "failures"},
            flush=True,
        )
        for failure in records[name]["failures"]:
            print("  ", failure["error"], failure["at"], failure["case"][:200], flush=True)
    total = {
        key: sum(record[key] for record in records.values())
        for key in ("cases", "read", "refused", "failed")
    }
    write_json(
        args.out,
        total | {"seed": args.seed, "targets": records, "environment": environment("cpu")},
    )
    print(total)
    if total["failed"]:
        sys.exit("some cases were answered wrongly")


if __name__ == "__main__":
    main()
