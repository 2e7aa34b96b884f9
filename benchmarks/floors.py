"""Whether a trained backbone is above its untrained control in a suite's table, by enough.

python benchmarks/floors.py TABLE.json --backbone NAME --control NAME --above PROTOCOL=POINTS ...

The floor of a protocol is the control's number and so many points; the number is the headline of the
cell, which table.md shows. A backbone below one of its floors ends it with a status that is not 0.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="table.json of ldae evaluate")
    parser.add_argument("--backbone", required=True, help="its name in the table")
    parser.add_argument("--control", required=True)
    parser.add_argument("--above", nargs="+", required=True, metavar="PROTOCOL=POINTS")
    asked = parser.parse_args()
    below = 0
    for floor in asked.above:
        protocol, _, points = floor.partition("=")
        control, found = (
            headline(asked.table, name, protocol) for name in (asked.control, asked.backbone)
        )
        least = control + float(points)
        below += found < least
        state = "below" if found < least else "above"
        print(f"{protocol}: {found:.2f}, {state} its floor of {least:.2f} (control {control:.2f})")
    sys.exit(bool(below))


def headline(table: Path, backbone: str, protocol: str) -> float:
    """Return the headline of a cell."""
    for cell in json.loads(table.read_text())["cells"]:
        if (cell["backbone"], cell["protocol"]) == (backbone, protocol) and cell["results"]:
            return cell["results"][cell["headline"]]
    sys.exit(f"{table} has no results of {backbone} by {protocol}")


if __name__ == "__main__":
    main()
