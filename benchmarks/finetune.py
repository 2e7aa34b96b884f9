"""Compare fine-tuning from a pre-trained backbone with the same network from scratch.

python benchmarks/finetune.py BACKBONE --data SOURCE [--recipe NAME] [settings of ldae finetune]

The runs differ only in --model.random-init: recipe, epochs, seed, images and augmentation are the
same. Their commands are printed. Run this command again to resume. The folder --out gets the
results and the metrics of both runs, and both curves in finetune.json and finetune.md.
"""

import argparse
import json
import shutil
from pathlib import Path

from benchmarks.command import run_ldae
from ldae.files import write, write_json
from ldae.markdown import markdown_table
from ldae.runs import layout
from ldae.runs.environment import environment
from ldae.runs.metrics import read_records

_COPIED = (layout.CONFIG, layout.ENVIRONMENT, layout.METRICS, layout.RESULTS)
_STARTS = {"pretrained": [], "scratch": ["--model.random-init"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone")
    parser.add_argument("--recipe", default="ldae")
    parser.add_argument("--runs", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/finetune"))
    args, settings = parser.parse_known_args()
    for name, start in _STARTS.items():
        words = [args.backbone, "--recipe", args.recipe, *settings, *start]
        run_ldae("finetune", *words, "--run", args.runs / name)
        (args.out / name).mkdir(parents=True, exist_ok=True)
        for file in _COPIED:
            shutil.copyfile(args.runs / name / file, args.out / name / file)
    write_tables(args.out)


def write_tables(out: Path) -> None:
    curves = {name: curve(out / name) for name in _STARTS}
    results = {name: json.loads((out / name / layout.RESULTS).read_text()) for name in _STARTS}
    tops = {name: result["results"] for name, result in results.items()}
    record = {"results": tops, "protocol": results["pretrained"]["protocol"], "curves": curves}
    write_json(out / "finetune.json", record | {"environment": environment()})
    rows = [
        [f"{start['epoch']:.2f}", f"{start['top1']:.2f}", f"{scratch['top1']:.2f}"]
        for start, scratch in zip(*curves.values(), strict=True)
    ]
    rows.append(["end", *(f"{tops[name]['top1']:.2f}" for name in _STARTS)])
    text = markdown_table(["epoch", "from the backbone", "from scratch"], rows)
    write(out / "finetune.md", text.encode())
    print(text, end="")


def curve(run: Path) -> list[dict]:
    """Return the metrics on the evaluation split, and the training loss at these points."""
    kept = ("images", "epoch", "loss", "top1", "top5")
    return [{key: record[key] for key in kept} for record in read_records(run) if "top1" in record]


if __name__ == "__main__":
    main()
