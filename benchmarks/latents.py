"""Compare latent scales and dimensions of l-DAE: equal budgets, one run each.

python benchmarks/latents.py --data SOURCE --eval-data SOURCE --runs runs/latents

The table in --out is written after every run. Run this command again to resume.
"""

import argparse
from pathlib import Path

import ldae
from ldae.commands.knn import knn
from ldae.commands.linear import CachedProtocol, linear
from ldae.commands.pretrain import pretrain
from ldae.evals.evaluation import Setup
from ldae.evals.neighbours import KNNProtocol
from ldae.files import write_json
from ldae.runs.environment import environment
from ldae.tree import replace

SCALES = ("per-axis", "raw", "global")
DIMS = (8, 24, 4, 16, 48)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cifar10-latents.json"))
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--dim", type=int, default=12, help="d at which the scales are compared")
    parser.add_argument("--dims", type=int, nargs="*", default=DIMS, help="d compared per-axis")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=1.2)
    parser.add_argument("--blr", type=float, default=2e-3)
    args = parser.parse_args()

    cells = [(scale, args.dim) for scale in SCALES] + [("per-axis", dim) for dim in args.dims]
    rows: list[dict] = []
    for seed in range(args.seeds):
        for scale, dim in cells:
            rows.append(measure(args, scale, dim, seed))
            print(rows[-1], flush=True)
            write_json(args.out, record(args, rows))


def measure(args: argparse.Namespace, scale: str, dim: int, seed: int) -> dict:
    """Return the accuracies of a run with this latent, in percent."""
    config = replace(
        ldae.config("l_dae", scale="demo"),
        {
            "data.source": args.data,
            "data.img_size": args.img_size,
            "model.patch_size": args.patch_size,
            "tokenizer.scale": scale,
            "tokenizer.dim": dim,
            "optim.epochs": args.epochs,
            "optim.blr": args.blr,
            "system.workers": 0,
            "seed": seed,
        },
    )
    run = args.runs / f"{scale}-{dim}-seed{seed}"
    pretrain(config, run, "l_dae")
    graded = (str(run), args.data, args.eval_data)
    setup = Setup(workers=0)
    probe = linear(*graded, protocol=CachedProtocol(epochs=20), setup=setup)["results"]
    near = knn(*graded, protocol=KNNProtocol(k=(20,)), setup=setup)["results"]
    return {
        "scale": scale,
        "dim": dim,
        "seed": seed,
        "linear": round(probe["top1"], 2),
        "rate": probe["learning_rate"],
        "knn": round(near["top1_k20"], 2),
    }


def record(args: argparse.Namespace, rows: list[dict]) -> dict:
    return {
        "what": f"l_dae, ViT of width 128 with 2 + 2 blocks, {args.img_size} px, patch "
        f"{args.patch_size}; top-1 of a linear probe and of 20-NN",
        "epochs": args.epochs,
        "blr": args.blr,
        "rows": rows,
        "environment": environment(),
    }


if __name__ == "__main__":
    main()
