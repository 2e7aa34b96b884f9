"""The images that a run could not decode and skipped."""

import json
from collections import ChainMap
from pathlib import Path

from ldae.distributed import gather_values, is_main
from ldae.files import write_json
from ldae.runs import layout


def record_skipped(run: Path, skipped: dict[str, str]) -> None:
    """Add the images that each rank skipped, name -> reason, to the run's file of them.

    All ranks must call this. The file names each image once, with the first reason.

    Raises: InputError when the file cannot be written.
    """
    of_all_ranks = gather_values(skipped)
    if is_main() and any(of_all_ranks):
        path = run / layout.SKIPPED
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        images = dict(sorted(ChainMap(before, *of_all_ranks).items()))  # the first reason counts
        if images != before:
            write_json(path, images)
