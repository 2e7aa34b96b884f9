"""Measure with a classifier whether guidance moves samples towards the requested classes.

python benchmarks/guidance.py --judge SPEC [--conditional RUN] [--unconditional RUN --guide SPEC]

The judge is a timm classifier of the same classes. It classifies samples of a class-conditional run
with classifier-free guidance of several weights, and samples of an unconditional run guided by
another classifier at several scales. The class of image n is n mod C.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from ldae.backbones.open import load_classifier
from ldae.backbones.preprocessing import preprocessing
from ldae.commands.sample import sample
from ldae.files import write_json
from ldae.runs.environment import environment
from ldae.sampling.settings import SamplingSettings

_WEIGHTS = (0.0, 1.0, 2.0, 4.0)
_SCALES = (0.0, 1.0, 4.0, 16.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judge", required=True)
    parser.add_argument("--conditional", type=Path)
    parser.add_argument("--unconditional", type=Path)
    parser.add_argument("--guide")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/guidance.json"))
    args = parser.parse_args()

    judge = load_classifier(args.judge)
    shares: dict[str, dict[str, float]] = {}
    if args.conditional:
        shares["classifier-free, by weight"] = {
            str(weight): share_of_class(judge, args.conditional, args, guidance=weight)
            for weight in _WEIGHTS
        }
    if args.unconditional:
        classes = tuple(str(n) for n in range(judge.num_classes))
        shares["classifier, by scale"] = {
            str(scale): share_of_class(
                judge,
                args.unconditional,
                args,
                labels=classes,
                classifier=args.guide,
                classifier_scale=scale,
            )
            for scale in _SCALES
        }
    record = {"images": args.images, "steps": args.steps, "judge": args.judge}
    record |= {"guide": args.guide, "percent_of_the_class_asked_for": shares}
    write_json(args.out, record | {"environment": environment()})
    print(shares)


def share_of_class(
    judge: torch.nn.Module, run: Path, args: argparse.Namespace, **how: object
) -> float:
    """Return the percentage of samples that the judge assigns to the requested class."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "samples.npz"
        sample(run, images=args.images, out=out, sampling=SamplingSettings(steps=args.steps, **how))
        arrays = np.load(out)
        images, labels = arrays["arr_0"], torch.from_numpy(arrays["arr_1"])
    transform = preprocessing(judge)
    with torch.inference_mode():
        pixels = torch.from_numpy(images).movedim(-1, 1)
        classes = [judge(transform.normalize(part)).argmax(1) for part in pixels.split(250)]
    return 100 * (torch.cat(classes) == labels).float().mean().item()


if __name__ == "__main__":
    main()
