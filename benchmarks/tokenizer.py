"""Streaming PCA of patches against scikit-learn's IncrementalPCA: time, peak memory, angle.

python benchmarks/tokenizer.py --small cifar10_train.zip --large imagenette224_train.zip

Each fit runs in a process of its own on the same uint8 images, streamed from one file. The angle is
the largest between a kept axis and the same axis of a full eigendecomposition in float64.
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
    parser.add_argument("--small", help="images for D = 48")
    parser.add_argument("--large", help="images for D = 768")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tokenizer.json"))
    parser.add_argument("--fit", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.fit:
        fit(*asked.fit)
        return

    results = {}
    for dim, spec in ((48, asked.small), (768, asked.large)):
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder, "images.npy")
            count = save_images(spec, dim, images)
            rounds: dict[str, list[dict]] = {"streaming": [], "incremental": []}
            for number in range(asked.rounds + 1):
                for method in rounds:
                    out = Path(folder, f"{method}.npy")
                    command = [
                        sys.executable,
                        __file__,
                        "--fit",
                        method,
                        str(dim),
                        str(images),
                        str(out),
                    ]
                    told = subprocess.run(
                        command, check=True, capture_output=True, text=True
                    ).stdout
                    if number:  # the first round is burn-in
                        rounds[method].append(json.loads(told))
                    print(dim, method, told.strip(), flush=True)
            reference = full_axes(dim, np.load(images, mmap_mode="r"))
            rows = {
                method: {
                    key: round(statistics.median(r[key] for r in found), 4) for key in found[0]
                }
                | {
                    "largest_angle_rad": largest_angle(
                        np.load(Path(folder, f"{method}.npy")), reference
                    )
                }
                for method, found in rounds.items()
            }
            results[f"D={dim}"] = rows | {
                "images": count,
                "patches": count * (SIZES[dim][0] // SIZES[dim][1]) ** 2,
                "kept_axes": SIZES[dim][2],
                "times_faster": round(
                    rows["incremental"]["seconds"] / rows["streaming"]["seconds"], 2
                ),
                "data": spec,
            }
    write_json(asked.out, results | {"rounds": asked.rounds, "environment": environment()})


def save_images(spec: str, dim: int, path: Path) -> int:
    size, _, _, count = SIZES[dim]
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
    """One fit in this process: prints seconds and peak memory beyond the start, saves the axes."""
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
                whole = np.concatenate(waiting)
                for first in range(0, len(whole) - rows + 1, rows):
                    pca.partial_fit(whole[first : first + rows])
                waiting = [whole[len(whole) // rows * rows :]]
        axes = pca.components_[:kept]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.save(out, axes)
    print(json.dumps({"seconds": seconds, "peak_mib": (peak - before) / 1024}))


def full_axes(dim: int, images: np.ndarray) -> np.ndarray:
    """Kept axes of a full eigendecomposition: two passes in float64, by numpy."""
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
    """In radians, between axes of the same rank, whatever their signs."""
    axes = axes.astype(np.float64)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    cosines = np.abs((axes * reference).sum(1)).clip(max=1)
    # Through the sine, which is exact where the cosine is 1 to rounding.
    signs = np.sign((axes * reference).sum(1))[:, None]
    sines = np.linalg.norm(axes * signs - reference, axis=1) / 2
    return float(
        np.where(cosines > 0.7, 2 * np.arcsin(np.clip(sines, 0, 1)), np.arccos(cosines)).max()
    )


if __name__ == "__main__":
    main()
