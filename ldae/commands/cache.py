"""``ldae cache``: decode the images of a source once, into one file."""

import logging
import os
from itertools import takewhile
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from ldae import files
from ldae.console import progress
from ldae.data.cached import (
    BLOCK,
    SUFFIX,
    CachedSource,
    CacheFile,
    has_index,
    open_cache,
    write_index,
)
from ldae.data.image import BadImage
from ldae.data.loader import crop_batches
from ldae.data.open import source_splits
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.errors import InputError
from ldae.runs.lock import open_partial
from ldae.tree import COUNT, NOT_NEGATIVE

_log = logging.getLogger(__name__)


def cache(
    source: str,
    out: Path | None = None,
    /,
    *,
    side: Annotated[int, COUNT] = 256,
    in_chans: Annotated[int, COUNT] = 3,
    split: Literal["train", "eval"] | None = None,
    bad_images: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    check: bool = False,
) -> None:
    """Write center crops of all images of SOURCE to OUT, a .safetensors file that is a source too.

    Names, order, labels and fingerprint are those of SOURCE. The same command resumes.

    Args:
        source: the images; with --check, the cache to check.
        out: the file to write, which ends in .safetensors.
        side: side of the crops in pixels. Random crops are cut from them later.
        in_chans: channels of the crops.
        split: write only this split; by default all splits of SOURCE.
        bad_images: stop at an image that cannot be decoded, or skip it: it is bad in OUT too.
        workers: processes that decode images; by default one for each core.
        check: read a cache and compare it with its checksums; nothing is written.

    Raises: InputError for wrong settings or images, and when the file cannot be written.
    """
    if check:
        if out:
            raise InputError(f"--check takes only the cache to check, not {out} too")
        _check(open_cache(Path(source)))
        return
    if out is None or out.suffix.lower() != SUFFIX:
        raise InputError(f"name the file to write, which ends in {SUFFIX}: ldae cache SOURCE OUT")
    write_cache(
        _open_splits(source, split), out, CropTransform(side, in_chans), workers, bad_images
    )


def write_cache(
    sources: dict[str, Source],
    out: Path,
    crop: CropTransform,
    workers: int | None,
    bad_images: Literal["stop", "skip"] = "stop",
) -> None:
    """Write crops of the images of each split to the cache ``out``, as ``cache`` does.

    Raises: InputError for wrong settings or images, and when the file cannot be written.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    NOT_NEGATIVE.check("workers", workers)
    if out.exists():
        _check_same(open_cache(out), sources, crop)
        print(f"{out}: done before")
        return
    with files.report_write_errors(out), open_partial(out) as file:
        partial = _begin(file, out, sources, crop)
        for name, source in sources.items():
            _fill(file, partial, name, source, crop, workers, bad_images)
        files.publish(file, out)
    print(f"{out}: {_describe(open_cache(out))}")


def _open_splits(spec: str, split: str | None) -> dict[str, Source]:
    """Open the splits of a source, or only ``split``. Raises: InputError when it is missing."""
    sources = {
        name: open_split()
        for name, open_split in source_splits(spec).items()
        if split in (None, name) or name == "all"
    }
    if not sources:
        raise InputError(f"{spec} has no {split} split")
    if any(isinstance(source, CachedSource) for source in sources.values()):
        raise InputError(f"{spec} is a cache: name the source that it was written from")
    return sources


def _begin(file: BinaryIO, out: Path, sources: dict[str, Source], crop: CropTransform) -> CacheFile:
    """Write the index of a cache to ``file``, which becomes ``out``, if an earlier start has not.

    Raises: InputError when it was begun for other images or crops, or the disk has no room.
    """
    if not has_index(file):
        write_index(file, sources, crop.img_size, crop.in_chans)
    partial = CacheFile(file)
    _check_same(partial, sources, crop)
    status = os.fstat(file.fileno())
    files.check_room(out, status.st_size - 512 * status.st_blocks)
    return partial


def _check_same(held: CacheFile, sources: dict[str, Source], crop: CropTransform) -> None:
    """Check that a cache is of these images and crops. Raises: InputError with the difference."""
    shape = next(iter(held.arrays.values()))["images"].shape
    facts = {
        "split": (" and ".join(held.splits), " and ".join(sources)),
        "in_chans": (shape[1], crop.in_chans),
        "side": (shape[2], crop.img_size),
    }
    for name, (there, here) in facts.items():
        if there != here:
            raise InputError(
                f"{held.path} holds other crops: {name} is {there} there, {here} here; delete it "
                "or name another file"
            )
    for split, source in sources.items():
        if held.splits[split]["fingerprint"] != source.fingerprint():
            raise InputError(
                f"{held.path} was written from other images than {source.spec} has now in {split}: "
                "delete it or name another file"
            )


def _fill(
    file: BinaryIO,
    partial: CacheFile,
    split: str,
    source: Source,
    crop: CropTransform,
    workers: int,
    bad_images: str,
) -> None:
    """Write the blocks of a split that are not written yet, or are damaged.

    Raises: BadImage at a bad image, unless ``bad_images`` is skip.
    """
    kept = min(BLOCK * sum(takewhile(bool, partial.whole_blocks(split))), len(source))
    with progress(len(source), f"cache {split}") as bar:
        bar.update(kept)
        for batch in crop_batches(source, crop, range(kept, len(source)), BLOCK, workers):
            for _, reason in batch.bad:
                if bad_images == "stop":
                    raise BadImage(reason)
                _log.warning("skipped: %s", reason)
            bad, images = batch.targets.byte().numpy(), batch.images.numpy()
            partial.write_block(file, split, int(batch.positions[0]), bad, images)
            bar.update(len(images))


def _check(held: CacheFile) -> None:
    """Compare a cache with its checksums. Raises: InputError naming the part that differs."""
    for split, arrays in held.arrays.items():
        damaged = f"{held.path} is damaged and must be written again: the checksum differs for"
        if not held.index_is_whole(split):
            raise InputError(f"{damaged} names and labels of {split}")
        with progress(len(arrays["images"]), f"check {split}") as bar:
            for block, is_whole in enumerate(held.whole_blocks(split)):
                if not is_whole:
                    first = BLOCK * block
                    last = min(first + BLOCK, len(arrays["images"])) - 1
                    raise InputError(f"{damaged} images {first} to {last} of {split}")
                bar.update(BLOCK)
    print(f"{held.path}: {_describe(held)}, all as they were written")


def _describe(held: CacheFile) -> str:
    counts = " and ".join(
        f"{len(arrays['images']):,} images" + (f" ({split})" if split != "all" else "")
        for split, arrays in held.arrays.items()
    )
    arrays = next(iter(held.arrays.values()))
    shape = " x ".join(map(str, arrays["images"].shape[1:]))
    bad = sum(int(arrays["bad"].sum()) for arrays in held.arrays.values())
    return f"{counts} of {shape}, {files.format_size(held.path.stat().st_size)}" + (
        f", {bad} bad" if bad else ""
    )
