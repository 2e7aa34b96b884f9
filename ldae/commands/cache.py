"""``ldae cache``: decode or encode the images of a source once, into one file."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
import torch

from ldae import files, tokenizers
from ldae.console import progress
from ldae.data.cache_file import (
    BLOCK,
    SUFFIX,
    CacheFile,
    Content,
    has_index,
    open_cache,
    write_index,
)
from ldae.data.cached import CachedSource
from ldae.data.image import BadImage
from ldae.data.loader import crop_batches
from ldae.data.open import open_all
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.devices import device_for
from ldae.errors import InputError
from ldae.pretraining.latents import LatentEncoder
from ldae.runs import layout
from ldae.runs.lock import open_partial
from ldae.tree import COUNT, NOT_NEGATIVE, AnyPath

_log = logging.getLogger(__name__)


def cache(
    source: AnyPath,
    out: AnyPath | None = None,
    /,
    *,
    side: Annotated[int | None, COUNT] = None,
    in_chans: Annotated[int | None, COUNT] = None,
    split: Literal["train", "eval"] | None = None,
    latents: AnyPath | None = None,
    device: str | None = None,
    bad_images: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    check: bool = False,
) -> Path:
    """Write center crops of all images of SOURCE to OUT, a .safetensors file that is a source too.

    Names, order, labels and fingerprint are those of SOURCE. The same command resumes. With
    --latents, OUT holds latents of the training images instead, for data.latents of a pre-training.

    Args:
        source: the images; with --check, the cache to check.
        out: the file to write, which ends in .safetensors.
        side: side of the crops in pixels, by default 256. Random crops are cut from them later.
        in_chans: channels of the crops, by default 3.
        split: write only this split; by default all splits of SOURCE.
        latents: encode by this tokenizer: the file of a conv_vae, or the run folder of one.
        device: auto, cpu, cuda or cuda:N, to compute latents on.
        bad_images: stop at an image that cannot be decoded, or skip it: it is bad in OUT too.
        workers: processes that decode images; by default one for each core.
        check: read a cache and compare it with its checksums; nothing is written.

    Returns: ``out``, or with --check the cache.

    Raises: InputError for wrong settings or images, and when the file cannot be written.

    Examples:
        >>> images = ldae.cache("/data/imagenet", "imagenet-256.safetensors", side=256)
        >>> ldae.knn("runs/l_dae", images)
    """
    source, out = str(source), Path(out).expanduser() if out else None
    if check:
        others = {"side": side, "in-chans": in_chans, "split": split, "device": device}
        others |= {"latents": latents, "workers": workers}
        given = [f"--{name}" for name, value in others.items() if value is not None]
        if out or given:
            raise InputError(f"--check takes only the cache to check, not {out or given[0]} too")
        path = Path(source).expanduser()
        _check(open_cache(path))
        return path
    if out is None or out.suffix.lower() != SUFFIX:
        raise InputError(f"name the file to write, which ends in {SUFFIX}: ldae cache SOURCE OUT")
    if not latents:
        if device:
            raise InputError("--device is where latents are computed, and --latents is not set")
        crop = CropTransform(256 if side is None else side, 3 if in_chans is None else in_chans)
        content = Content.crops(crop.img_size, crop.in_chans)
        write_cache(_open_splits(source, split), out, crop, content, workers, bad_images)
        return out
    if (side, in_chans, split) != (None, None, None):
        raise InputError(
            "--side, --in-chans and --split cannot be set beside --latents, which are of the "
            "training images as the tokenizer takes them"
        )
    encoder = _open_encoder(Path(latents).expanduser(), device or "auto")
    sources = _open_splits(source, "train", from_cache=True)
    (images,) = sources.values()
    content = encoder.content(images.resizes_twice(encoder.crop))
    write_cache(sources, out, encoder.crop, content, workers, bad_images, encoder)
    return out


def write_cache(
    sources: dict[str, Source],
    out: Path,
    crop: CropTransform,
    content: Content,
    workers: int | None,
    bad_images: Literal["stop", "skip"] = "stop",
    convert: Callable[[torch.Tensor], np.ndarray] = torch.Tensor.numpy,
) -> None:
    """Write the images of each split to the cache ``out``, as ``cache`` does.

    Args:
        content: the description of what ``convert`` returns.
        convert: maps crops, uint8 (B, C, H, W), to the rows of the cache.

    Raises: InputError for wrong settings or images, and when the file cannot be written.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    NOT_NEGATIVE.check("workers", workers)
    if out.exists():
        _check_same(open_cache(out), sources, content)
        print(f"{out}: done before")
        return
    with files.report_write_errors(out), _partial(out, sources, content) as (file, partial):
        for name, source in sources.items():
            _fill(file, partial, name, source, crop, convert, workers, bad_images)
    print(f"{out}: {_describe(open_cache(out))}")


def _open_encoder(tokenizer: Path, device: str) -> LatentEncoder:
    path = tokenizer / layout.TOKENIZER if tokenizer.is_dir() else tokenizer
    return LatentEncoder(tokenizers.open_fitted(path), device_for(device))


def _open_splits(
    spec: str, split: Literal["train", "eval"] | None, from_cache: bool = False
) -> dict[str, Source]:
    """Open the splits of a source, or only ``split``.

    Raises: InputError when it is missing, and for a cache unless ``from_cache``.
    """
    sources = open_all(spec, split)
    if not from_cache and any(isinstance(opened, CachedSource) for opened in sources.values()):
        raise InputError(f"{spec} is a cache: name the source that it was written from")
    return sources


@contextmanager
def _partial(
    out: Path, sources: dict[str, Source], content: Content
) -> Iterator[tuple[BinaryIO, CacheFile]]:
    """Open or begin the file that becomes ``out`` at the end, and keep other processes out.

    Raises: InputError when it was begun for other images or content, or the disk has no room.
    """
    with open_partial(out) as file:
        if not has_index(file):
            write_index(file, sources, content)
        partial = CacheFile(file)
        _check_same(partial, sources, content)
        status = os.fstat(file.fileno())
        files.check_room(out, status.st_size - 512 * status.st_blocks)
        yield file, partial
        files.publish(file, out)


def _check_same(held: CacheFile, sources: dict[str, Source], content: Content) -> None:
    """Check that a cache is of these images and content.

    Raises: InputError with the difference.
    """
    if held.content.array != content.array:
        raise InputError(
            f"{held.path} holds {held.content.array}, not {content.array}: delete it or name "
            "another file"
        )
    there, here = (
        {"split": " and ".join(splits), **facts}
        for splits, facts in ((held.splits, held.content.facts), (sources, content.facts))
    )
    for name in here:
        if there[name] != here[name]:
            noun = "crops" if content.array == "images" else content.array
            raise InputError(
                f"{held.path} holds other {noun}: {name} is {there[name]} there, {here[name]} "
                "here; delete it or name another file"
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
    convert: Callable[[torch.Tensor], np.ndarray],
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
            bad, first = batch.targets.byte().numpy(), int(batch.positions[0])
            partial.write_block(file, split, first, bad, convert(batch.images))
            bar.update(len(bad))


def _check(held: CacheFile) -> None:
    """Compare a cache with its checksums. Raises: InputError naming the part that differs."""
    for split, arrays in held.arrays.items():
        damaged = f"{held.path} is damaged and must be written again: the checksum differs for"
        if not held.index_is_whole(split):
            raise InputError(f"{damaged} names and labels of {split}")
        with progress(len(arrays["bad"]), f"check {split}") as bar:
            for block, is_whole in enumerate(held.whole_blocks(split)):
                if not is_whole:
                    first = BLOCK * block
                    last = min(first + BLOCK, len(arrays["bad"])) - 1
                    raise InputError(f"{damaged} images {first} to {last} of {split}")
                bar.update(BLOCK)
    print(f"{held.path}: {_describe(held)}, all as they were written")


def _describe(held: CacheFile) -> str:
    counts = " and ".join(
        f"{len(arrays['bad']):,} {held.content.array}" + (f" ({split})" if split != "all" else "")
        for split, arrays in held.arrays.items()
    )
    shape = " x ".join(map(str, held.content.shape))
    bad = sum(int(arrays["bad"].sum()) for arrays in held.arrays.values())
    return f"{counts} of {shape}, {files.format_size(held.path.stat().st_size)}" + (
        f", {bad} bad" if bad else ""
    )
