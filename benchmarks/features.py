"""Compare features in bfloat16 with features in float32.

python benchmarks/features.py [--out FILE]
python benchmarks/features.py BACKBONE... --data SOURCE --eval-data SOURCE [--out FILE]

Without a backbone the speed of ViT-S is measured, on random images of 224 x 224. With backbones
their k-NN and linear top-1 are measured, with the features of each precision.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from ldae.backbones.open import load_backbone
from ldae.commands.knn import knn
from ldae.commands.linear import CachedProtocol, linear
from ldae.devices import device_for
from ldae.evals.evaluation import Setup
from ldae.evals.features import Encoder
from ldae.evals.neighbours import KNNProtocol
from ldae.files import write_json
from ldae.machine.timing import seconds
from ldae.runs.environment import environment

PRECISIONS = ("fp32", "bf16")
K = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbones", nargs="*", help="of which the accuracies are compared")
    parser.add_argument("--data")
    parser.add_argument("--eval-data")
    parser.add_argument("--model", default="vit_small_patch16_224", help="whose speed is measured")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/features.json"))
    args = parser.parse_args()

    device = device_for(args.device)
    record = compare_accuracies(args) if args.backbones else compare_speeds(args, device)
    write_json(args.out, record | {"environment": environment(device)})


def compare_speeds(args: argparse.Namespace, device: torch.device) -> dict:
    rates = measure_rates(args, device)
    print(rates)
    return {
        "what": f"images/s of {args.model}, batches of {args.batch_size} random images",
        "images_per_second": rates,
        "times_as_fast": round(rates["bf16"] / rates["fp32"], 3),
    }


def compare_accuracies(args: argparse.Namespace) -> dict:
    top1 = {spec: measure_accuracies(spec, args) for spec in args.backbones}
    differences = {
        grader: round(
            statistics.mean(
                found[grader]["bf16"] - found[grader]["fp32"] for found in top1.values()
            ),
            3,
        )
        for grader in ("knn", "linear")
    }
    print(differences)
    return {
        "what": f"top-1 in percent of {K}-NN and of a linear probe; bf16 minus fp32, the mean",
        "top1": top1,
        "mean_difference": differences,
    }


def measure_rates(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return images/s by precision, the medians of rounds that take turns."""
    model = load_backbone(args.model, random_init=True)
    encoders = {precision: Encoder(model, device, precision) for precision in PRECISIONS}
    shape = (args.batch_size, *encoders["fp32"].transform.input_size)
    images = torch.randint(256, shape, dtype=torch.uint8)
    times: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for number in range(args.rounds + 1):
        for precision, encoder in encoders.items():
            spent = seconds(lambda: encoder(images), device)  # noqa: B023 - called at once
            times[precision] += [spent] if number else []
    return {name: round(args.batch_size / statistics.median(t), 2) for name, t in times.items()}


def measure_accuracies(spec: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the top-1 of both graders with the features of each precision."""
    found: dict[str, dict[str, float]] = {"knn": {}, "linear": {}}
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            setup = Setup(precision=precision, out=Path(folder), device=args.device, workers=2)
            data = (args.data, args.eval_data)
            near = knn(spec, *data, protocol=KNNProtocol(k=(K,)), setup=setup)["results"]
            probe = linear(spec, *data, protocol=CachedProtocol(epochs=20), setup=setup)["results"]
        found["knn"][precision] = near[f"top1_k{K}"]
        found["linear"][precision] = probe["top1"]
    return found


if __name__ == "__main__":
    main()
