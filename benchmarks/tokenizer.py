"""Compare streaming PCA of patches with scikit-learn's IncrementalPCA: time, peak memory, angle.

python benchmarks/tokenizer.py [--small SOURCE] [--large SOURCE] [--out FILE]

Each fit runs in its own process on the same uint8 images, streamed from one file. The angle is the
largest between a kept axis and the same axis of a full eigendecomposition in float64.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import IncrementalPCA

from ldae.data.open import open_source
from ldae.data.photos import write_photos
from ldae.data.transforms import CropTransform
from ldae.files import write_json
from ldae.patches import patchify
from ldae.runs.environment import environment
from ldae.tokenizers import PatchPCA

# D -> (pixels of an image, of a patch, kept axes, images)
SIZES = {48: (32, 4, 12, 20_000), 768: (224, 16, 32, 1_000)}
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", default="scattered-digits:20000", help="images for D = 48")
    parser.add_argument("--large", default="", help="images for D = 768; empty: drawn photographs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/tokenizer.json"))
    parser.add_argument("--fit", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fit:
        fit(*args.fit)
        return

    results = {}
    for dim, spec in ((48, args.small), (768, args.large)):
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder, "images.npy")
            count = save_images(spec, dim, images)
            rounds: dict[str, list[dict]] = {"streaming": [], "incremental": []}
            for number in range(args.rounds + 1):
                for method in rounds:
                    out = Path(folder, f"{method}.npy")
                    words = ["--fit", method, str(dim), str(images), str(out)]
                    command = [sys.executable, __file__, *words]
                    output = subprocess.check_output(command, text=True)
                    if number:  # the first round is burn-in
                        rounds[method].append(json.loads(output))
                    print(dim, method, output.strip(), flush=True)
            reference = full_axes(dim, np.load(images, mmap_mode="r"))
            rows = {}
            for method, fits in rounds.items():
                axes = np.load(Path(folder, f"{method}.npy"))
                medians = {
                    key: round(statistics.median(fit[key] for fit in fits), 4) for key in fits[0]
                }
                rows[method] = medians | {"largest_angle_rad": largest_angle(axes, reference)}
            results[f"D={dim}"] = rows | {
                "images": count,
                "patches": count * (SIZES[dim][0] // SIZES[dim][1]) ** 2,
                "kept_axes": SIZES[dim][2],
                "times_faster": round(
                    rows["incremental"]["seconds"] / rows["streaming"]["seconds"], 2
                ),
                "data": spec or "drawn photographs",
            }
    write_json(args.out, results | {"rounds": args.rounds, "environment": environment()})


def save_images(spec: str, dim: int, path: Path) -> int:
    size, _, _, count = SIZES[dim]
    if not spec:
        write_photos(path.with_name("photos"), count)
        spec = str(path.with_name("photos"))
    source, transform = open_source(spec, "train"), CropTransform(size)
    chosen = np.random.default_rng(0).permutation(len(source))[:count]
    np.save(path, np.stack([transform(source.image(int(i)), None).numpy() for i in chosen]))
    return len(chosen)


def stream(images: np.ndarray) -> Iterator[torch.Tensor]:
    for start in range(0, len(images), BATCH):
        yield torch.from_numpy(images[start : start + BATCH].copy())


def patches_of(images: np.ndarray, patch: int) -> Iterator[np.ndarray]:
    for batch in stream(images):
        yield patchify(batch.float() / 255, patch).flatten(0, 1).numpy()


def fit(method: str, dim: str, path: str, out: str) -> None:
    """Fit in this process, print seconds and additional peak memory, and save the axes."""
    size, patch, kept, _ = SIZES[int(dim)]
    images = np.load(path, mmap_mode="r")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if method == "streaming":
        tokenizer = PatchPCA(size, patch, 3, kept, "raw")
        tokenizer.fit(stream(images), (0.0,) * 3, (1.0,) * 3)
        axes = tokenizer.basis[:kept].numpy()
    else:
        pca = IncrementalPCA(n_components=None)
        rows = 5 * int(dim)  # its default batch
        waiting: list[np.ndarray] = []
        for block in patches_of(images, patch):
            waiting.append(block)
            if sum(map(len, waiting)) >= rows:
                vectors = np.concatenate(waiting)
                for first in range(0, len(vectors) - rows + 1, rows):
                    pca.partial_fit(vectors[first : first + rows])
                waiting = [vectors[len(vectors) // rows * rows :]]
        axes = pca.components_[:kept]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.save(out, axes)
    print(json.dumps({"seconds": seconds, "peak_mib": (peak - before) / 1024}))


def full_axes(dim: int, images: np.ndarray) -> np.ndarray:
    """Return the kept axes of a full eigendecomposition, by numpy in two passes in float64."""
    _, patch, kept, _ = SIZES[dim]
    total, count = np.zeros(dim), 0
    for block in patches_of(images, patch):
        total += block.sum(0, dtype=np.float64)
        count += len(block)
    mean, covariance = total / count, np.zeros((dim, dim))
    for block in patches_of(images, patch):
        centred = block.astype(np.float64) - mean
        covariance += centred.T @ centred
    return np.linalg.eigh(covariance / count)[1].T[::-1][:kept]


def largest_angle(axes: np.ndarray, reference: np.ndarray) -> float:
    """Return the largest angle in radians between axes of the same rank, whatever their signs."""
    axes = axes.astype(np.float64)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    cosines = (axes * reference).sum(1, keepdims=True)
    # Half of the chord is the sine of half the angle. It is exact where the cosine rounds to 1.
    chords = np.linalg.norm(axes * np.sign(cosines) - reference, axis=1)
    return float(2 * np.arcsin(chords.max() / 2))


if __name__ == "__main__":
    main()
