"""What exact k-NN costs: ours, a blocked torch matmul and topk, and scikit-learn's brute force.

python benchmarks/knn.py [--train N] [--queries N] [--dim D] [--k K] [--threads N]

Random unit features on the CPU. Each search runs in a process of its own, so that its peak memory is
its own: what it holds above the features. Ours also runs on half of the queries, with which its
memory should not shrink.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from ldae.evals.features import Features
from ldae.evals.neighbours import QUERIES_AT_ONCE, Bank
from ldae.files import write_json
from ldae.runs.environment import environment

CPU = torch.device("cpu")


def features(count: int, dim: int, seed: int) -> torch.Tensor:
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return rows.div_(rows.norm(dim=1, keepdim=True))  # in place: the peak before is what is held


def ours(train: torch.Tensor, queries: torch.Tensor, k: int) -> Iterable[torch.Tensor]:
    shares = (Features(rows, torch.zeros(len(rows)), []) for rows in (train, queries))
    bank = Bank(next(shares), CPU)
    return (found.indices for found in bank.nearest(next(shares), k))


def blocked_torch(train: torch.Tensor, queries: torch.Tensor, k: int) -> Iterable[torch.Tensor]:
    return ((block @ train.T).topk(k).indices for block in queries.split(QUERIES_AT_ONCE))


def scikit_learn(train: torch.Tensor, queries: torch.Tensor, k: int) -> Iterable[torch.Tensor]:
    """By Euclidean distance, which orders unit vectors as the cosine does."""
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(train.numpy())
    return [torch.from_numpy(index.kneighbors(queries.numpy(), return_distance=False))]


SEARCHES = {search.__name__: search for search in (ours, blocked_torch, scikit_learn)}


def measure(name: str, train: int, queries: int, dim: int, k: int, rounds: int) -> dict:
    """Seconds of the fastest round, MiB of peak memory above the features, and a sum over what is found."""
    bank, asked = features(train, dim, 0), features(queries, dim, 1)

    def search(bank: torch.Tensor, asked: torch.Tensor) -> int:
        return sum(int(numbers.sum()) for numbers in SEARCHES[name](bank, asked, k))

    search(bank[: 8 * k], asked[:8])  # imports, threads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        found = search(bank, asked)
        seconds.append(time.perf_counter() - start)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": round(min(seconds), 3), "mib": round(memory, 1), "sum_of_numbers": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/knn.json"))
    parser.add_argument("--search", choices=SEARCHES, help="this one alone, here")
    asked = parser.parse_args()
    if asked.search:
        sizes = (asked.train, asked.queries, asked.dim, asked.k, asked.rounds)
        print(json.dumps(measure(asked.search, *sizes)))
        return

    def apart(search: str, queries: int) -> dict:
        sizes = {**vars(asked), "queries": queries, "search": search}
        options = [f"--{name}={sizes[name]}" for name in ("train", "queries", "dim", "k", "rounds")]
        command = [sys.executable, __file__, *options, f"--search={search}"]
        threads = {"OMP_NUM_THREADS": str(asked.threads)}
        with tempfile.TemporaryFile("w+") as told:
            subprocess.run(command, env=os.environ | threads, stdout=told, check=True)
            told.seek(0)
            return json.loads(told.read())

    torch.set_num_threads(asked.threads)  # for the record
    found = {name: apart(name, asked.queries) for name in SEARCHES}
    half = apart("ours", asked.queries // 2)
    sums = [one.pop("sum_of_numbers") for one in (*found.values(), half)][:-1]
    record = {
        "what": "exact k nearest neighbours of random features on the CPU",
        **{name: getattr(asked, name) for name in ("train", "queries", "dim", "k", "threads")},
        "searches": found,
        "ours_on_half_of_the_queries": half,
        # Rounding decides between images that are nearly as similar.
        "relative_difference_of_what_is_found": (max(sums) - min(sums)) / min(sums),
        "ratios": {
            f"{name} over ours": round(found[name]["seconds"] / found["ours"]["seconds"], 2)
            for name in ("blocked_torch", "scikit_learn")
        },
        "environment": environment(CPU),
    }
    write_json(asked.out, record)
    print(found, "half:", half, record["ratios"])


if __name__ == "__main__":
    main()
