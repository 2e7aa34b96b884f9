"""Latent scale and latent dimension of l-DAE at equal budget: one run and one linear probe each.

python benchmarks/latents.py --data cifar10_train.zip --eval-data cifar10_test.zip --runs runs/latents

Goes on where it stopped, and writes the table to --out after every run.
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
    arguments = parser.parse_args()

    setup = Setup(workers=0, precision="bf16")
    rows = []
    for changes in GRID:
        config = replace(
            ldae.config("l_dae", scale="demo"),
            {
                "data.source": arguments.data,
                "optim.epochs": arguments.epochs,
                "optim.blr": arguments.blr,
                "system.workers": 0,
            }
            | changes,
        )
        run = arguments.runs / "-".join(str(value) for value in changes.values())
        pretrain(config, run, "l_dae")
        data = (arguments.data, arguments.eval_data)
        result = linear(str(run), *data, protocol=CachedProtocol(epochs=20), setup=setup)["results"]
        rows.append(changes | {"top1": round(result["top1"], 2), "rate": result["learning_rate"]})
        print(f"{changes}: {result['top1']:.2f}", flush=True)
        write_json(
            arguments.out,
            {
                "what": "l_dae, ViT of width 128 with 2 + 2 blocks, patch 4; linear probe, top-1",
                "images_seen": round(arguments.epochs * 50_000),
                "blr": arguments.blr,
                "rows": rows,
                "environment": environment(),
            },
        )


if __name__ == "__main__":
    main()
