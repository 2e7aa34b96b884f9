"""Check that a trained backbone is far enough above its untrained control in a suite's table.

python benchmarks/floors.py TABLE.json --backbone NAME --control NAME --above PROTOCOL=POINTS ...

The floor of a protocol is the control's headline, the number in table.md, plus POINTS. The exit
status is 1 when the backbone is below a floor.
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
    args = parser.parse_args()
    below = 0
    for floor in args.above:
        protocol, _, points = floor.partition("=")
        control = headline(args.table, args.control, protocol)
        score, least = headline(args.table, args.backbone, protocol), control + float(points)
        below += score < least
        state = "below" if score < least else "above"
        print(f"{protocol}: {score:.2f}, {state} its floor of {least:.2f} (control {control:.2f})")
    sys.exit(bool(below))


def headline(table: Path, backbone: str, protocol: str) -> float:
    for cell in json.loads(table.read_text())["cells"]:
        if (cell["backbone"], cell["protocol"]) == (backbone, protocol) and cell["results"]:
            return cell["results"][cell["headline"]]
    sys.exit(f"{table} has no results of {backbone} by {protocol}")


if __name__ == "__main__":
    main()
