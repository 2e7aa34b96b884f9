r"""Every row of the trajectory, and those beside it, on one data set at one small budget.

python benchmarks/rows.py --data SOURCE [--eval-data SOURCE] --perceptual-net SPEC [--rows ROW ...] \
    [settings of ldae pretrain, such as --model.depth 2]

For each row: its tokenizer (rows with the same one share it), pre-training, linear probe, and a grid
of samples. All is done by the commands that a user would type; they are printed, and what
is finished is skipped, so the same command goes on where it stopped. The records of every row go to
--out, and table.json and table.md collect them.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import ldae
from ldae import trajectory
from ldae.files import write, write_json
from ldae.runs.environment import environment

_COPIED = ("config.yaml", "environment.json", "metrics.jsonl")
_NAMES = [row.name for row in (*trajectory.ROWS, *trajectory.BESIDE)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data")
    parser.add_argument(
        "--perceptual-net", required=True, help="spec of the features for LPIPS' place"
    )
    parser.add_argument("--rows", nargs="+", default=_NAMES, choices=_NAMES, metavar="ROW")
    parser.add_argument("--scale", default="small")
    parser.add_argument("--probe-epochs", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=Path("runs/rows"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rows"))
    asked, settings = parser.parse_known_args()
    for name in asked.rows:
        run_row(name, asked, settings)
        collect(name, asked)
    write_table(asked)


def run_row(name: str, asked: argparse.Namespace, settings: list[str]) -> None:
    config = ldae.config(name, asked.scale)
    splits = ["--data", asked.data, *(["--eval-data", asked.eval_data] if asked.eval_data else [])]
    settings = [*splits, *settings]
    if config.tokenizer.perceptual_weight:
        settings += ["--tokenizer.perceptual-net", asked.perceptual_net]
    fit = asked.runs / "tokenizers" / tokenizer_name(name, asked.scale)
    run = asked.runs / name
    scale = ["--scale", asked.scale]
    ldae_("fit-tokenizer", name, *scale, *settings, "--run", fit)
    tokenizer = ["--tokenizer.path", fit / "tokenizer.safetensors"]
    ldae_("pretrain", name, *scale, *settings, *tokenizer, "--run", run)
    linear = run / "evals" / "linear"
    if not (linear / "results.json").exists():
        ldae_("linear", run, *splits, "--epochs", asked.probe_epochs, "--out", linear)
    if not list(run.glob("samples/*.png")):
        ldae_("sample", run)


def ldae_(*words: object) -> None:
    """One command of the package; this process stops with it when it fails."""
    command = [str(word) for word in words]
    print("\n$ ldae", *command, flush=True)
    subprocess.run([sys.executable, "-m", "ldae", *command], check=True)


def tokenizer_name(name: str, scale: str) -> str:
    """The first row that has the same tokenizer."""
    wanted = ldae.config(name, scale).tokenizer
    return next(row for row in _NAMES if ldae.config(row, scale).tokenizer == wanted)


def collect(name: str, asked: argparse.Namespace) -> None:
    """Copy the records of a row, without its weights and pictures."""
    run, out = asked.runs / name, asked.out / name
    out.mkdir(parents=True, exist_ok=True)
    for file in _COPIED:
        shutil.copyfile(run / file, out / file)
    shutil.copyfile(run / "evals" / "linear" / "results.json", out / "linear.json")
    fit = asked.runs / "tokenizers" / tokenizer_name(name, asked.scale)
    shutil.copyfile(fit / "reconstruction.json", out / "reconstruction.json")


def write_table(asked: argparse.Namespace) -> None:
    """What has been measured so far, in the order of the trajectory."""
    table = []
    for row in (*trajectory.ROWS, *trajectory.BESIDE):
        out = asked.out / row.name
        if not (out / "reconstruction.json").exists():
            continue
        linear = json.loads((out / "linear.json").read_text())
        reconstruction = json.loads((out / "reconstruction.json").read_text())
        table.append(
            {
                "row": row.number,
                "name": row.name,
                "published": row.accuracy,
                "linear": linear["results"]["top1"],
                "psnr": reconstruction["results"]["psnr"],
            }
        )
    write_json(asked.out / "table.json", {"rows": table, "environment": environment()})
    lines = [
        "| # | row | reconstruction, dB | linear probe | published (ImageNet) |",
        "|---|---|---|---|---|",
    ]
    for line in table:
        lines.append(
            f"| {line['row'] or ''} | {line['name']} | {line['psnr']:.1f} "
            f"| {line['linear']:.1f} | {line['published'] or ''} |"
        )
    write(asked.out / "table.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
