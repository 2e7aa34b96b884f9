r"""Run every row of the trajectory, and the rows outside it, on one data set at one small budget.

python benchmarks/rows.py --data SOURCE [--eval-data SOURCE] --perceptual-net SPEC \
    [--rows ROW ...] [settings of ldae pretrain, such as --model.depth 2]

For each row: its tokenizer, which equal rows share, pre-training, a linear probe and a grid of
samples. The commands of all steps are printed. Finished steps are skipped, so run this command
again to resume. The records of every row go to --out, and table.json and table.md collect them.
"""

import argparse
import json
import shutil
from pathlib import Path

import ldae
from benchmarks.command import run_ldae
from ldae import trajectory
from ldae.files import write, write_json
from ldae.markdown import markdown_table
from ldae.runs import layout
from ldae.runs.environment import environment

_COPIED = (layout.CONFIG, layout.ENVIRONMENT, layout.METRICS)
_NAMES = [row.name for row in trajectory.ALL]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data")
    parser.add_argument(
        "--perceptual-net", required=True, help="backbone whose features replace LPIPS"
    )
    parser.add_argument("--rows", nargs="+", default=_NAMES, choices=_NAMES, metavar="ROW")
    parser.add_argument("--scale", default="small")
    parser.add_argument("--probe-epochs", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=Path("runs/rows"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rows"))
    args, settings = parser.parse_known_args()
    for name in args.rows:
        run_row(name, args, settings)
        collect(name, args)
    write_table(args)


def run_row(name: str, args: argparse.Namespace, settings: list[str]) -> None:
    config = ldae.config(name, args.scale)
    splits = ["--data", args.data, *(["--eval-data", args.eval_data] if args.eval_data else [])]
    settings = [*splits, *settings]
    if config.tokenizer.perceptual_weight:
        settings += ["--tokenizer.perceptual-net", args.perceptual_net]
    fit = args.runs / "tokenizers" / tokenizer_name(name, args.scale)
    run = args.runs / name
    scale = ["--scale", args.scale]
    run_ldae("fit-tokenizer", name, *scale, *settings, "--run", fit)
    tokenizer = ["--tokenizer.path", fit / layout.TOKENIZER]
    run_ldae("pretrain", name, *scale, *settings, *tokenizer, "--run", run)
    linear = run / layout.EVALS / "linear"
    if not (linear / layout.RESULTS).exists():
        run_ldae("linear", run, *splits, "--epochs", args.probe_epochs, "--out", linear)
    if not list(run.glob(f"{layout.SAMPLES}/*.png")):
        run_ldae("sample", run)


def tokenizer_name(name: str, scale: str) -> str:
    """Return the name of the first row with the same tokenizer."""
    tokenizer = ldae.config(name, scale).tokenizer
    return next(row for row in _NAMES if ldae.config(row, scale).tokenizer == tokenizer)


def collect(name: str, args: argparse.Namespace) -> None:
    """Copy the records of a row, without its weights and pictures."""
    run, out = args.runs / name, args.out / name
    out.mkdir(parents=True, exist_ok=True)
    for file in _COPIED:
        shutil.copyfile(run / file, out / file)
    shutil.copyfile(run / layout.EVALS / "linear" / layout.RESULTS, out / "linear.json")
    fit = args.runs / "tokenizers" / tokenizer_name(name, args.scale)
    shutil.copyfile(fit / layout.RECONSTRUCTION, out / layout.RECONSTRUCTION)


def write_table(args: argparse.Namespace) -> None:
    """Write the results so far, in the order of the trajectory."""
    table = []
    for row in trajectory.ALL:
        out = args.out / row.name
        if not (out / layout.RECONSTRUCTION).exists():
            continue
        linear = json.loads((out / "linear.json").read_text())
        reconstruction = json.loads((out / layout.RECONSTRUCTION).read_text())
        table.append(
            {
                "row": row.number,
                "name": row.name,
                "published": row.accuracy,
                "linear": linear["results"]["top1"],
                "psnr": reconstruction["results"]["psnr"],
            }
        )
    write_json(args.out / "table.json", {"rows": table, "environment": environment()})
    header = ["#", "row", "reconstruction, dB", "linear probe", "published (ImageNet)"]
    rows = []
    for line in table:
        measured = (f"{line[key]:.1f}" for key in ("psnr", "linear"))
        rows.append([f"{line['row'] or ''}", line["name"], *measured, f"{line['published'] or ''}"])
    text = markdown_table(header, rows, text=2)
    write(args.out / "table.md", text.encode())
    print(text, end="")


if __name__ == "__main__":
    main()
