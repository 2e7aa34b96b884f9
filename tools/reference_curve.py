"""Add the curve of a finished run to the reference curves of the package.

python tools/reference_curve.py RUN NAME

Writes ldae/reference_curves/NAME.json: the settings of the run, and its loss and features at 64
points at most. `ldae curves OTHER --beside NAME` then prints it beside other runs. Folders in the
name of the data are left out.
"""

import argparse
import json
import sys
from pathlib import Path

from ldae.errors import InputError, report
from ldae.files import write_json
from ldae.runs import layout
from ldae.runs.curves import FOLDER, curve_of
from ldae.runs.kinds import pretraining_in
from ldae.runs.symptoms import RANKME

_VERSIONS = ("ldae", "torch", "timm")


def main(argv: list[str] | None = None) -> int:
    """Write a reference curve, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    args = parser.parse_args(argv)
    try:
        path = FOLDER / f"{args.name}.json"
        write_json(path, reference_of(args.run))
    except InputError as error:
        report(error)
        return error.exit_status
    print(path)
    return 0


def reference_of(run: Path) -> dict:
    """Return the content of a reference curve.

    Raises: InputError when the folder holds no pre-training, or none that measured its features.
    """
    kind = pretraining_in(run)
    curve = curve_of(run)
    if not any(RANKME in record for record in curve["records"]):
        raise InputError(f"run folder {run} has no measured features: see system.watch_every")
    for name in ("data.source", "data.eval_source"):
        source = str(curve["settings"].get(name, ""))
        curve["settings"][name] = source.rpartition("/")[2]
    environment = json.loads((run / layout.ENVIRONMENT).read_text())
    packages = environment.get("packages", {})
    versions = {name: packages[name] for name in _VERSIONS if name in packages}
    made = {"versions": versions, "git": environment.get("git"), "device": environment["device"]}
    return {"kind": kind, **curve, "made": made}


if __name__ == "__main__":
    sys.exit(main())
