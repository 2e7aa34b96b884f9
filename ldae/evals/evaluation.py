"""An evaluation: a backbone, two splits, a protocol and a setup, opened; and its results.json."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from ldae.backbones.open import load_backbone, load_classifier
from ldae.backbones.preprocessing import EvalTransform, preprocessing
from ldae.data.open import open_splits
from ldae.data.source import Source
from ldae.distributed import device_for, is_main, process_group, world_size
from ldae.errors import InputError
from ldae.evals.call import describe_call
from ldae.evals.embedded import (
    EmbeddedBackbone,
    check_rows,
    images_or_embedded,
    is_embedded,
)
from ldae.evals.features import Encoder, Features, Precision, extract_share, known_labels
from ldae.evals.naming import changes, default_folder, results_home
from ldae.evals.protocol import Protocol
from ldae.evals.taps import Reader, Tap, TapReader
from ldae.files import as_json, check_writable, state_hash, write_json
from ldae.runs import layout
from ldae.runs.environment import environment
from ldae.runs.kinds import kind_of
from ldae.tree import COUNT, NOT_NEGATIVE, AnyPath, check

_kept: ContextVar[dict[tuple, nn.Module]] = ContextVar("the last network that was opened")
_watch: ContextVar[Callable[["Evaluation"], None]] = ContextVar("sees what is opened")

_BACKBONE = "A run folder, an exported folder, a timm name, NAME@FILE or pixels[:SIZE]."
_FEATURES = f"{_BACKBONE[:-1]}; or a file of `ldae embed`, whose features are graded."
_DATA = "Labelled images; the train split is learned from or searched."
_FEATURES_DATA = f"{_DATA} By default those of the file, if BACKBONE is one of `ldae embed`."
_EVAL_DATA = "Images to grade on; by default the evaluation split of --data."

BackboneSpec = Annotated[AnyPath, tyro.conf.arg(metavar="BACKBONE", help=_BACKBONE)]
FeaturesSpec = Annotated[AnyPath, tyro.conf.arg(metavar="BACKBONE", help=_FEATURES)]
SourceSpec = Annotated[AnyPath, tyro.conf.arg(metavar="SOURCE", help=_DATA)]
FeaturesSourceSpec = Annotated[AnyPath | None, tyro.conf.arg(metavar="SOURCE", help=_FEATURES_DATA)]
EvalSourceSpec = Annotated[AnyPath | None, tyro.conf.arg(metavar="SOURCE", help=_EVAL_DATA)]


@dataclass(frozen=True)
class EncoderSetup:
    """The settings that open and run a backbone."""

    random_init: bool = False
    """Take the untrained control: the same architecture with timm's random weights."""
    in_chans: Annotated[int, COUNT] = 3
    """Input channels, of a timm name."""
    img_size: Annotated[int | None, COUNT] = None
    """Side of the input images in pixels, of a timm name."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of the random weights, and of the protocol of an evaluation."""
    batch_size: Annotated[int, COUNT] = 256
    """Images per forward pass of the backbone; the numbers do not depend on it."""
    workers: Annotated[int, NOT_NEGATIVE] = 4
    """Processes that decode images."""
    precision: Precision = "fp32"
    """Precision of the backbone's arithmetic."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Setup(EncoderSetup):
    """The settings of every evaluation that are not part of its protocol."""

    out: AnyPath | None = None
    """Folder of results.json; by default beside the backbone, or below evals/."""
    seeds: Annotated[tuple[int, ...], NOT_NEGATIVE] = ()
    """Seeds that each give a result of its own, in a folder of its own; results.json has their
    means, and their standard deviations as spread."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))  # which may be a list
        if self.seeds and (self.seed or len({*self.seeds}) < max(len(self.seeds), 2)):
            raise InputError(
                "seeds must be several different ones, such as --seeds 0 1 2, and without --seed"
            )


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
    call: dict
    """The call that repeats the evaluation, for its record."""

    def encoder(self, reader: Reader | None = None) -> Encoder:
        """Return the backbone on its device, read by ``reader`` or else for its own output.

        Raises: InputError when a file of features is in the backbone's place.
        """
        if isinstance(self.model, EmbeddedBackbone):
            raise InputError(f"{self.spec} holds features, and {self.task} needs the backbone")
        how = (self.setup.batch_size, self.setup.workers)
        return Encoder(self.model, self.device, self.setup.precision, self.transform, reader, *how)

    def features(self, taps: tuple[Tap, ...] = (Tap(),)) -> tuple[Features, Features]:
        """Return this rank's share of the features of the train and the evaluation split.

        They are extracted, or read from a file of ``ldae embed``.
        """
        assert self.train is not None  # the graders that read features have one
        if isinstance(self.model, EmbeddedBackbone):
            share = partial(self.model.share, taps=taps)
        else:
            share = partial(extract_share, self.encoder(TapReader(self.model, taps)))
        train = share(self.train)
        return train, train if self.eval is self.train else share(self.eval)

    def write(self, results: dict, dim: int, classes: int | None = None, **follows: object) -> dict:
        """Write ``results.json``, print the headlines on one line, and return the file's content.

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
        record = {
            "task": self.task,
            "protocol": constants,
            "backbone": describe_backbone(self.spec, self.model, self.setup, self.transform)
            | {"dim": dim},
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
            "environment": environment(self.device) | {"ranks": world_size()},
            "call": self.call,
        }
        if is_main():
            write_json(path, record)
            control = " (random init)" if self.setup.random_init else ""
            numbers = [f"{name} {results[name]:.2f}" for name in self.protocol.headlines]
            subject = f"{self.task} of {self.spec}{control} on {self.eval.spec}"
            print(f"{subject}: {', '.join(numbers)}; {path}")
        return as_json(record)

    def origins(self) -> dict:
        """Return the hashes of the weights and of the images, as parts of the record."""
        described = describe_backbone(self.spec, self.model, self.setup, self.transform)
        graded = self.eval.fingerprint()
        learned = self.train.fingerprint() if self.train else graded
        return {
            "backbone": {"sha256": described["sha256"]},
            "data": {"fingerprint": learned, "eval_fingerprint": graded},
        }

    @property
    def folder(self) -> Path:
        """The folder of results.json."""
        if self.setup.out:
            return Path(self.setup.out)
        data, random_init = (self.train or self.eval).spec, self.setup.random_init
        places = (self.task, self.spec, data, self.eval.spec)
        return default_folder(*places, self.protocol, self.setup, random_init=random_init)


def describe_backbone(
    spec: str, model: nn.Module, setup: EncoderSetup, transform: EvalTransform
) -> dict:
    """Return what a record says about a backbone, or about that of the features in a file."""
    if isinstance(model, EmbeddedBackbone):
        return model.describe()
    return {
        "spec": spec,
        "random_init": setup.random_init,
        "seed": setup.seed if setup.random_init else None,
        "sha256": state_hash(model.state_dict()),
        "images_seen": getattr(model, "images_seen", None),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "preprocessing": asdict(transform),
    }


Splits = Callable[[str, str | None], tuple[Source | None, Source]]
Load = Callable[[str, Setup], nn.Module]


def data_of(backbone: str | Path, data: str | Path | None) -> str:
    """Return ``data``, by default the file of ``ldae embed`` in the backbone's place.

    Raises: InputError when there is neither.
    """
    if data is None and not is_embedded(backbone):
        raise InputError("no images: name their source with --data SOURCE")
    return str(data or backbone)


def labelled_splits(data: str, eval_data: str | None) -> tuple[Source, Source]:
    """Open the train and the evaluation split of labelled images, as ``open_splits`` does.

    Raises: InputError as it does, and for images without labels or of one class only.
    """
    train, test = open_splits(data, eval_data, images_or_embedded)
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


@contextmanager
def watch_openings(watch: Callable[[Evaluation], None]) -> Iterator[None]:
    """Let ``watch`` see each evaluation when it is opened, before its work begins."""
    before = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(before)


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


def open_backbone(spec: str, setup: EncoderSetup) -> nn.Module:
    """Open a network without its classifier, or a file of ``ldae embed`` in its place.

    Raises: InputError when it cannot be opened, and for settings that a file does not take.
    """
    if is_embedded(spec):
        for name in ("random_init", "in_chans", "img_size", "precision"):
            if getattr(setup, name) != getattr(EncoderSetup, name):
                flag = name.replace("_", "-")
                raise InputError(f"{spec} holds features: --{flag} is a setting of `ldae embed`")
        return _open_once(EmbeddedBackbone, spec)
    return _open_once(
        load_backbone,
        spec,
        random_init=setup.random_init,
        in_chans=setup.in_chans,
        img_size=setup.img_size,
        seed=setup.seed if setup.random_init else 0,
    )


def check_out(out: Path, task: str) -> None:
    """Check that an evaluation can write to a folder, before the work.

    Raises: InputError when it cannot, and when the folder is that of a run.
    """
    check_writable(out)
    if kind_of(out):
        raise InputError(
            f"--out {out} is the folder of a run, whose files the evaluation would replace: name "
            f"another folder, such as {out / layout.EVALS / task}"
        )


@contextmanager
def open_evaluation(
    task: str,
    spec: str | Path,
    data: str | Path,
    eval_data: str | Path | None,
    protocol: Protocol,
    setup: Setup,
    splits: Splits = labelled_splits,
    load: Load = open_backbone,
    in_run: bool = False,
    **options: object,
) -> Iterator[Evaluation]:
    """Join the process group, if one was launched, and open an evaluation.

    The seed of the setup becomes the seed of the protocol. Only a training that is an evaluation
    itself, ``in_run``, has its results in the folder of a run. ``options`` are the other settings
    of the command that decide the results, by name.

    Raises: InputError for a setting out of its range, for several seeds, for a run folder as
        ``out``, and as ``splits`` and ``load`` do.
    """
    spec, data = str(spec), str(data)
    eval_data = None if eval_data is None else str(eval_data)
    command = task.partition("-")[0]  # without the name of a protocol
    settings = {"data": data, "eval_data": eval_data, "protocol": protocol, "setup": setup}
    call = describe_call(command, [spec], **settings, **options)
    check(setup)
    if setup.seeds:
        raise InputError(f"{command} takes one --seed, not --seeds")
    if hasattr(protocol, "seed"):
        protocol = replace(protocol, seed=setup.seed)  # type: ignore[call-arg]  # as checked
    out = Path(setup.out or results_home(spec))
    if in_run:
        check_writable(out)
    else:
        check_out(out, task)
    device = device_for(setup.device)
    with process_group(device):
        train, test = splits(data, eval_data)
        model = load(spec, setup)
        transform = preprocessing(model)
        if isinstance(model, EmbeddedBackbone):
            setup = replace(setup, random_init=model.random_init, precision=model.precision)
        check_rows(model, train, test)
        opened = (model, train, test, device, transform)
        evaluation = Evaluation(task, spec, protocol, setup, *opened, call)
        if watch := _watch.get(None):
            watch(evaluation)
        yield evaluation
