"""``ldae fid``: how far images are from others: FID, and its like in other features."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image

from ldae.backbones.open import load_backbone
from ldae.backbones.run import load_run
from ldae.console import progress
from ldae.data.image import from_array
from ldae.data.open import open_source
from ldae.distributed import device_for, is_main, process_group, rank, world_size
from ldae.errors import InputError
from ldae.evals.evaluation import changes, file_name
from ldae.evals.features import Encoder
from ldae.evals.frechet import (
    Statistics,
    frechet_distance,
    load_statistics,
    save_statistics,
    statistics_of,
)
from ldae.evals.inception import PUBLISHED, Inception, InceptionTransform
from ldae.files import state_hash, write_json
from ldae.runs import layout
from ldae.runs.environment import environment
from ldae.runs.kinds import kind_of, settings_of
from ldae.sampling.album import read_record
from ldae.sampling.generation import prepare_generation
from ldae.sampling.settings import SamplingSettings, check_settings
from ldae.tokenizers.moments import Moments
from ldae.tree import COUNT, NOT_NEGATIVE, check

INCEPTION = "inception"
_SAMPLES = 50_000  # FID-50K


@dataclass(frozen=True)
class FIDSettings:
    """What decides the distance beside the images, and how it is computed."""

    images: Annotated[int | None, COUNT] = None
    """Samples to draw from a run; by default 50,000."""

    features: str = INCEPTION
    """inception, or the spec of a backbone, whose distance is another number than FID."""
    weights: Path | None = None
    """File of Inception's weights; by default torch-fidelity's, downloaded once."""
    random_init: bool = False
    """Give the backbone timm's random weights."""
    img_size: Annotated[int | None, COUNT] = None
    """Side of Inception's center crop, by default the first image's; or of a timm name's images."""
    reference_split: Literal["train", "eval"] = "train"
    """Split of a reference that has splits."""
    save_stats: Path | None = None
    """.npz file for the reference's statistics, which can stand in its place another time."""
    out: Path | None = None
    """File of the results; by default a .json in the images' folder, or beside their file."""
    batch_size: Annotated[int, COUNT] = 64
    """Images at a time through the network; it does not change the distance."""
    workers: Annotated[int, NOT_NEGATIVE] = 4
    """Processes that decode images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


class SourceImages:
    """All images of a source."""

    def __init__(self, spec: str, split: Literal["train", "eval"]) -> None:
        self.spec, self._source = spec, open_source(spec, split)

    def __len__(self) -> int:
        return len(self._source)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the first, in pixels."""
        image = self._source.image(0)
        return image.size if isinstance(image, Image.Image) else image.shape[1::-1]

    def features(self, encoder: Encoder, setup: FIDSettings) -> Iterator[torch.Tensor]:
        """Those of this rank's share, (B, D) at a time."""
        for rows, _ in encoder.share(self._source, setup.batch_size, setup.workers):
            yield rows

    def record(self) -> dict:
        record = {"spec": self.spec, "split": self._source.split, "images": len(self)}
        return record | {"first_size": list(self.size), "samples": read_record(Path(self.spec))}


class RunImages:
    """Samples of a run, which are drawn as they are needed and kept nowhere."""

    def __init__(
        self, run: Path, count: int, how: SamplingSettings, device: torch.device, workers: int
    ):
        method, state = load_run(run)
        self._create, _, self._record = prepare_generation(
            run, method, state, how, device, workers=workers
        )
        self.spec, self.size, self._count = str(run), 2 * (method.tokenizer.img_size,), count
        self._device = device

    def __len__(self) -> int:
        return self._count

    def features(self, encoder: Encoder, setup: FIDSettings) -> Iterator[torch.Tensor]:
        """Those of this rank's share, (B, D) at a time, as if they were read from a file."""
        own = range(rank(), len(self), world_size())
        with progress(len(own), self.spec) as bar:
            for first in range(0, len(own), setup.batch_size):
                numbers = torch.tensor(own[first : first + setup.batch_size])
                pictures = self._create(numbers.to(self._device)).movedim(1, -1).numpy()
                rng = np.random.default_rng(0)  # which no transform for evaluation draws from
                images = [encoder.transform(from_array(picture), rng) for picture in pictures]
                yield encoder.checked(
                    torch.stack(images), lambda row: f"sample {int(numbers[row])} of {self.spec}"
                )
                bar.update(len(numbers))

    def record(self) -> dict:
        record = {"spec": self.spec, "images": len(self), "first_size": list(self.size)}
        return record | {"samples": self._record}


Images = SourceImages | RunImages


def fid(
    images: Annotated[str, tyro.conf.arg(metavar="IMAGES")],
    reference: Annotated[str | None, tyro.conf.arg(metavar="[REFERENCE]")] = None,
    /,
    *,
    setup: FIDSettings = FIDSettings(),
    how: SamplingSettings = SamplingSettings(),
) -> dict:
    """The Frechet distance of images to a reference set, FID when the features are Inception's.

    Images are counted once over all ranks; the mean and the unbiased covariance of their features
    are streamed in float64. Only numbers of the same features, reference, crop and count can be
    compared: the results file tells all of them.

    Args:
        images: a folder, .zip, .tar or .npz (arr_0) of images, or any other source; or a run, from
            which samples are drawn.
        reference: the same without runs, or a .npz of statistics (mu, sigma), such as --save-stats
            writes; for a run, by default the images that it was trained on.
        setup: what decides the distance, and how it is computed.
        how: the sampler of a run and its settings, as those of `ldae sample`.

    Returns: what the results file holds.

    Raises: InputError for images or networks that cannot be opened, statistics of other features,
        and sets of fewer images than the features have dimensions.
    """
    check(setup)
    check_settings(how)
    _check_files(setup)
    if reference and kind_of(Path(reference)):
        raise InputError(f"the reference {reference} is a run: name a folder of its samples")
    device = device_for(setup.device)
    with process_group(device):
        ours = _open_images(images, setup, how, device)
        if reference is None:
            reference = _source_of_run(images)
        encoder, claim = _open_features(setup, ours, device)
        theirs = _statistics_in(reference, claim, encoder.dim)
        if theirs is None:
            theirs = SourceImages(reference, setup.reference_split)
        elif setup.save_stats:
            raise InputError(f"{reference} holds statistics already: there are none to save")
        _check_enough(ours, encoder.dim)  # before the work, not after
        _check_enough(theirs, encoder.dim)
        found, wanted = (_statistics(part, encoder, claim, setup) for part in (ours, theirs))
        is_fid = setup.features == INCEPTION
        name = "fid" if is_fid else "frechet_distance"
        record = {
            "task": name,
            "protocol": {
                "distance": "|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), in float64",
                "covariance": "unbiased, divided by N - 1",
                "features": claim,
            },
            "images": ours.record(),
            "reference": _record_of(theirs, reference),
            "results": {name: frechet_distance(found, wanted)},
            "environment": environment(device),
        }
        if is_main():
            path = setup.out or _path(images, reference, setup, how)
            print(f"{_summary(record)}; {path}")  # first: the disk may be full
            write_json(path, record)
            if setup.save_stats:
                save_statistics(wanted, setup.save_stats)
        return record


def _check_files(setup: FIDSettings) -> None:
    """Check the files to write. Raises: InputError for a folder, or statistics without .npz."""
    for name, path in (("out", setup.out), ("save_stats", setup.save_stats)):
        if path and path.is_dir():
            raise InputError(f"{name} {path} is a folder, not a file")
    if setup.save_stats and setup.save_stats.suffix != ".npz":
        raise InputError(f"save_stats {setup.save_stats} must end in .npz")


def _open_images(
    spec: str, setup: FIDSettings, how: SamplingSettings, device: torch.device
) -> Images:
    if kind_of(Path(spec)):
        return RunImages(Path(spec), setup.images or _SAMPLES, how, device, setup.workers)
    given = [
        name for name, value in asdict(how).items() if value != getattr(SamplingSettings(), name)
    ]
    given += ["images"] if setup.images else []
    if given:
        raise InputError(f"{given[0]} is for samples of a run, and {spec} is no run folder")
    return SourceImages(spec, "train")


def _source_of_run(spec: str) -> str:
    if not kind_of(Path(spec)):
        raise InputError(f"say what to compare {spec} with: ldae fid {spec} REFERENCE")
    return settings_of(Path(spec), "pretraining").data.source


def _open_features(setup: FIDSettings, ours: Images, device: torch.device) -> tuple[Encoder, dict]:
    """The network that is asked for, and what tells its features from those of any other."""
    if setup.features == INCEPTION:
        if setup.random_init:
            raise InputError("random_init is for a backbone: Inception's weights are --weights")
        _check_enough(ours, Inception.dim)  # before its weights are asked for
        transform = InceptionTransform(setup.img_size or min(ours.size))
        network = Inception(setup.weights)
        claim = {
            "network": "Inception-v3 of torch-fidelity, features 2048",
            "weights": network.file,
            "published": network.sha256.startswith(PUBLISHED),
            "sha256": network.sha256,
            "sha256_of": "file",
            "preprocessing": asdict(transform)
            | {"resize": "bicubic to the crop; then 299 x 299, bilinear as TensorFlow 1"},
        }
        return Encoder(network, device, transform=transform), claim
    if setup.weights:
        raise InputError("weights are Inception's: a backbone's file is named as NAME@FILE")
    network = load_backbone(setup.features, random_init=setup.random_init, img_size=setup.img_size)
    encoder = Encoder(network, device)
    claim = {
        "network": setup.features + (" (random init)" if setup.random_init else ""),
        "sha256": state_hash(network.state_dict()),
        "sha256_of": "state dict",
        "preprocessing": asdict(encoder.transform),
    }
    return encoder, json.loads(json.dumps(claim))


def _statistics_in(reference: str, claim: dict, dim: int) -> Statistics | None:
    """The statistics that a .npz file brings, None when its images are to be looked at instead.

    A file that does not tell its features, as those of the ADM suite, is taken for Inception's.
    """
    path = Path(reference).expanduser()
    found = load_statistics(path) if path.suffix == ".npz" and path.is_file() else None
    if found is None:
        return None
    if not found.claim and "published" not in claim:
        if "arr_0" in np.load(path).files:
            return None
        raise InputError(
            f"the statistics of {reference} do not tell their features, and so are taken for those "
            f"of Inception-v3, not of {claim['network']}"
        )
    for key in ("sha256", "preprocessing"):
        if found.claim and found.claim.get(key) != claim[key]:
            raise InputError(
                f"the statistics of {reference} are those of other features: {key} is "
                f"{found.claim.get(key)} there, {claim[key]} here"
            )
    if len(found.mean) != dim:
        raise InputError(
            f"the statistics of {reference} are of {len(found.mean)} features, not {dim}"
        )
    return found


def _check_enough(images: Images | Statistics, dim: int) -> None:
    if isinstance(images, Statistics):
        count, spec = images.count, "the reference"
    else:
        count, spec = len(images), images.spec
    if count is not None and count < max(dim, 2):
        raise InputError(
            f"{spec} has {count:,} images, fewer than the {dim:,} dimensions of the features: "
            "their covariance cannot be estimated"
        )


def _statistics(
    images: Images | Statistics, encoder: Encoder, claim: dict, setup: FIDSettings
) -> Statistics:
    """Of all images of a set, each counted once over all ranks; or those that are given."""
    if isinstance(images, Statistics):
        return images
    moments = Moments(encoder.dim, encoder.device)
    for rows in images.features(encoder, setup):
        moments.update(rows.to(encoder.device, torch.float64))
    moments.all_reduce()
    return statistics_of(moments, claim)


def _record_of(reference: SourceImages | Statistics, spec: str) -> dict:
    if isinstance(reference, SourceImages):
        return reference.record()
    features = reference.claim or "not stated by the file, taken for those of Inception-v3"
    return {"spec": spec, "images": reference.count, "features": features}


def _path(images: str, reference: str, setup: FIDSettings, how: SamplingSettings) -> Path:
    """Where the results go: what decides the distance is in the name, so that none is lost."""
    random = ["random-init"] if setup.random_init else []
    name = "-".join(["fid", file_name(reference), *random, *changes(setup, how)]) + ".json"
    home = Path(images).expanduser()
    if kind_of(home):
        return home / layout.EVALS / name
    if home.is_dir():
        return home / name
    if home.is_file():
        return home.with_name(f"{home.name}-{name}")
    return Path(layout.EVALS, file_name(images), name)


def _summary(record: dict) -> str:
    (name, distance), network = *record["results"].items(), record["protocol"]["features"]
    what = "FID" if name == "fid" else f"Frechet distance in the features of {network['network']}"
    if not network.get("published", True):
        what += f" (by {network['weights']}, which is not the published file)"
    ours, theirs = (
        f"{record[part]['spec']} ({_number(record[part]['images'])} images)"
        for part in ("images", "reference")
    )
    return f"{what} of {ours} to {theirs}: {distance:.4g}"


def _number(count: int | None) -> str:
    return "an unknown number of" if count is None else f"{count:,}"
