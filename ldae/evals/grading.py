"""What all evaluators share: open one backbone and two splits, and write one results.json."""

import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Iterator

import torch
import tyro
from torch import nn

from ldae.backbone import backbone_folder, load_backbone
from ldae.data.sources import Source, open_splits
from ldae.distributed import device_for, is_main, process_group
from ldae.errors import InputError
from ldae.evals.features import Features, Precision, extract, known_labels
from ldae.log import environment, write_json
from ldae.preprocessing import preprocessing
from ldae.tree import COUNT, NOT_NEGATIVE, check

# Settings that do not decide the numbers, or that a name tells in words.
_NOT_IN_NAMES = ("random_init", "out", "save_stats", "batch_size", "workers", "device")

BackboneSpec = Annotated[str, tyro.conf.arg(metavar="BACKBONE")]
SourceSpec = Annotated[str, tyro.conf.arg(metavar="SOURCE")]


@dataclass(frozen=True)
class Setup:
    """What every evaluator takes beside its protocol."""

    random_init: bool = False
    """Grade the untrained control: the same architecture with timm's random weights."""
    in_chans: Annotated[int, COUNT] = 3
    """Channels of a timm name."""
    img_size: Annotated[int | None, COUNT] = None
    """Side of the images of a timm name, in pixels."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Of the random weights, and of what the protocol draws."""
    out: Path | None = None
    """Folder of results.json; by default beside the backbone, or below evals/."""
    batch_size: Annotated[int, COUNT] = 256
    """Images at a time through the backbone; it does not change the numbers."""
    workers: Annotated[int, NOT_NEGATIVE] = 4
    """Processes that decode images."""
    precision: Precision = "fp32"
    """Of the backbone's arithmetic."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Grading:
    """One backbone, as an evaluator finds it: opened, beside two labelled splits."""

    task: str
    spec: str
    """The backbone as the user named it."""
    setup: Setup
    model: nn.Module
    train: Source
    eval: Source
    device: torch.device

    def features(self) -> tuple[Features, Features]:
        """Of the train and of the evaluation split."""
        train, evaluation = (
            extract(
                self.model,
                source,
                batch_size=self.setup.batch_size,
                device=self.device,
                workers=self.setup.workers,
                precision=self.setup.precision,
            )
            for source in (self.train, self.eval)
        )
        return train, evaluation

    def write(self, protocol: Any, results: dict, dim: int) -> dict:
        """Write ``results.json``, say on one line what is in it, and return it.

        Args:
            protocol: a dataclass of every constant that decides the numbers, which records as
                modified what is not its default, unless it says so itself.
            results: the numbers, accuracies in percent.
            dim: the width of the features.
        """
        classes = len(known_labels(self.train).unique())
        constants = asdict(protocol) | {"precision": self.setup.precision}
        if "modified" not in constants:
            constants["modified"] = changes(protocol)
        path = self.folder(protocol) / "results.json"
        random_init = self.setup.random_init
        record = {
            "task": self.task,
            "protocol": constants | {"top5_over": min(5, classes)},
            "backbone": {
                "spec": self.spec,
                "random_init": random_init,
                "seed": self.setup.seed if random_init else None,
                "params": sum(parameter.numel() for parameter in self.model.parameters()),
                "dim": dim,
                "preprocessing": asdict(preprocessing(self.model)),
            },
            "data": {
                "spec": self.train.spec,
                "eval_spec": self.eval.spec,
                "train_images": len(self.train),
                "eval_images": len(self.eval),
                "classes": classes,
            },
            "results": results,
            "environment": environment(self.device),
        }
        if is_main():
            write_json(path, record)
            control = " (random init)" if random_init else ""
            told = ("top", "mean_average_precision", "recall")
            numbers = [f"{name} {x:.2f}" for name, x in results.items() if name.startswith(told)]
            subject = f"{self.task} of {self.spec}{control} on {self.eval.spec}"
            print(f"{subject}: {', '.join(numbers)}; {path}")
        return record

    def folder(self, protocol: Any) -> Path:
        """Where results.json goes: what decides the numbers is in the name, so that none is lost."""
        if self.setup.out:
            return self.setup.out
        home = backbone_folder(self.spec)
        above = home / "evals" if home else Path("evals", file_name(self.spec))
        parts = [self.task, file_name(self.train.spec)]
        if self.eval.spec != self.train.spec:
            parts += ["on", file_name(self.eval.spec)]
        if self.setup.random_init:
            parts.append("random-init")
        return above / "-".join(dict.fromkeys(parts + changes(protocol, self.setup)))


def changes(*settings: Any) -> list[str]:
    """What of dataclasses of settings differs from its default and decides a number, for a name."""
    parts = []
    for part in settings:
        for key, value in asdict(part).items():
            if value != getattr(type(part)(), key) and key not in _NOT_IN_NAMES:
                values = value if isinstance(value, tuple) else (value,)
                parts.append(f"{key}={'-'.join(map(_word, values))}")
    return parts


def _word(value: object) -> str:
    """``value`` in a name; numbers keep their sign."""
    return str(value) if isinstance(value, int | float) else file_name(str(value))


def file_name(spec: str) -> str:
    """The last part of a path that exists, else all of ``spec``, as a name for a folder."""
    path = Path(spec)
    return re.sub(r"[^\w.=+]+", "-", path.resolve().name if path.exists() else spec).strip("-")


@contextmanager
def grading(
    task: str,
    backbone: str,
    data: str,
    eval_data: str | None,
    setup: Setup,
) -> Iterator[Grading]:
    """Join the process group, if one was launched, and open what ``task`` grades.

    Raises: InputError when the backbone or the data can not be opened, or has no labels.
    """
    check(setup)
    device = device_for(setup.device)
    with process_group(device):
        train, evaluation = open_splits(data, eval_data)
        for source in (train, evaluation):
            known_labels(source)  # before anything that takes time
        if len(known_labels(train).unique()) < 2:
            raise InputError(f"{train.spec} has one class only, which any backbone tells apart")
        model = load_backbone(
            backbone,
            random_init=setup.random_init,
            in_chans=setup.in_chans,
            img_size=setup.img_size,
            seed=setup.seed,
        )
        yield Grading(task, str(backbone), setup, model, train, evaluation, device)
