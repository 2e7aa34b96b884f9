"""Running the commands of the package, as studies of accuracy do, and the seconds of a run."""

import statistics
import subprocess
import sys
from pathlib import Path

from ldae.runs.metrics import read_records


def run_ldae(*words: object) -> None:
    """Run a command of the package, and stop when it fails."""
    command = [str(word) for word in words]
    print("\n$ ldae", *command, flush=True)
    subprocess.run([sys.executable, "-m", "ldae", *command], check=True)


def seconds_of(run: Path) -> float:
    """Return the seconds of the loop. The first record, which compiles, counts at median speed."""
    records = read_records(run)
    usual = statistics.median(record["images_per_second"] for record in records[1:] or records)
    speeds = [usual, *(record["images_per_second"] for record in records[1:])]
    seen, total = 0, 0.0
    for record, speed in zip(records, speeds):
        total += (record["images"] - seen) / speed
        seen = record["images"]
    return round(total, 1)
