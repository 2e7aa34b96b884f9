"""An evaluation: a backbone, two splits, a protocol and a setup; and its results.json."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from ldae.backbones.preprocessing import EvalTransform
from ldae.backbones.whitening import is_whitened
from ldae.data.source import Source
from ldae.distributed import is_main, world_size
from ldae.errors import InputError
from ldae.evals.embedded import EmbeddedBackbone
from ldae.evals.features import Encoder, Features, Precision, extract_share, known_labels
from ldae.evals.naming import changes, default_folder
from ldae.evals.protocol import Protocol
from ldae.evals.taps import Reader, Tap, TapReader
from ldae.files import as_json, state_hash, write_json
from ldae.runs import layout
from ldae.runs.environment import environment
from ldae.tree import COUNT, NOT_NEGATIVE, AnyPath, convert_fields

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
    """The settings that open and run a backbone.

    Raises: InputError for a value of another type or out of range.
    """

    random_init: bool = False
    """Take the untrained control: the same architecture with timm's random weights."""
    in_chans: Annotated[int, COUNT] = 3
    """Input channels, of a timm name."""
    img_size: Annotated[int | None, COUNT] = None
    """Side of the input images in pixels, of a timm name."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of the random weights, and of the protocol of an evaluation."""
    batch_size: Annotated[int, COUNT] = 256
    """Images per forward pass of the backbone. It changes features by rounding alone."""
    workers: Annotated[int, NOT_NEGATIVE] = 4
    """Processes that decode images."""
    precision: Precision = "fp32"
    """Precision of the backbone's arithmetic."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        convert_fields(self)


@dataclass(frozen=True)
class Setup(EncoderSetup):
    """The settings of every evaluation that are not part of its protocol."""

    out: AnyPath | None = None
    """Folder of results.json; by default beside the backbone, or below evals/."""
    seeds: Annotated[tuple[int, ...], NOT_NEGATIVE] = ()
    """Seeds that each give a result of its own, in a folder of its own; results.json has their
    means, and their standard deviations as spread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out:
            object.__setattr__(self, "out", Path(self.out).expanduser())
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
        setup = self.setup
        return Encoder(
            self.model,
            self.device,
            setup.precision,
            self.transform,
            reader,
            batch_size=setup.batch_size,
            workers=setup.workers,
        )

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
        constants = asdict(self.protocol) | self.protocol.file_hashes() | follows
        constants |= {"precision": self.setup.precision}
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
            "data": self._describe_data() | {"classes": classes},
            "results": results,
            "environment": environment(self.device) | {"ranks": world_size()},
            "call": self.call,
        }
        if is_main():
            control = " (random init)" if self.setup.random_init else ""
            numbers = [
                f"{name} {results[name]:.2f}" for name in self.protocol.headlines if name in results
            ]
            subject = f"{self.task} of {self.spec}{control} on {self.eval.spec}"
            print(f"{subject}: {', '.join(numbers)}; {path}", flush=True)
            write_json(path, record)  # after the numbers are shown: the disk may be full
            path.with_name(layout.PREDICTIONS).unlink(missing_ok=True)  # of a former evaluation
        return as_json(record)

    def _describe_data(self) -> dict:
        """Return what a record says about the images of both splits."""
        learned = self.train or self.eval
        return {
            "spec": learned.spec,
            "eval_spec": self.eval.spec,
            "fingerprint": learned.fingerprint(),
            "eval_fingerprint": self.eval.fingerprint(),
            "resized_twice": any(
                source.resizes_twice(self.transform) for source in (learned, self.eval)
            ),
            "train_images": len(self.train) if self.train else None,
            "eval_images": len(self.eval),
        }

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
    cfg = getattr(model, "pretrained_cfg", {})  # a detector has none
    pool = getattr(model, "global_pool", None)  # in timm's ResNets a module
    pool = getattr(pool, "pool_type", pool)
    return {
        "spec": spec,
        "architecture": cfg.get("architecture"),
        "global_pool": pool if isinstance(pool, str) else None,
        "timestep": getattr(model, "timestep", None),
        "whitened": is_whitened(cfg),
        "random_init": setup.random_init,
        "seed": setup.seed if setup.random_init else None,
        "sha256": state_hash(model.state_dict()),
        "images_seen": getattr(model, "images_seen", None),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "preprocessing": asdict(transform),
    }
