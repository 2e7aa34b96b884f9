"""Two records of one evaluation: which numbers differ, and what has changed in between."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ldae.tree import flatten_table

# Parts of a record other than the protocol, the weights and the images.
_NOT_ORIGINS = ("results", "environment", "call", "suite")
# Entries that several seeds may have each.
_BY_SEED = ("backbone.seed", "backbone.sha256", "protocol.starts_from")
# Beginnings of the names in an environment of what may change the last bits of a number.
_EXPLAINS = ("device", "gpu", "cuda", "cpu", "ranks", "python", "packages.", "git.commit")
_UNORDERED = "a GPU adds in an order that is not fixed"


def compare(then: dict, now: dict, headlines: Sequence[str], tolerance: float) -> dict:
    """Compare two records of one evaluation.

    The numbers are equal if all results are, to the last bit. They are close if nothing but devices
    or versions has changed, and no headline differs by more than the tolerance.

    Args:
        then: the content of the first results.json.
        now: that of the repetition.
        headlines: names of the results to list.
        tolerance: points by which a percent may differ, but at least one image; for a distance,
            percent of its value.

    Returns: the ``verdict`` (equal, close or different) and a ``sentence`` about it; by name, the
    ``numbers`` then and now and their difference; the names of ``others`` that differ; in words,
    the ``changed`` weights, images and settings, and the devices and versions that may have
    ``explained`` a difference.
    """
    first, second = then["results"], now["results"]
    numbers = {name: _difference(first[name], second.get(name)) for name in headlines}
    names = dict.fromkeys([*first, *second])
    others = [n for n in names if n not in numbers and first.get(n) != second.get(n)]
    changed, explained = _changed_origins(then, now), [*_changed_environment(then, now)]
    close = all(_is_close(number, then, tolerance) for number in numbers.values())
    verdict, sentence = _judge(first == second, close, changed, explained)
    return {
        "verdict": verdict,
        "sentence": sentence,
        "numbers": numbers,
        "others": others,
        "changed": changed,
        "explained": explained,
    }


def _judge(equal: bool, close: bool, changed: list[str], explained: list[str]) -> tuple[str, str]:
    """Return the verdict (equal, close or different), and a sentence about it.

    Args:
        equal: whether all results are the same to the bit.
        close: whether the headlines are within the tolerance.
        changed: as ``compare`` returns it.
        explained: as ``compare`` returns it.
    """
    changes, reasons = "; ".join(changed), "; ".join(explained)
    if equal:
        return "equal", "the same to the bit" + (f", although {changes}" if changed else "")
    if changed:
        return "different", f"different: {changes}"
    if not explained:
        return (
            "different",
            "different, and neither device, versions, weights nor images have changed",
        )
    if close:
        return "close", f"the same within what a change of device or version explains: {reasons}"
    return "different", f"different, by more than a change of device or version explains: {reasons}"


def _difference(then: float, now: float | None) -> dict[str, float | None]:
    return {"then": then, "now": now, "difference": None if now is None else now - then}


def _is_close(number: dict[str, Any], record: dict, tolerance: float) -> bool:
    """Return whether a number of two records differs by no more than ``compare`` allows."""
    if number["difference"] is None or not math.isfinite(number["difference"]):
        return False
    images = record.get("data", {}).get("eval_images")
    allowed = max(tolerance, 100 / images) if images else number["then"] * tolerance / 100
    return abs(number["difference"]) <= allowed * (1 + 1e-9)  # one image's share may be rounded


def _changed_origins(then: dict, now: dict) -> list[str]:
    """Return in words what has changed that decides the numbers: weights, images and settings.

    Args:
        then: a record.
        now: another one. Only entries that both have are compared.
    """
    before, after = (_origins(record) for record in (then, now))
    if then["task"] in ("finetune", "detect"):  # the weights in their records are trained
        before.pop("backbone.sha256", None)
    changed = (name for name in before if name in after and before[name] != after[name])
    return [_in_words(name, before[name], after[name], then) for name in changed]


def _origins(record: dict) -> dict[str, Any]:
    """Return the entries of a record that decide the numbers, by their dotted names.

    Of weights that differ over several seeds, the first stand for all: older records have no
    others.
    """
    parts = {key: part for key, part in record.items() if key not in _NOT_ORIGINS}
    return {
        name: value[0] if name in _BY_SEED and isinstance(value, list) else value
        for name, value in flatten_table(parts).items()
    }


def _in_words(name: str, before: Any, after: Any, record: dict) -> str:
    """Return a change of an entry of the record in words; ``name`` is the dotted name."""
    if name in ("backbone.sha256", "protocol.starts_from"):
        return f"the weights of {record['backbone']['spec']} have changed"
    part, _, key = name.rpartition(".")
    if key in ("fingerprint", "eval_fingerprint"):
        which = {"data.fingerprint": "train ", "data.eval_fingerprint": "graded "}.get(name, "")
        spec = record[part]["eval_spec" if key.startswith("eval") else "spec"]
        return f"the {which}images of {spec} have changed"
    return f"{name} was {before} and is {after}"


def _changed_environment(then: dict, now: dict) -> Iterator[str]:
    """Yield in words what has changed in devices and versions, or that a GPU needs no change."""
    before, after = (flatten_table(record["environment"]) for record in (then, now))
    for found in (before, after):
        found["device"] = str(found["device"]).partition(":")[0]  # whichever GPU it was
    changed = [
        name
        for name in before
        if name.startswith(_EXPLAINS) and name in after and before[name] != after[name]
    ]
    for name in changed:
        yield f"{name.removeprefix('packages.')} {before[name]} then, {after[name]} now"
    if not changed and after["device"] == "cuda":
        yield _UNORDERED
