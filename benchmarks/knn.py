"""Compare exact k-NN: ours, a blocked torch matmul and topk, and scikit-learn's brute force.

python benchmarks/knn.py [--train N] [--queries N] [--dim D] [--k K] [--threads N]

The features are random unit vectors on the CPU. Each search runs in its own process, which gives
its own peak memory above the features. Ours also runs on half of the queries; its memory should not
depend on their number.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from ldae.data.workers import available_cpus
from ldae.evals.features import Features
from ldae.evals.neighbours import QUERIES_AT_ONCE, Bank
from ldae.files import write_json
from ldae.runs.environment import environment

CPU = torch.device("cpu")


def features(count: int, dim: int, seed: int) -> torch.Tensor:
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return rows.div_(
        rows.norm(dim=1, keepdim=True)
    )  # in place: the features are the peak before the search


def ours(train: torch.Tensor, queries: torch.Tensor, k: int) -> Iterable[torch.Tensor]:
    shares = (Features(rows, torch.zeros(len(rows))) for rows in (train, queries))
    bank = Bank(next(shares), CPU)
    return (found.indices for found in bank.nearest(next(shares), k))


def blocked_torch(train: torch.Tensor, queries: torch.Tensor, k: int) -> Iterable[torch.Tensor]:
    return ((block @ train.T).topk(k).indices for block in queries.split(QUERIES_AT_ONCE))


def scikit_learn(train: torch.Tensor, queries: torch.Tensor, k: int) -> Iterable[torch.Tensor]:
    # Euclidean distance orders unit vectors as the cosine does.
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(train.numpy())
    return [torch.from_numpy(index.kneighbors(queries.numpy(), return_distance=False))]


SEARCHES = {search.__name__: search for search in (ours, blocked_torch, scikit_learn)}


def measure(name: str, train: int, queries: int, dim: int, k: int, rounds: int) -> dict:
    """Return the seconds of the fastest round, the peak memory, and the sum of all indices."""
    bank, vectors = features(train, dim, 0), features(queries, dim, 1)

    def search(bank: torch.Tensor, vectors: torch.Tensor) -> int:
        return sum(int(indices.sum()) for indices in SEARCHES[name](bank, vectors, k))

    search(bank[: 8 * k], vectors[:8])  # imports, threads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        total = search(bank, vectors)
        seconds.append(time.perf_counter() - start)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": round(min(seconds), 3), "mib": round(memory, 1), "sum_of_numbers": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/knn.json"))
    parser.add_argument("--search", choices=SEARCHES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.search:
        sizes = (args.train, args.queries, args.dim, args.k, args.rounds)
        print(json.dumps(measure(args.search, *sizes)))
        return

    def run_process(search: str, queries: int) -> dict:
        sizes = {**vars(args), "queries": queries, "search": search}
        options = [f"--{name}={sizes[name]}" for name in ("train", "queries", "dim", "k", "rounds")]
        command = [sys.executable, __file__, *options, f"--search={search}"]
        threads = {"OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    torch.set_num_threads(args.threads)  # for the record
    searches = {name: run_process(name, args.queries) for name in SEARCHES}
    half = run_process("ours", args.queries // 2)
    sums = [result.pop("sum_of_numbers") for result in (*searches.values(), half)][:-1]
    record = {
        "what": "exact k nearest neighbours of random features on the CPU",
        **{name: getattr(args, name) for name in ("train", "queries", "dim", "k", "threads")},
        "searches": searches,
        "ours_on_half_of_the_queries": half,
        # Rounding decides between images of nearly equal similarity.
        "relative_difference_of_what_is_found": (max(sums) - min(sums)) / min(sums),
        "ratios": {
            f"{name} over ours": round(searches[name]["seconds"] / searches["ours"]["seconds"], 2)
            for name in ("blocked_torch", "scikit_learn")
        },
        "environment": environment(CPU),
    }
    write_json(args.out, record)
    print(searches, "half:", half, record["ratios"])


if __name__ == "__main__":
    main()
