r"""Fine-tuning from a pre-trained backbone against the same network from scratch, both curves kept.

python benchmarks/finetune.py BACKBONE --data SOURCE [--recipe NAME] [settings of ldae finetune]

The two differ in --model.random-init alone: same recipe, epochs, seed, images and augmentation. Both
are the commands that a user would type; they are printed, and the same command goes on where it
stopped. --out gets the results and the metrics of both, with the curves side by side in finetune.json
and finetune.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from ldae.files import write, write_json
from ldae.runs.environment import environment

_COPIED = ("config.yaml", "environment.json", "metrics.jsonl", "results.json")
_STARTS = {"pretrained": [], "scratch": ["--model.random-init"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone")
    parser.add_argument("--recipe", default="ldae")
    parser.add_argument("--runs", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/finetune"))
    asked, settings = parser.parse_known_args()
    for name, own in _STARTS.items():
        words = [asked.backbone, "--recipe", asked.recipe, *settings, *own]
        command = ["ldae", "finetune", *words, "--run", str(asked.runs / name)]
        print("\n$", *command, flush=True)
        subprocess.run([sys.executable, "-m", *command], check=True)
        (asked.out / name).mkdir(parents=True, exist_ok=True)
        for file in _COPIED:
            shutil.copyfile(asked.runs / name / file, asked.out / name / file)
    write_tables(asked.out)


def write_tables(out: Path) -> None:
    curves = {name: curve(out / name) for name in _STARTS}
    results = {name: json.loads((out / name / "results.json").read_text()) for name in _STARTS}
    tops = {name: result["results"] for name, result in results.items()}
    record = {"results": tops, "protocol": results["pretrained"]["protocol"], "curves": curves}
    write_json(out / "finetune.json", record | {"environment": environment()})
    lines = ["| epoch | from the backbone | from scratch |", "|---|---|---|"]
    for one, other in zip(*curves.values(), strict=True):
        lines.append(f"| {one['epoch']:.2f} | {one['top1']:.2f} | {other['top1']:.2f} |")
    last = [f"{tops[name]['top1']:.2f}" for name in _STARTS]
    lines.append(f"| end | {' | '.join(last)} |")
    write(out / "finetune.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def curve(run: Path) -> list[dict]:
    """What was measured on the evaluation split, and the loss there."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    kept = ("images", "epoch", "loss", "top1", "top5")
    return [{key: record[key] for key in kept} for record in records if "top1" in record]


if __name__ == "__main__":
    main()
