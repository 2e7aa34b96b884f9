"""What all evaluators share: open one backbone and two splits, and write one results.json."""

import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator

import torch
from torch import nn

from ldae.backbone import backbone_folder, load_backbone, preprocessing
from ldae.data.sources import Source, open_splits
from ldae.distributed import device_for, is_main, process_group
from ldae.errors import InputError
from ldae.evals.features import Features, Precision, extract, known_labels
from ldae.log import environment, write_json


@dataclass(frozen=True)
class Grading:
    """One backbone, as an evaluator finds it: opened, beside two labelled splits."""

    task: str
    spec: str
    """The backbone as the user named it."""
    random_init: bool
    seed: int
    """Of the random initialisation."""
    model: nn.Module
    train: Source
    eval: Source
    device: torch.device
    batch_size: int
    workers: int
    precision: Precision

    def features(self) -> tuple[Features, Features]:
        """Of the train and of the evaluation split."""
        train, evaluation = (
            extract(
                self.model,
                source,
                batch_size=self.batch_size,
                device=self.device,
                workers=self.workers,
                precision=self.precision,
            )
            for source in (self.train, self.eval)
        )
        return train, evaluation

    def write(self, protocol: dict, results: dict, dim: int, out: Path | None) -> dict:
        """Write ``results.json``, say on one line what is in it, and return it.

        Args:
            protocol: every constant that decides the numbers.
            results: the numbers, accuracies in percent.
            dim: the width of the features.
            out: the folder; by default inside the backbone's, else below ``evals/``.
        """
        classes = len(known_labels(self.train).unique())
        path = (out or self._folder()) / "results.json"
        record = {
            "task": self.task,
            "protocol": protocol | {"precision": self.precision, "top5_over": min(5, classes)},
            "backbone": {
                "spec": self.spec,
                "random_init": self.random_init,
                "seed": self.seed if self.random_init else None,
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
            control = " (random init)" if self.random_init else ""
            tops = [f"{name} {top:.2f}" for name, top in results.items() if name.startswith("top")]
            subject = f"{self.task} of {self.spec}{control} on {self.eval.spec}"
            print(f"{subject}: {', '.join(tops)}; {path}")
        return record

    def _folder(self) -> Path:
        home = backbone_folder(self.spec)
        above = home / "evals" if home else Path("evals", _file_name(self.spec))
        data = _file_name(self.train.spec)
        if self.eval.spec != self.train.spec:
            data += f"-on-{_file_name(self.eval.spec)}"
        return above / f"{self.task}-{data}{'-random-init' if self.random_init else ''}"


def _file_name(spec: str) -> str:
    """The last part of a path that exists, else all of ``spec``, as a name for a folder."""
    path = Path(spec)
    return re.sub(r"[^\w.=]+", "-", path.resolve().name if path.exists() else spec).strip("-")


@contextmanager
def grading(
    task: str,
    backbone: str,
    data: str,
    eval_data: str | None,
    *,
    random_init: bool,
    in_chans: int,
    img_size: int | None,
    seed: int,
    batch_size: int,
    workers: int,
    precision: Precision,
    device: str,
) -> Iterator[Grading]:
    """Join the process group, if one was launched, and open what ``task`` grades.

    Raises: InputError when the backbone or the data can not be opened, or has no labels.
    """
    where = device_for(device)
    with process_group(where):
        train, evaluation = open_splits(data, eval_data)
        for source in (train, evaluation):
            known_labels(source)  # before anything that takes time
        if len(known_labels(train).unique()) < 2:
            raise InputError(f"{train.spec} has one class only, which any backbone tells apart")
        model = load_backbone(
            backbone, random_init=random_init, in_chans=in_chans, img_size=img_size, seed=seed
        )
        yield Grading(
            task, str(backbone), random_init, seed, model, train, evaluation,
            where, batch_size, workers, precision,
        )  # fmt: skip
