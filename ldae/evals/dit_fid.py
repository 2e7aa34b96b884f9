"""FID-50K as DiT reports it: its settings, and what differs from them in a measured distance."""

from dataclasses import asdict, replace
from pathlib import Path

from ldae.files import as_json
from ldae.sampling.settings import SamplingSettings
from ldae.tree import difference

IMAGES = 50_000
_SAMPLING = SamplingSettings(sampler="ddpm", steps=250)
_EMA = 0.9999


def sampling_of_dit(sampling: SamplingSettings, class_conditional: bool) -> SamplingSettings:
    """Return ``sampling`` with DiT's settings in place of defaults."""
    changed = {name: value for name, (_, value) in difference(SamplingSettings(), sampling).items()}
    return replace(_sampling(class_conditional), **changed)


def differences(record: dict) -> list[str]:
    """List the differences of a distance from DiT's FID-50K, except for the row of the run.

    Source: Peebles and Xie 2023, Scalable Diffusion Models with Transformers, section 4.

    Args:
        record: the content of the results file; results are not needed.
    """
    images, features = record["images"], record["protocol"]["features"]
    listed = differences_of_samples(images)
    size = images["first_size"][0]
    if not features.get("published"):
        listed.append("the features are not those of the published Inception-v3")
    elif features["preprocessing"]["img_size"] != size:
        listed.append(f"img_size is {features['preprocessing']['img_size']}, not {size}")
    reference = record["reference"]
    if "sha256" not in reference or reference["first_size"] != images["first_size"]:
        listed.append(f"the reference is no file like ADM's (mu, sigma, arr_0) for {size} pixels")
    return listed


def differences_of_samples(images: dict) -> list[str]:
    """List the differences of samples from DiT's, given their record."""
    samples = images["samples"]
    if not samples or "training" not in samples:
        return ["the images have no record of the run that generated them, or one without its EMA"]
    found = asdict(SamplingSettings()) | samples  # an older record lacks settings at their defaults
    found |= samples["training"] | {"images": images["images"]}
    wanted = asdict(_sampling(found["class_conditional"])) | {
        "images": IMAGES,
        "ema": _EMA,
        "ema_warmup": False,
    }
    del wanted["seed"]
    return [
        f"{name} is {found.get(name)}, not {value}"
        for name, value in as_json(wanted).items()
        if found.get(name) != value
    ]


def title(record: dict) -> str:
    """Return the name of a distance whose ``differences`` are none.

    DiT learns the variance of a step of its sampler; here it is fixed, also for DiT's weights. The
    reference is named, because nothing shows that its images are those of ImageNet.
    """
    reference = Path(record["reference"]["spec"]).name
    row = record["images"]["samples"]["training"]["row"]
    other = "" if row == "dit" else f", but of {f'row {row}' if row else 'no row of the paper'}"
    return f"FID-50K (DiT's protocol with fixed variances, against {reference}{other})"


def _sampling(class_conditional: bool) -> SamplingSettings:
    return replace(_SAMPLING, random_labels=class_conditional)
