"""COCO's average precision of boxes and masks, by pycocotools."""

import contextlib
import io
from typing import Any

from ldae.data.instances import import_pycocotools

# The first numbers of pycocotools' summary, in its order.
_NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")

Result = dict[str, Any]
"""A detection as COCO's files of results hold it: image_id, category_id, score, and bbox (left,
top, width, height), beside which a segmentation as run lengths may stand."""


def average_precision(
    dataset: dict[str, list[dict]], found: list[Result], masks: bool
) -> dict[str, float | None]:
    """Return average precisions in percent: ``box_ap``, ``box_ap50`` and so on, and ``mask_ap``.

    ``ap`` is the mean over the IoU thresholds 0.5 to 0.95, ``ap50`` and ``ap75`` are those at 0.5
    and 0.75, and small, medium and large are objects of less than 32^2, 96^2 and more pixels. Each
    is a mean over classes. Where there is no such object it is None.

    Args:
        dataset: the annotations, as ``InstanceSource.dataset`` returns them.
        found: the detections in all images.
        masks: whether to grade masks beside boxes.

    Raises: InputError when pycocotools is not installed.
    """
    results = _graded(dataset, found, "bbox", "box")
    return results | (_graded(dataset, found, "segm", "mask") if masks else {})


def check_installed() -> None:
    """Check that pycocotools is installed. Raises: InputError with the command that installs it."""
    import_pycocotools("cocoeval")


def _graded(
    dataset: dict[str, list[dict]], found: list[Result], kind: str, prefix: str
) -> dict[str, float | None]:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = _index(dataset["annotations"], dataset)
        guesses = _index([_guess(n, part, kind) for n, part in enumerate(found, 1)], dataset)
        graded = import_pycocotools("cocoeval").COCOeval(truth, guesses, kind)
        graded.evaluate()
        graded.accumulate()
        graded.summarize()
    numbers = graded.stats[: len(_NAMES)].tolist()
    return {
        f"{prefix}_{name}": None if number < 0 else 100 * number
        for name, number in zip(_NAMES, numbers)
    }


def _index(annotations: list[dict], dataset: dict[str, list[dict]]) -> Any:
    """Return annotations in pycocotools' class, which adds keys to copies of them."""
    indexed = import_pycocotools("coco").COCO()
    indexed.dataset = dataset | {"annotations": [dict(part) for part in annotations]}
    indexed.createIndex()
    return indexed


def _guess(number: int, result: Result, kind: str) -> dict:
    """Return a detection with what pycocotools' own reader of results adds."""
    kept = {name: result[name] for name in ("image_id", "category_id", "score", "bbox")}
    kept |= {"id": number, "iscrowd": 0, "area": result["bbox"][2] * result["bbox"][3]}
    if kind == "segm":
        segmentation = result["segmentation"]
        area = import_pycocotools("mask").area(segmentation)
        kept |= {"segmentation": segmentation, "area": int(area)}
    return kept
