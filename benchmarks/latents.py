"""Compare latent scales and dimensions of l-DAE: one run and one linear probe each, equal budgets.

python benchmarks/latents.py --data SOURCE --eval-data SOURCE --runs runs/latents

The table in --out is written after every run. Run this command again to resume.
"""

import argparse
from pathlib import Path

import ldae
from ldae.commands.linear import CachedProtocol, linear
from ldae.commands.pretrain import pretrain
from ldae.evals.evaluation import Setup
from ldae.files import write_json
from ldae.runs.environment import environment
from ldae.tree import replace

DIM = 12
GRID = [
    *({"tokenizer.scale": scale, "tokenizer.dim": DIM} for scale in ("per-axis", "raw", "global")),
    *({"tokenizer.scale": "per-axis", "tokenizer.dim": dim} for dim in (8, 24, 4, 16, 48)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cifar10-latents.json"))
    parser.add_argument("--epochs", type=float, default=1.2)
    parser.add_argument("--blr", type=float, default=2e-3)
    args = parser.parse_args()

    setup = Setup(workers=0, precision="bf16")
    rows = []
    for changes in GRID:
        config = replace(
            ldae.config("l_dae", scale="demo"),
            {
                "data.source": args.data,
                "optim.epochs": args.epochs,
                "optim.blr": args.blr,
                "system.workers": 0,
            }
            | changes,
        )
        run = args.runs / "-".join(str(value) for value in changes.values())
        pretrain(config, run, "l_dae")
        data = (args.data, args.eval_data)
        result = linear(str(run), *data, protocol=CachedProtocol(epochs=20), setup=setup)["results"]
        rows.append(changes | {"top1": round(result["top1"], 2), "rate": result["learning_rate"]})
        print(f"{changes}: {result['top1']:.2f}", flush=True)
        write_json(
            args.out,
            {
                "what": "l_dae, ViT of width 128 with 2 + 2 blocks, patch 4; linear probe, top-1",
                "images_seen": round(args.epochs * 50_000),
                "blr": args.blr,
                "rows": rows,
                "environment": environment(),
            },
        )


if __name__ == "__main__":
    main()
