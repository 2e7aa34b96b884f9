"""An evaluation: a backbone, two splits, a protocol and a setup, opened; and its results.json."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from ldae.backbones.open import backbone_folder, load_backbone, load_classifier
from ldae.backbones.preprocessing import EvalTransform, preprocessing
from ldae.data.open import open_splits
from ldae.data.source import Source
from ldae.distributed import device_for, is_main, process_group
from ldae.errors import InputError
from ldae.evals.features import Encoder, Features, Precision, extract_share, known_labels
from ldae.evals.protocol import Protocol
from ldae.evals.taps import Reader
from ldae.files import check_writable, state_hash, write_json
from ldae.runs import layout
from ldae.runs.environment import environment
from ldae.tree import COUNT, NOT_NEGATIVE, check, difference

# Settings that do not change the numbers, or that a folder's name has in words.
_NOT_IN_NAMES = ("random_init", "out", "save_stats", "batch_size", "workers", "device")

_kept: ContextVar[dict[tuple, nn.Module]] = ContextVar("the last network that was opened")

_BACKBONE = "A run folder, an exported folder, a timm name, NAME@FILE or pixels[:SIZE]."
_DATA = "Labelled images; the train split is learned from or searched."
_EVAL_DATA = "Images to grade on; by default the evaluation split of --data."

BackboneSpec = Annotated[str, tyro.conf.arg(metavar="BACKBONE", help=_BACKBONE)]
SourceSpec = Annotated[str, tyro.conf.arg(metavar="SOURCE", help=_DATA)]
EvalSourceSpec = Annotated[str | None, tyro.conf.arg(metavar="SOURCE", help=_EVAL_DATA)]


@dataclass(frozen=True)
class Setup:
    """The settings that open and run a backbone, in every evaluation."""

    random_init: bool = False
    """Grade the untrained control: the same architecture with timm's random weights."""
    in_chans: Annotated[int, COUNT] = 3
    """Input channels, of a timm name."""
    img_size: Annotated[int | None, COUNT] = None
    """Side of the input images in pixels, of a timm name."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of the random weights and of the protocol."""
    out: Path | None = None
    """Folder of results.json; by default beside the backbone, or below evals/."""
    batch_size: Annotated[int, COUNT] = 256
    """Images per forward pass of the backbone; the numbers do not depend on it."""
    workers: Annotated[int, NOT_NEGATIVE] = 4
    """Processes that decode images."""
    precision: Precision = "fp32"
    """Precision of the backbone's arithmetic."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Evaluation:
    """A backbone and all that decides its grade: two labelled splits, a protocol and a setup."""

    task: str
    spec: str
    """The backbone as the user named it."""
    protocol: Protocol
    setup: Setup
    model: nn.Module
    train: Source | None
    """None for a grader that neither learns nor searches."""
    eval: Source
    device: torch.device
    transform: EvalTransform
    """The preprocessing of the backbone, unless the task changes it."""

    def encoder(self, reader: Reader | None = None) -> Encoder:
        """Return the backbone on its device, read by ``reader`` or else for its own output."""
        how = (self.setup.batch_size, self.setup.workers)
        return Encoder(self.model, self.device, self.setup.precision, self.transform, reader, *how)

    def features(self, encoder: Encoder | None = None) -> tuple[Features, Features]:
        """Extract this rank's share of the features of the train and the evaluation split."""
        encoder = encoder or self.encoder()
        assert self.train is not None  # the graders that read features have one
        train = extract_share(encoder, self.train)
        return train, train if self.eval is self.train else extract_share(encoder, self.eval)

    def write(self, results: dict, dim: int, classes: int | None = None, **follows: object) -> dict:
        """Write ``results.json``, print the headlines on one line, and return the record.

        Args:
            results: the numbers, accuracies in percent.
            dim: width of the features.
            classes: number of classes; by default counted in the train labels, and limits top-5.
            follows: entries of the protocol's record that are derived from protocol and backbone.
        """
        constants = asdict(self.protocol) | follows | {"precision": self.setup.precision}
        if classes is None:
            assert self.train is not None  # as in ``features``
            classes = len(known_labels(self.train).unique())
            constants["top5_over"] = min(5, classes)
        if "modified" not in constants:
            constants["modified"] = changes(self.protocol)
        path = self.folder / layout.RESULTS
        random_init = self.setup.random_init
        record = {
            "task": self.task,
            "protocol": constants,
            "backbone": {
                "spec": self.spec,
                "random_init": random_init,
                "seed": self.setup.seed if random_init else None,
                "sha256": state_hash(self.model.state_dict()),
                "images_seen": getattr(self.model, "images_seen", None),
                "params": sum(parameter.numel() for parameter in self.model.parameters()),
                "dim": dim,
                "preprocessing": asdict(self.transform),
            },
            "data": {
                "spec": (self.train or self.eval).spec,
                "eval_spec": self.eval.spec,
                "fingerprint": (self.train or self.eval).fingerprint(),
                "eval_fingerprint": self.eval.fingerprint(),
                "resized_twice": any(
                    source.resizes_twice(self.transform)
                    for source in (self.train, self.eval)
                    if source
                ),
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
            numbers = [f"{name} {results[name]:.2f}" for name in self.protocol.headlines]
            subject = f"{self.task} of {self.spec}{control} on {self.eval.spec}"
            print(f"{subject}: {', '.join(numbers)}; {path}")
        return record

    @property
    def folder(self) -> Path:
        """The folder of results.json, named by all that decides the numbers: no result is lost."""
        if self.setup.out:
            return self.setup.out
        data = (self.train or self.eval).spec
        parts = [self.task, file_name(data)]
        if self.eval.spec != data:
            parts += ["on", file_name(self.eval.spec)]
        if self.setup.random_init:
            parts.append("random-init")
        name = "-".join(dict.fromkeys(parts + changes(self.protocol, self.setup)))
        return unshared_folder(
            results_home(self.spec) / name,
            (data, self.eval.spec),
            lambda record: (record["data"]["spec"], record["data"]["eval_spec"]),
        )


def unshared_folder(
    folder: Path, specs: tuple[str, ...], specs_of: Callable[[dict], tuple[str, ...]]
) -> Path:
    """Return ``folder``, or one with a digest in its name when it has results of other specs.

    Data of the same name from elsewhere may have its results there. ``specs_of`` returns the specs
    in the content of a results.json.
    """
    with suppress(OSError, ValueError, TypeError, KeyError):
        record = json.loads((folder / layout.RESULTS).read_text(encoding="utf-8"))
        if specs_of(record) != specs:
            digest = hashlib.sha256("\0".join(specs).encode()).hexdigest()[:8]
            return folder.with_name(f"{folder.name}-{digest}")
    return folder


def results_home(spec: str) -> Path:
    """Return the default folder for a backbone's evaluation results."""
    folder = backbone_folder(spec)
    return folder / layout.EVALS if folder else Path(layout.EVALS, file_name(spec))


def changes(*settings: Any) -> list[str]:
    """List ``name=value`` of the settings that change the numbers and are not at their defaults."""
    parts = []
    for part in settings:
        for key, (_, value) in difference(type(part)(), part).items():
            if key not in _NOT_IN_NAMES:
                values = value if isinstance(value, tuple) else (value,)
                parts.append(f"{key}={'-'.join(map(_word, values))}")
    return parts


def _word(value: object) -> str:
    """Return a value as part of a folder's name; numbers keep their sign."""
    return str(value) if isinstance(value, int | float) else file_name(str(value))


def file_name(spec: str) -> str:
    """Return a folder name for ``spec``: the last part of an existing path, else the whole spec."""
    path = Path(spec)
    return re.sub(r"[^\w.=+]+", "-", path.resolve().name if path.exists() else spec).strip("-")


Splits = Callable[[str, str | None], tuple[Source | None, Source]]
Load = Callable[[str, Setup], nn.Module]


def labelled_splits(data: str, eval_data: str | None) -> tuple[Source, Source]:
    """Open the train and the evaluation split of labelled images, as ``open_splits`` does.

    Raises: InputError as it does, and for images without labels or of one class only.
    """
    train, test = open_splits(data, eval_data)
    for source in (train, test):
        known_labels(source)
    if len(known_labels(train).unique()) < 2:
        raise InputError(f"{train.spec} has one class only, which every backbone gets right")
    return train, test


@contextmanager
def keep_network() -> Iterator[None]:
    """Let graders that follow each other on one network open it once; only the last is kept."""
    before = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(before)


def _open_once(load: Callable[..., nn.Module], spec: str, **settings: Any) -> nn.Module:
    kept = _kept.get({})
    key = (load, str(spec), *settings.values())
    if key not in kept:
        kept.clear()  # before the next one takes memory
        kept[key] = load(spec, **settings)
    return kept[key]


def open_classifier(spec: str, setup: Setup) -> nn.Module:
    """Open a network with its classifier. Raises: InputError when it cannot be opened."""
    return _open_once(load_classifier, spec, in_chans=setup.in_chans, img_size=setup.img_size)


def open_backbone(spec: str, setup: Setup) -> nn.Module:
    """Open a network without its classifier. Raises: InputError when it cannot be opened."""
    return _open_once(
        load_backbone,
        spec,
        random_init=setup.random_init,
        in_chans=setup.in_chans,
        img_size=setup.img_size,
        seed=setup.seed,
    )


@contextmanager
def open_evaluation(
    task: str,
    spec: str,
    data: str,
    eval_data: str | None,
    protocol: Protocol,
    setup: Setup,
    splits: Splits = labelled_splits,
    load: Load = open_backbone,
) -> Iterator[Evaluation]:
    """Join the process group, if one was launched, and open an evaluation.

    The seed of the setup becomes the seed of the protocol.

    Raises: InputError for a setting out of its range, and as ``splits`` and ``load`` do.
    """
    check(setup)
    if hasattr(protocol, "seed"):
        protocol = replace(protocol, seed=setup.seed)  # type: ignore[call-arg]  # as checked
    check_writable(setup.out or results_home(spec))
    device = device_for(setup.device)
    with process_group(device):
        train, test = splits(data, eval_data)
        model = load(spec, setup)
        transform = preprocessing(model)
        yield Evaluation(task, str(spec), protocol, setup, model, train, test, device, transform)
