"""The results that lie beside a run, as a table for its model card."""

import json
from contextlib import suppress
from pathlib import Path

from ldae.markdown import markdown_table
from ldae.runs import layout

# Beginnings of the names of scores, all in percent; other results are settings that were chosen.
_SCORES = ("top1", "top5", "miou", "pixel_accuracy", "mean_average_precision", "recall_at")
_NOT_OF_THE_BACKBONE = ("grid",)  # probes other blocks and noise levels


def score_table(run: Path, params: int, images_seen: int | None) -> str:
    """Return the scores of a run's backbone as a Markdown table; "" when there are none.

    The untrained control is marked, and so are scores of another checkpoint, where results.json
    has the number of images seen. Files that hold other results, or none, are left out.

    Args:
        params: the number of the backbone's parameters; results of others are left out.
        images_seen: the number of images that the backbone has seen, if ldae pre-trained it.
    """
    rows = []
    for path in sorted((run / layout.EVALS).glob(f"*/{layout.RESULTS}")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # not our record
            record = json.loads(path.read_text(encoding="utf-8"))
            ours = record["backbone"]["params"] == params
            if ours and record["task"] not in _NOT_OF_THE_BACKBONE:
                rows.append(_row(record, images_seen))
    if not rows:
        return ""
    return markdown_table(["evaluation", "data", "scores", "images seen"], rows, text=4).rstrip()


def public_name(source: str) -> str:
    """Return the name alone of a source of images: cards are public, and paths private."""
    return Path(source.partition("@")[0]).name


def _row(record: dict, images_seen: int | None) -> tuple[str, str, str, str]:
    """Return the cells of a record's row: the evaluation, the data, the scores, the images seen."""
    data, results = record["data"], record["results"].items()
    names = dict.fromkeys(public_name(data[key]) for key in ("spec", "eval_spec"))
    scores = [f"{name} {value:.2f}" for name, value in results if name.startswith(_SCORES)]
    precision = record["protocol"].get("precision", "fp32")
    lower = [] if precision == "fp32" else [precision]
    return (
        ", ".join([record["task"], *record["protocol"]["modified"], *lower]),
        f"{', graded on '.join(names)} ({data['eval_images']:,} images)",
        ", ".join(scores),
        _seen(record["backbone"], images_seen),
    )


def _seen(backbone: dict, images_seen: int | None) -> str:
    if backbone["random_init"]:
        return "none: the untrained control"
    seen = backbone.get("images_seen")
    if seen is None:
        return "not recorded"
    return f"{seen:,}" if seen == images_seen else f"{seen:,}: another checkpoint"
