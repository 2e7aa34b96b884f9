"""Measure the images per second of ``train_batches`` from a folder of JPEGs and from its cache.

python benchmarks/cache.py

The images are 500 x 375, of gradients and noise in several frequencies; the crop is at the center.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

from ldae.commands.cache import cache
from ldae.data.loader import train_batches
from ldae.data.open import open_source
from ldae.data.photos import HEIGHT, WIDTH, write_photos
from ldae.data.transforms import CropTransform
from ldae.files import write_json
from ldae.runs.environment import environment

BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/cache.json"))
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder, file = Path(temporary, "folder"), Path(temporary, "images.safetensors")
        size = write_photos(folder, args.images)
        begun = time.perf_counter()
        cache(str(folder), file, side=args.side, workers=args.workers)
        seconds = time.perf_counter() - begun
        epochs = {str(folder): 1, str(file): 20}  # of each turn
        rates = {spec: [] for spec in epochs}
        for spec in [*epochs] * args.turns:
            rates[spec].append(rate(spec, args, epochs[spec]))
            print(f"{Path(spec).name}: {rates[spec][-1]:,.0f} images/s", flush=True)
    medians = {Path(spec).name: statistics.median(found) for spec, found in rates.items()}
    slow, fast = medians.values()
    write_json(
        args.out,
        {
            "what": f"images/s of train_batches, center crop at {args.side}, batch {BATCH}",
            "images": f"{args.images} JPEGs of {WIDTH} x {HEIGHT}, {size / 1e3:.0f} kB on average",
            "workers": args.workers,
            "turns": {
                Path(spec).name: [round(r, 1) for r in found] for spec, found in rates.items()
            },
            "folder": round(slow, 1),
            "cache": round(fast, 1),
            "times": round(fast / slow, 1),
            "seconds_to_write": round(seconds, 1),
            "environment": environment(),
        },
    )
    print(f"{args.out}: {fast / slow:.1f} times")


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
