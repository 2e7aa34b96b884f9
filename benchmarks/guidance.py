"""Whether guidance moves samples towards the classes that are asked for, as a classifier sees them.

python benchmarks/guidance.py --judge SPEC [--conditional RUN] [--unconditional RUN --guide SPEC]

The judge, a timm classifier of the same classes, looks at samples of a class-conditional run under
classifier-free guidance of several weights, and at samples of an unconditional run under the guidance
of another classifier at several scales. Image n is asked to be of class n mod C.
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
    asked = parser.parse_args()

    judge = load_classifier(asked.judge)
    found: dict[str, dict[str, float]] = {}
    if asked.conditional:
        found["classifier-free, by weight"] = {
            str(weight): judged(judge, asked.conditional, asked, guidance=weight)
            for weight in _WEIGHTS
        }
    if asked.unconditional:
        classes = tuple(str(n) for n in range(judge.num_classes))
        found["classifier, by scale"] = {
            str(scale): judged(
                judge,
                asked.unconditional,
                asked,
                labels=classes,
                classifier=asked.guide,
                classifier_scale=scale,
            )
            for scale in _SCALES
        }
    record = {"images": asked.images, "steps": asked.steps, "judge": asked.judge}
    record |= {"guide": asked.guide, "percent_of_the_class_asked_for": found}
    write_json(asked.out, record | {"environment": environment()})
    print(found)


def judged(judge: torch.nn.Module, run: Path, asked: argparse.Namespace, **how: object) -> float:
    """The share of samples, in percent, that the judge takes for the class that was asked for."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "samples.npz"
        sample(run, images=asked.images, out=out, how=SamplingSettings(steps=asked.steps, **how))
        arrays = np.load(out)
        images, labels = arrays["arr_0"], torch.from_numpy(arrays["arr_1"])
    transform = preprocessing(judge)
    with torch.inference_mode():
        pixels = torch.from_numpy(images).movedim(-1, 1)
        seen = [judge(transform.normalize(part)).argmax(1) for part in pixels.split(250)]
    return 100 * (torch.cat(seen) == labels).float().mean().item()


if __name__ == "__main__":
    main()
