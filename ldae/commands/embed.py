"""``ldae embed``: write the features of a backbone to a file that numpy or parquet opens."""

import math
import shutil
import signal
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from ldae import files
from ldae.backbones.whitening import SHRINKAGE
from ldae.console import print_main
from ldae.data.open import check_outside, open_all
from ldae.data.source import Source
from ldae.devices import device_for
from ldae.distributed import (
    all_reduce_sum,
    barrier,
    gather_values,
    is_main,
    process_group,
    rank,
    world_size,
)
from ldae.errors import InputError
from ldae.evals.embedded_file import (
    FILES,
    FORMAT,
    IDENTITY,
    VERSION,
    blocks_of,
    first_difference,
    import_parquet,
    is_embedded,
    open_embedded,
)
from ldae.evals.embedding import (
    Rows,
    open_rows,
    parts_of,
    rows_at_once,
    whitening_of_rows,
    write_npy,
    write_parquet,
)
from ldae.evals.evaluation import BackboneSpec, EncoderSetup, describe_backbone
from ldae.evals.features import Encoder, gather_rows
from ldae.evals.open import open_backbone
from ldae.evals.segmentation import SegmentProtocol
from ldae.evals.taps import Pool, Tap, TapReader, TokenMapReader, taps_of
from ldae.evals.whitening import WhiteningProtocol
from ldae.runs.environment import environment
from ldae.train.interrupt import Interrupted, StopRequest
from ldae.tree import AnyPath

Images = Annotated[
    AnyPath, tyro.conf.arg(metavar="SOURCE", help="The images, with labels or without.")
]


def embed(
    backbone: BackboneSpec,
    source: Images,
    /,
    *,
    out: AnyPath,
    split: Literal["train", "eval"] | None = None,
    tokens: bool = False,
    blocks: tuple[int, ...] = (),
    pools: tuple[Pool, ...] | None = None,
    whiten: bool = False,
    whiten_shrinkage: float = SHRINKAGE,
    setup: EncoderSetup = EncoderSetup(),
) -> Path:
    """Write the features of all images of SOURCE to a file: a row for each image, in float32.

    numpy.load opens a .npy file. Beside it lie a .csv file with the name, split, label and class of
    each row, and a .json file that says which weights and images the rows are from. A .parquet file
    holds all of this. The rows are those of ldae knn. The same command resumes, and ldae knn,
    linear, logreg and retrieve take the file in the place of the backbone.

    Args:
        out: the file to write, which ends in .npy or .parquet.
        split: embed only this split; by default all splits of SOURCE, one after another.
        tokens: write the token map of each image, (h, w, D), in place of a vector.
        blocks: blocks or stages, counted from 0, or from the end if negative; their features come
            side by side in place of the model's own output.
        pools: poolings at each block; by default the model's own, or avg if blocks are given.
        whiten: whiten features by the mean and covariance of the images: of the train split if
            there is one.
        whiten_shrinkage: as in ldae knn.

    Returns: ``out``.

    Raises: InputError for a backbone, images or settings that do not fit, for a file that holds
        other features or would lie among the images, and when the disk is full; Interrupted after a
        stop signal.

    Examples:
        >>> path = ldae.embed("runs/l_dae", "/data/imagenet", out="features.npy")
        >>> features = numpy.load(path)  # float32 (images, D)
    """
    backbone, source = str(backbone), str(source)
    out, taps = Path(out).expanduser(), taps_of(blocks, pools)
    WhiteningProtocol(whiten, whiten_shrinkage)  # checks the shrinkage
    if is_embedded(backbone):
        raise InputError(f"{backbone} holds features already: name the backbone")
    if tokens and (taps != (Tap(),) or whiten):
        raise InputError("--tokens are those of the last block: leave out blocks, pools and whiten")
    if out.suffix not in FILES:
        raise InputError(f"--out {out} must end in {' or '.join(FILES)}")
    if out.suffix == ".parquet":
        import_parquet(out)  # before the work
    files.check_writable(out.parent)
    device = device_for(setup.device)
    with process_group(device):
        sources = open_all(source, split)
        for part in sources.values():
            check_outside(out, part, "--out")
        encoder = _encoder(backbone, setup, taps, tokens, device)
        record = _record(backbone, source, setup, encoder, sources)
        whitening = _whitening_record(sources, whiten_shrinkage) if whiten else None
        rows = blocks_of([len(part) for part in sources.values()], _images_a_block(encoder))
        shape = tuple(record["features"]["shape"])
        if gather_values(is_main() and _is_done(out, record, whitening))[0]:
            print_main(f"{out}: done before")
            return out
        is_copied = whiten or out.suffix == ".parquet"
        opened = open_rows(out, record, rows, shape, is_copied) if is_main() else nullcontext()
        with files.report_write_errors(out), opened as written:
            _extract(encoder, sources, rows, written)
            if written:
                _finish(out, written, record, whitening, sources)
        barrier()
        size = " x ".join(map(str, shape))
        print_main(f"{out}: features of {rows[-1].stop:,} images, {size} each")
    return out


def _encoder(
    backbone: str, setup: EncoderSetup, taps: tuple[Tap, ...], tokens: bool, device: torch.device
) -> Encoder:
    """Open the backbone, and return it with the reader of its taps or of its token map.

    Raises: InputError when the backbone lacks a tap or a token map.
    """
    model = open_backbone(backbone, setup)
    reader = (
        TokenMapReader(model, SegmentProtocol.pixel_patch) if tokens else TapReader(model, taps)
    )
    encoder = Encoder(
        model,
        device,
        setup.precision,
        reader=reader,
        batch_size=setup.batch_size,
        workers=setup.workers,
    )
    _ = encoder.columns  # checks the taps, or the token map
    return encoder


def _images_a_block(encoder: Encoder) -> int:
    """Return the images of a batch of all ranks, whose features are written together."""
    return encoder.batch_size * world_size()


def _record(
    backbone: str,
    source: str,
    setup: EncoderSetup,
    encoder: Encoder,
    sources: Mapping[str, Source],
) -> dict:
    """Return what decides the rows before they are whitened, as JSON reads it back."""
    model, reader = encoder.model, encoder.reader
    depth = len(getattr(model, "feature_info", ()))
    is_map = isinstance(reader, TokenMapReader)
    taps = [
        {
            "block": tap.block if tap.block is None else tap.block % depth,
            "pool": tap.pool,
            "columns": [columns.start, columns.stop],
        }
        for tap, columns in ({} if is_map else encoder.columns).items()
    ]
    record = {
        "backbone": describe_backbone(str(backbone), model, setup, encoder.transform),
        "data": {
            "spec": str(source),
            "splits": {
                split: {
                    "images": len(part),
                    "fingerprint": part.fingerprint(),
                    "classes": part.classes,
                    "resized_twice": part.resizes_twice(encoder.transform),
                }
                for split, part in sources.items()
            },
        },
        "features": {
            "shape": reader.shape if is_map else [encoder.dim],
            "depth": depth,
            "taps": taps,
        },
        "extraction": {
            "precision": setup.precision,
            "batch_size": encoder.batch_size,
            "ranks": world_size(),
            "device": encoder.device.type,
        },
    }
    return files.as_json(record)


def _whitening_record(sources: Mapping[str, Source], shrinkage: float) -> dict:
    split, source = next(iter(sources.items()))
    images = {"images": len(source), "fingerprint": source.fingerprint()}
    return {"split": split, **images, "shrinkage": shrinkage}


def _with_whitening(record: dict, whitening: dict | None) -> dict:
    return record | {"features": record["features"] | {"whitening": whitening}}


def _is_done(out: Path, record: dict, whitening: dict | None) -> bool:
    """Return whether ``out`` holds these features already.

    Raises: InputError when it, or a file beside it, holds something else.
    """
    begun = parts_of(out).exists()
    if not out.exists():
        if out.suffix == ".npy" and not begun:
            for beside in (".csv", ".json"):
                if (path := out.with_suffix(beside)).exists():
                    raise InputError(f"{path} exists and would be overwritten: name another --out")
        return False
    held = open_embedded(out).record
    here = _with_whitening(record, whitening)
    if found := first_difference({key: held[key] for key in IDENTITY}, here):
        raise InputError(
            "{} holds other features: {} is {} there, {} here; delete it or name another "
            "file".format(out, *found)
        )
    if begun:  # a kill came before its end
        shutil.rmtree(parts_of(out))
    return True


def _extract(
    encoder: Encoder, sources: Mapping[str, Source], blocks: list[range], rows: Rows | None
) -> None:
    """Write the blocks that are not written yet. Only rank 0 has the ``rows``.

    Raises: Interrupted when a rank has got a stop signal.
    """
    begun, total = gather_values(len(rows.checksums) if rows else 0)[0], blocks[-1].stop
    if begun:
        print_main(f"{blocks[begun - 1].stop:,} of {total:,} images are embedded already")
    with StopRequest() as stop:
        for block, mine in zip(blocks[begun:], _shares(encoder, sources, blocks, begun)):
            pieces = _joined(mine, len(block), encoder.device)
            if rows:
                rows.append(piece.reshape(-1, *rows.shape) for piece in pieces)
            else:
                deque(pieces, maxlen=0)
            stopped = torch.tensor(float(stop.received > 0), device=encoder.device)
            if all_reduce_sum(stopped) and block.stop < total:
                raise Interrupted(
                    stop.received or signal.SIGTERM,
                    f"stopped at image {block.stop:,} of {total:,}; all progress is saved, and the "
                    "same command resumes here",
                )


def _shares(
    encoder: Encoder, sources: Mapping[str, Source], blocks: list[range], begun: int
) -> Iterator[torch.Tensor]:
    """Yield this rank's rows (n, D) of each block from number ``begun`` on."""
    first = 0
    for source in sources.values():
        images = range(first, first + len(source))
        first = images.stop
        left = [block for block in blocks[begun:] if block.start in images]
        if not left:
            continue
        rest = np.arange(left[0].start - images.start, len(source))
        with closing(encoder.share(source, rest)) as batches:
            for block in left:
                has_rows = rank() < len(block)
                yield next(batches)[0] if has_rows else torch.empty(0, encoder.dim)


def _joined(mine: torch.Tensor, count: int, device: torch.device) -> Iterator[np.ndarray]:
    """Yield the ``count`` rows of a block of all ranks, in pieces (n, D) that memory holds."""
    # As integers: in floating point, the sum of -0 and the other ranks' 0 is 0, another bit.
    bits, ranks = mine.contiguous().view(torch.int32), world_size()
    step = max(rows_at_once(mine.shape[1:]) // ranks, 1)
    for first in range(0, math.ceil(count / ranks), step):
        size = min(step * ranks, count - first * ranks)
        joined = gather_rows(bits[first : first + step], size, device)
        yield joined.view(torch.float32).numpy()


def _finish(
    out: Path, rows: Rows, record: dict, whitening: dict | None, sources: Mapping[str, Source]
) -> None:
    """Make the file ``out`` of all rows."""
    layer = None
    if whitening:
        layer = whitening_of_rows(rows, range(whitening["images"]), whitening["shrinkage"])
    record = {
        "format": FORMAT,
        "version": VERSION,
        **_with_whitening(record, whitening),
        "environment": environment(record["extraction"]["device"]),
    }
    write = write_npy if out.suffix == ".npy" else write_parquet
    write(out, rows, layer, record, sources)
