"""``ldae fid``: measure the distance of images to a reference set: FID, or in other features."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ldae.backbones.open import load_backbone
from ldae.devices import device_for
from ldae.distributed import is_main, process_group, world_size
from ldae.errors import InputError
from ldae.evals import dit_fid
from ldae.evals.call import describe_call
from ldae.evals.features import Encoder
from ldae.evals.frechet import frechet_distance, save_statistics
from ldae.evals.image_sets import (
    ImageSet,
    KnownStatistics,
    RunImages,
    SourceImages,
    open_reference,
)
from ldae.evals.inception import PUBLISHED, Inception, InceptionTransform
from ldae.evals.naming import changes, file_name, results_home, shortened, unshared_folder
from ldae.files import as_json, check_writable, state_hash, write_json
from ldae.precision import unchanged_generators
from ldae.runs import layout
from ldae.runs.environment import environment
from ldae.runs.kinds import kind_of, settings_of
from ldae.sampling.settings import SamplingSettings, check_settings
from ldae.tree import COUNT, NOT_NEGATIVE, AnyPath, check, difference

_INCEPTION = "inception"


@dataclass(frozen=True)
class FIDSettings:
    """The settings of the distance, beside the images and their sampling."""

    protocol: Literal["dit"] | None = None
    """dit: FID-50K as DiT reports it, which sets images and sampler, and refuses other settings, a
    run without optim.ema 0.9999, and a reference that is no file like ADM's (mu, sigma and arr_0)
    for images of this size; that it is the one of ImageNet is not checked."""
    images: Annotated[int | None, COUNT] = None
    """Number of samples of a run; by default 50,000."""
    features: str = _INCEPTION
    """inception, or the spec of a backbone: a distance in its features is not FID."""
    weights: AnyPath | None = None
    """File of Inception's weights; by default torch-fidelity's, downloaded once."""
    random_init: bool = False
    """Give the backbone timm's random weights."""
    img_size: Annotated[int | None, COUNT] = None
    """Side of Inception's center crop, by default the first image's; or of a timm name's images."""
    reference_split: Literal["train", "eval"] = "train"
    """Split of a reference that has splits."""
    save_stats: AnyPath | None = None
    """.npz file to write the reference's statistics to; it can be the reference another time."""
    out: AnyPath | None = None
    """File of the results; by default below evals/, in the run folder for samples of a run."""
    batch_size: Annotated[int, COUNT] = 64
    """Images per forward pass; the distance does not depend on it."""
    workers: Annotated[int, NOT_NEGATIVE] = 4
    """Processes that decode images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@unchanged_generators()
def fid(
    images: Annotated[AnyPath, tyro.conf.arg(metavar="IMAGES")],
    reference: Annotated[AnyPath | None, tyro.conf.arg(metavar="[REFERENCE]")] = None,
    /,
    *,
    setup: FIDSettings = FIDSettings(),
    sampling: SamplingSettings = SamplingSettings(),
) -> dict:
    """Measure the Frechet distance of images to a reference set: FID with Inception's features.

    Each image is counted once over all ranks. The mean and the unbiased covariance of the features
    are streamed in float64. Only distances of the same features, reference, crop and number of
    images can be compared; the results file names all of them.

    Args:
        images: a folder, .zip, .tar or .npz (arr_0) of images, or any other source; or a run, from
            which samples are generated.
        reference: images as above, but no run; or a .npz of statistics (mu, sigma), such as
            --save-stats writes; for a run, by default its training images.
        setup: the settings of the distance.
        sampling: the sampler of a run and its settings, as in `ldae sample`.

    Returns: the content of the results file.

    Raises: InputError for images or networks that cannot be opened, statistics of other features,
        and sets of fewer images than the features have dimensions.

    Examples:
        >>> sampling = ldae.SamplingSettings(sampler="heun", steps=18)
        >>> ldae.fid("runs/dit", sampling=sampling)["results"]["fid"]
    """
    images, reference = str(images), None if reference is None else str(reference)
    setup = _with_paths(setup)
    check(setup)
    check_settings(sampling)
    _check_files(images, setup)
    if reference and kind_of(Path(reference).expanduser()):
        raise InputError(f"the reference {reference} is a run: name a folder of its samples")
    device = device_for(setup.device)
    with process_group(device):
        ours = _open_images(images, setup, sampling, device)
        if setup.protocol:  # before weights are downloaded
            _refuse(setup.protocol, dit_fid.differences_of_samples(ours.record))
        reference = reference or _source_of_run(images)
        encoder, claim = _open_features(setup, ours, device)
        theirs = open_reference(reference, setup.reference_split, claim, encoder.dim)
        if setup.save_stats and isinstance(theirs, KnownStatistics):
            raise InputError(f"{reference} holds statistics already: there are none to save")
        for part in (ours, theirs):  # before the work
            part.check_enough(encoder.dim)
        name = "fid" if setup.features == _INCEPTION else "frechet_distance"
        record: dict[str, Any] = {
            "task": name,
            "protocol": {
                "distance": "|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), in float64",
                "covariance": "unbiased, divided by N - 1",
                "features": claim,
            },
            "images": ours.record | {"resized_twice": ours.resizes_twice(encoder)},
            "reference": theirs.record | {"resized_twice": theirs.resizes_twice(encoder)},
        }
        record["protocol"] |= _describe(record, setup)
        wanted = theirs.statistics(encoder, claim)  # before samples, which may take days
        if setup.save_stats and is_main():
            save_statistics(wanted, setup.save_stats)
        found = ours.statistics(encoder, claim)
        record["results"] = {name: frechet_distance(found, wanted)}
        record["environment"] = environment(device) | {"ranks": world_size()}
        record["call"] = describe_call("fid", [images, reference], setup=setup, sampling=sampling)
        if is_main():
            path = setup.out or _folder(record, setup, sampling) / layout.RESULTS
            print(f"{_summary(record)}; {path}")  # before writing, as the disk may be full
            write_json(path, record)
        return as_json(record)


def _with_paths(setup: FIDSettings) -> FIDSettings:
    """Return settings whose files are of the type Path, without ``~``."""
    named = {name: getattr(setup, name) for name in ("weights", "save_stats", "out")}
    return replace(setup, **{name: Path(file).expanduser() for name, file in named.items() if file})


def _check_files(images: str, setup: FIDSettings) -> None:
    """Check the files to write, before the work. Raises: InputError for one that cannot be."""
    for name, path in (("out", setup.out), ("save_stats", setup.save_stats)):
        if path and path.is_dir():
            raise InputError(f"{name} {path} is a folder, not a file")
    if setup.save_stats and setup.save_stats.suffix != ".npz":
        raise InputError(f"save_stats {setup.save_stats} must end in .npz")
    check_writable(setup.out.parent if setup.out else results_home(images))
    if setup.save_stats:
        check_writable(setup.save_stats.parent)


def _open_images(
    spec: str, setup: FIDSettings, sampling: SamplingSettings, device: torch.device
) -> ImageSet:
    """Open the samples of a run, or a source of images.

    Raises: InputError for settings of samples when ``spec`` is no run.
    """
    if kind_of(Path(spec).expanduser()):
        if setup.protocol:
            conditional = settings_of(
                Path(spec).expanduser(), "pretraining"
            ).model.class_conditional
            sampling = dit_fid.sampling_of_dit(sampling, conditional)
        count = setup.images or dit_fid.IMAGES
        return RunImages(Path(spec).expanduser(), count, sampling, device, setup.workers)
    given = [*difference(SamplingSettings(), sampling), *(["images"] if setup.images else [])]
    if given:
        what = "is no run folder" if Path(spec).expanduser().exists() else "does not exist"
        raise InputError(f"{given[0]} is for samples of a run, and {spec} {what}")
    return SourceImages(spec, "train")


def _source_of_run(spec: str) -> str:
    """Return the source of a run's training images. Raises: InputError for another spec."""
    if not kind_of(Path(spec).expanduser()):
        raise InputError(f"say what to compare {spec} with: ldae fid {spec} REFERENCE")
    return settings_of(Path(spec).expanduser(), "pretraining").data.source


def _open_features(
    setup: FIDSettings, ours: ImageSet, device: torch.device
) -> tuple[Encoder, dict]:
    """Open the network; return its encoder, and a description that tells its features from others'.

    Raises: InputError for settings of another network, and when there are too few images.
    """
    loading = {"batch_size": setup.batch_size, "workers": setup.workers}
    if setup.features == _INCEPTION:
        if setup.random_init:
            raise InputError("random_init is for a backbone: Inception's weights are --weights")
        ours.check_enough(Inception.dim)  # before the weights are downloaded
        transform = InceptionTransform(setup.img_size or min(ours.record["first_size"]))
        network = Inception(setup.weights)
        encoder = Encoder(network, device, transform=transform, **loading)
        claim = {
            "network": "Inception-v3 of torch-fidelity, features 2048",
            "weights": network.file,
            "published": network.sha256.startswith(PUBLISHED),
            "sha256": network.sha256,
            "sha256_of": "file",
            "preprocessing": asdict(transform)
            | {"resize": "bicubic to the crop; then 299 x 299, bilinear as TensorFlow 1"},
        }
    else:
        if setup.weights:
            raise InputError("weights are Inception's: a backbone's file is named as NAME@FILE")
        backbone = load_backbone(
            setup.features, random_init=setup.random_init, img_size=setup.img_size
        )
        encoder = Encoder(backbone, device, **loading)
        claim = {
            "network": setup.features + (" (random init)" if setup.random_init else ""),
            "sha256": state_hash(backbone.state_dict()),
            "sha256_of": "state dict",
            "preprocessing": asdict(encoder.transform),
        }
    return encoder, as_json(claim)  # as in a file of statistics


def _folder(record: dict, setup: FIDSettings, sampling: SamplingSettings) -> Path:
    """Return the folder of results.json, named by all that decides the distance."""
    images, reference = record["images"]["spec"], record["reference"]["spec"]
    random = ["random-init"] if setup.random_init else []
    name = "-".join(["fid", file_name(reference), *random, *changes(setup, sampling)])
    return unshared_folder(results_home(images) / shortened(name), _specs(record), _specs)


def _specs(record: dict) -> tuple[str, ...]:
    """Return what the name of the folder has in short: paths, and the hash of the network."""
    images, features = record["images"], record["protocol"]["features"]
    classifier = (images["samples"] or {}).get("classifier", "")
    return images["spec"], record["reference"]["spec"], features["sha256"], classifier


def _refuse(protocol: str, differences: list[str]) -> None:
    """Raise InputError when there are differences from a protocol."""
    if differences:
        raise InputError(f"protocol {protocol}: {'; '.join(differences)}")


def _describe(record: dict, setup: FIDSettings) -> dict:
    """Return the name of a distance, and all in which it differs from DiT's FID-50K.

    Raises: InputError when it differs and ``setup`` asks for DiT's.
    """
    differences = dit_fid.differences(record)
    if setup.protocol:
        _refuse(setup.protocol, differences)
    network = record["protocol"]["features"]
    if not differences:
        name = dit_fid.title(record)
    elif record["task"] != "fid":
        name = f"Frechet distance in the features of {network['network']}"
    elif network["published"]:
        name = "FID"
    else:
        name = f"FID (by {network['weights']}, which is not the published file)"
    return {"name": name, "differs_from_dit": differences}


def _summary(record: dict) -> str:
    sets = [
        f"{part['spec']} ({_number(part['images'])} images{_sampling(part.get('samples'))})"
        for part in (record["images"], record["reference"])
    ]
    (distance,) = record["results"].values()
    return f"{record['protocol']['name']} of {' to '.join(sets)}: {distance:.4g}"


def _number(count: int | None) -> str:
    return "an unknown number of" if count is None else f"{count:,}"


def _sampling(samples: dict | None) -> str:
    """Return the sampler of samples, and their settings that are not at the defaults."""
    if not samples or "sampler" not in samples:
        return ""
    words = [f", {samples['sampler']} in {samples['steps']} steps"]
    for name, default in as_json(asdict(SamplingSettings())).items():
        if name not in ("sampler", "steps", "seed") and samples.get(name, default) != default:
            words.append(f"{name} {samples[name]}")
    return ", ".join(words)
