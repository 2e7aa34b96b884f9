"""What all evaluators share: open one backbone and two splits, and write one results.json."""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Iterator

import torch
import tyro
from torch import nn

from ldae.backbones.open import backbone_folder, load_backbone
from ldae.backbones.preprocessing import EvalTransform, preprocessing
from ldae.data.open import open_splits
from ldae.data.source import Source
from ldae.distributed import device_for, is_main, process_group
from ldae.errors import InputError
from ldae.evals.features import Features, Precision, extract, known_labels
from ldae.files import check_writable, write_json
from ldae.runs import layout
from ldae.runs.environment import environment
from ldae.tree import COUNT, NOT_NEGATIVE, check

# Settings that do not decide the numbers, or that a name tells in words.
_NOT_IN_NAMES = (
    *("random_init", "out", "save_stats", "batch_size", "workers", "device"),
    *("matched_by", "compared_classes", "constants"),  # these follow from others
)

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
class Evaluation:
    """One backbone, as an evaluator finds it: opened, beside two labelled splits."""

    task: str
    spec: str
    """The backbone as the user named it."""
    setup: Setup
    model: nn.Module
    train: Source | None
    """None where nothing is learned or searched."""
    eval: Source
    device: torch.device
    transform: EvalTransform
    """Of the images; the backbone's own, if the task does not change it."""

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

    def write(self, protocol: Any, results: dict, dim: int, classes: int | None = None) -> dict:
        """Write ``results.json``, say on one line what is in it, and return it.

        Args:
            protocol: a dataclass of every constant that decides the numbers, which records as
                modified what is not its default, unless it says so itself.
            results: the numbers, accuracies in percent.
            dim: the width of the features.
            classes: how many there are; by default those of train's labels, with what top-5 is over.
        """
        constants = asdict(protocol) | {"precision": self.setup.precision}
        if classes is None:
            classes = len(known_labels(self.train).unique())
            constants["top5_over"] = min(5, classes)
        if "modified" not in constants:
            constants["modified"] = changes(protocol)
        path = self.folder(protocol) / layout.RESULTS
        random_init = self.setup.random_init
        record = {
            "task": self.task,
            "protocol": constants,
            "backbone": {
                "spec": self.spec,
                "random_init": random_init,
                "seed": self.setup.seed if random_init else None,
                "params": sum(parameter.numel() for parameter in self.model.parameters()),
                "dim": dim,
                "preprocessing": asdict(self.transform),
            },
            "data": {
                "spec": (self.train or self.eval).spec,
                "eval_spec": self.eval.spec,
                "train_images": len(self.train) if self.train else None,
                "eval_images": len(self.eval),
                "classes": classes,
            },
            "results": results,
            "environment": environment(self.device),
        }
        if is_main():
            write_json(path, record)
            control = " (random init)" if random_init else ""
            told = ("top", "mean_average_precision", "recall", "miou", "pixel_accuracy")
            numbers = [f"{name} {x:.2f}" for name, x in results.items() if name.startswith(told)]
            subject = f"{self.task} of {self.spec}{control} on {self.eval.spec}"
            print(f"{subject}: {', '.join(numbers)}; {path}")
        return record

    def folder(self, protocol: Any) -> Path:
        """Where results.json goes: what decides the numbers is in the name, so that none is lost."""
        if self.setup.out:
            return self.setup.out
        data = (self.train or self.eval).spec
        parts = [self.task, file_name(data)]
        if self.eval.spec != data:
            parts += ["on", file_name(self.eval.spec)]
        if self.setup.random_init:
            parts.append("random-init")
        found = home_of(self.spec) / "-".join(dict.fromkeys(parts + changes(protocol, self.setup)))
        if self._is_of_other_data(found / layout.RESULTS):  # of the same name elsewhere
            places = f"{(self.train or self.eval).spec}\0{self.eval.spec}"
            digest = hashlib.sha256(places.encode()).hexdigest()[:8]
            found = found.with_name(f"{found.name}-{digest}")
        return found

    def _is_of_other_data(self, path: Path) -> bool:
        with suppress(OSError, ValueError, TypeError, KeyError):
            data = json.loads(path.read_text(encoding="utf-8"))["data"]
            return (data["spec"], data["eval_spec"]) != (
                (self.train or self.eval).spec,
                self.eval.spec,
            )
        return False


def home_of(spec: str) -> Path:
    """Where the evaluations of a backbone go that are not told where."""
    folder = backbone_folder(spec)
    return folder / layout.EVALS if folder else Path(layout.EVALS, file_name(spec))


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


Splits = Callable[[str, str | None], tuple[Source, Source]]


def labelled_splits(data: str, eval_data: str | None) -> tuple[Source, Source]:
    """As ``open_splits``, of labelled images.

    Raises: InputError as it does, and for images without labels or of one class only.
    """
    train, evaluation = open_splits(data, eval_data)
    for source in (train, evaluation):
        known_labels(source)  # before anything that takes time
    if len(known_labels(train).unique()) < 2:
        raise InputError(f"{train.spec} has one class only, which any backbone tells apart")
    return train, evaluation


@contextmanager
def open_evaluation(
    task: str,
    backbone: str,
    data: str,
    eval_data: str | None,
    setup: Setup,
    splits: Splits = labelled_splits,
) -> Iterator[Evaluation]:
    """Join the process group, if one was launched, and open what ``task`` grades.

    Raises: InputError when the backbone can not be opened, and as ``splits`` does.
    """
    check(setup)
    check_writable(setup.out or home_of(backbone))
    device = device_for(setup.device)
    with process_group(device):
        train, evaluation = splits(data, eval_data)
        model = load_backbone(
            backbone,
            random_init=setup.random_init,
            in_chans=setup.in_chans,
            img_size=setup.img_size,
            seed=setup.seed,
        )
        own = preprocessing(model)
        yield Evaluation(task, str(backbone), setup, model, train, evaluation, device, own)
