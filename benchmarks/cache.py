"""Measure the images per second of ``train_batches`` from the same JPEGs in four places.

python benchmarks/cache.py

They are files of a folder, samples of .tar shards, rows of parquet files, and decoded in a cache.
The images are 500 x 375, of gradients and noise in several frequencies; the crop is at the center.
"""

import argparse
import itertools
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow
from pyarrow import parquet

from ldae.commands.cache import cache
from ldae.data.loader import train_batches
from ldae.data.open import open_source
from ldae.data.photos import HEIGHT, WIDTH, write_photos
from ldae.data.transforms import CropTransform
from ldae.files import write_json
from ldae.runs.environment import environment

BATCH = 128
ROWS_OF_A_GROUP = 100  # as the Hugging Face hub has them
FILES = 2  # of the shards, and of the parquet files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/cache.json"))
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder, file = Path(temporary, "folder"), Path(temporary, "cache.safetensors")
        size = write_photos(folder, args.images)
        shards, tables = Path(temporary, "shards"), Path(temporary, "parquet")
        write_shards(folder, shards)
        write_parquet(folder, tables)
        begun = time.perf_counter()
        cache(str(folder), file, side=args.side, workers=args.workers)
        seconds = time.perf_counter() - begun
        epochs = {str(folder): 1, str(shards): 1, str(tables): 1, str(file): 20}  # of each turn
        rates = {spec: [] for spec in epochs}
        for spec in [*epochs] * args.turns:
            rates[spec].append(rate(spec, args, epochs[spec]))
            print(f"{Path(spec).stem}: {rates[spec][-1]:,.0f} images/s", flush=True)
    medians = {Path(spec).stem: statistics.median(found) for spec, found in rates.items()}
    times = medians["cache"] / medians["folder"]
    write_json(
        args.out,
        {
            "what": f"images/s of train_batches, center crop at {args.side}, batch {BATCH}",
            "images": f"{args.images} JPEGs of {WIDTH} x {HEIGHT}, {size / 1e3:.0f} kB on average",
            "workers": args.workers,
            "turns": {
                Path(spec).stem: [round(r, 1) for r in found] for spec, found in rates.items()
            },
            **{name: round(median, 1) for name, median in medians.items()},
            "times": round(times, 1),
            "seconds_to_write": round(seconds, 1),
            "environment": environment(),
        },
    )
    print(f"{args.out}: {times:.1f} times")


def write_shards(folder: Path, out: Path) -> None:
    """Write the images of a folder into shards in webdataset's layout."""
    out.mkdir()
    for number in range(FILES):
        with tarfile.open(out / f"{number:04d}.tar", "w") as shard:
            for path in sorted(folder.glob("*/*.jpg"))[number::FILES]:
                shard.add(path, path.name)


def write_parquet(folder: Path, out: Path) -> None:
    """Write the images of a folder into parquet files in the layout of the Hugging Face hub."""
    out.mkdir()
    for number in range(FILES):
        paths = sorted(folder.glob("*/*.jpg"))[number::FILES]
        images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
        parquet.write_table(
            pyarrow.table({"image": images}),
            out / f"{number:04d}.parquet",
            row_group_size=ROWS_OF_A_GROUP,
        )


def rate(spec: str, args: argparse.Namespace, epochs: int) -> float:
    """Return images per second, after the workers have started."""
    source = open_source(spec, "train")
    batches = train_batches(
        source,
        CropTransform(args.side),
        seed=0,
        start=0,
        batch_size=BATCH,
        workers=args.workers,
    )
    for _ in itertools.islice(batches, 4):
        pass
    count = max(epochs * args.images // BATCH, 1)
    begun = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    seconds = time.perf_counter() - begun
    batches.close()
    return count * BATCH / seconds


if __name__ == "__main__":
    main()
