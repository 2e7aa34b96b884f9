"""What the metrics of a pre-training say about its health, without labels."""

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]

RANKME, SPREAD = "rankme", "spread"
LEVELS = (25, 50, 75)  # of the noise schedule, or of the patches that are masked, in percent

# A spread or a RankMe of at most this much is a collapse, and so is a fall to less than a fifth. At
# a spread of 0.01, the features of two images differ by about 1 % of their norm.
_NO_SPREAD = 0.01
_NO_RANK = 1.5
_FALL = 5.0
_STILL = 1e-3  # relative change of a value that stands still, for a PSNR that of the squared error
_STILL_DB = 0.005  # 10 log10(1 + _STILL), rounded up
_MEASUREMENTS = 3  # in a row that stand still
_LEAST_FALL = 0.01  # share by which the loss of a run that learns has fallen since its first record
_LOW_RATE = 0.1  # share of the highest learning rate so far; below it nothing has to move


def psnr_key(level: int) -> str:
    """Return the name of the PSNR at a level, in percent."""
    return f"psnr_{level}"


def symptoms(records: Sequence[Record], continued: bool = False) -> dict[str, str]:
    """Return a sentence for each symptom that a run shows at its last measurement, by name.

    **collapse**: the features of different images are alike. The spread is at most 0.01, or RankMe
    at most 1.5, or one of the two is less than a fifth of its largest value before.

    **standstill**: the run does not learn. At three measurements in a row, RankMe, the spread and
    the squared errors of all reconstructions differ by at most 0.1 %, while the learning rate is at
    least a tenth of its highest value so far. Or, at the third measurement or later, the loss is
    less than 1 % below that of the first record.

    The images and the noise of a measurement are always the same, so its values depend on the
    weights alone, and no noise hides how little they move.

    Args:
        records: the records of metrics.jsonl up to now.
        continued: whether the weights came from another training, whose loss may be low from the
            start; the second condition of a standstill is then left out.
    """
    watched = [record for record in records if RANKME in record]
    found = {}
    if watched and (sentence := _collapse(watched)):
        found["collapse"] = sentence
    if len(watched) >= _MEASUREMENTS and (sentence := _standstill(records, watched, continued)):
        found["standstill"] = sentence
    return found


def new_symptoms(records: Sequence[Record], continued: bool = False) -> list[str]:
    """Return the sentences of the symptoms that the last record adds to those before it."""
    if not records or RANKME not in records[-1]:
        return []
    before = symptoms(records[:-1], continued)
    now = symptoms(records, continued)
    return [sentence for name, sentence in now.items() if name not in before]


def _collapse(watched: list[Record]) -> str:
    """Return a sentence when the last measurement shows a collapse, otherwise ""."""
    *earlier, now = watched
    for name, least in ((SPREAD, _NO_SPREAD), (RANKME, _NO_RANK)):
        largest = max((record[name] for record in earlier), default=0.0)
        if now[name] <= least or now[name] < largest / _FALL:
            before = f", after {largest:.3g} at most" if earlier else ""
            return (
                f"the features have collapsed: at image {now['images']:,} their {_NOUNS[name]} is "
                f"{now[name]:.3g}{before}, so they hardly tell images apart; begin a run with a "
                "lower optim.blr, or look at the settings that differ from the recipe"
            )
    return ""


def _standstill(records: Sequence[Record], watched: list[Record], continued: bool) -> str:
    """Return a sentence when the last measurements show a standstill, otherwise ""."""
    first, now, last = records[0], watched[-1], watched[-_MEASUREMENTS:]
    highest = max(record["lr"] for record in watched)
    if now["lr"] >= _LOW_RATE * highest and all(_is_still(name, last) for name in _values(now)):
        return (
            f"the run stands still: from image {last[0]['images']:,} to {now['images']:,}, neither "
            "the features nor the reconstruction of the same images have changed by more than "
            f"{_STILL:.1%}; begin a run with a higher optim.blr"
        )
    if not continued and now["loss"] > (1 - _LEAST_FALL) * first["loss"]:
        return (
            f"the loss stands still: it was {first['loss']:.4g} at image {first['images']:,} and "
            f"is {now['loss']:.4g} at image {now['images']:,}; begin a run with another optim.blr, "
            "or look at the data"
        )
    return ""


_NOUNS = {SPREAD: "spread", RANKME: "effective rank (RankMe)"}


def _values(record: Record) -> list[str]:
    """Return the names of the values of a measurement."""
    return [name for name in (RANKME, SPREAD, *map(psnr_key, LEVELS)) if name in record]


def _is_still(name: str, records: list[Record]) -> bool:
    """Return whether a value hardly differs between measurements, see ``symptoms``."""
    values = [record[name] for record in records]
    if name in (RANKME, SPREAD):
        return max(values) <= (1 + _STILL) * min(values)
    return max(values) - min(values) <= _STILL_DB
