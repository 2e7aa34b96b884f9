"""Sets of images for the Frechet distance: a source, samples of a run, or a file of statistics."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ldae.backbones.run import load_method
from ldae.data.image import from_array
from ldae.data.open import open_source
from ldae.distributed import share_of
from ldae.errors import InputError
from ldae.evals.features import Encoder
from ldae.evals.frechet import Statistics, load_statistics, statistics_of
from ldae.files import as_json, file_hash
from ldae.moments import Moments
from ldae.sampling.album import read_record
from ldae.sampling.generation import generate_batches, prepare_generation
from ldae.sampling.settings import SamplingSettings


class ImageSet:
    """A set of images; ``record`` describes the set in results.json.

    ``count`` is the number of images, or None when it is unknown.
    """

    def __init__(self, record: dict) -> None:
        self.record = as_json(record)
        self.spec, self.count = record["spec"], record["images"]

    def check_enough(self, dim: int) -> None:
        """Raise InputError when the images are too few for the covariance of ``dim`` features."""
        if self.count is not None and self.count < max(dim, 2):
            raise InputError(
                f"{self.spec} has {self.count:,} images, fewer than the {dim:,} dimensions of the "
                "features: their covariance cannot be estimated"
            )

    def resizes_twice(self, encoder: Encoder) -> bool:
        """Return whether the encoder resizes images that were resized before, see ``Source``."""
        return False

    def statistics(self, encoder: Encoder, claim: dict) -> Statistics:
        """Return the statistics of the features, each image counted once over all ranks."""
        moments = Moments.of(self.features(encoder), encoder.dim, encoder.device)
        return statistics_of(moments, claim)

    def features(self, encoder: Encoder) -> Iterator[torch.Tensor]:
        """Yield the features of this rank's share of the images, in batches (B, D)."""
        raise NotImplementedError


class SourceImages(ImageSet):
    """All images of a source."""

    def __init__(self, spec: str, split: Literal["train", "eval"]) -> None:
        self._source = open_source(spec, split)
        first = self._source.image(0)
        size = first.size if isinstance(first, Image.Image) else first.shape[1::-1]
        super().__init__(
            {
                "spec": spec,
                "split": self._source.split,
                "images": len(self._source),
                "fingerprint": self._source.fingerprint(),
                "first_size": list(size),  # width and height in pixels
                "samples": read_record(Path(spec)),
            }
        )

    def resizes_twice(self, encoder: Encoder) -> bool:
        return self._source.resizes_twice(encoder.transform)

    def features(self, encoder: Encoder) -> Iterator[torch.Tensor]:
        for rows, _ in encoder.share(self._source):
            yield rows


class RunImages(ImageSet):
    """Samples of a run, which are generated when they are needed and not kept."""

    def __init__(
        self, run: Path, count: int, sampling: SamplingSettings, device: torch.device, workers: int
    ) -> None:
        method, state = load_method(run)
        self._generate, _, samples = prepare_generation(
            run, method, state, sampling, device, workers=workers
        )
        self._device, size = device, 2 * [method.tokenizer.img_size]
        super().__init__(
            {"spec": str(run), "images": count, "first_size": size, "samples": samples}
        )

    def features(self, encoder: Encoder) -> Iterator[torch.Tensor]:
        share = share_of(self.count)
        rng = np.random.default_rng(0)  # transforms for evaluation draw nothing from it
        batches = generate_batches(self._generate, share, encoder.batch_size, self._device)
        for numbers, images in batches:
            pictures = map(from_array, images.movedim(1, -1).numpy())
            yield encoder.checked(
                torch.stack([encoder.transform(picture, rng) for picture in pictures]),
                lambda row: f"sample {int(numbers[row])} of {self.spec}",
            )


class KnownStatistics(ImageSet):
    """Images of which only the statistics of their features are known."""

    def __init__(self, spec: str, statistics: Statistics, record: dict) -> None:
        features = statistics.claim or "not stated by the file, taken for those of Inception-v3"
        super().__init__({"spec": spec, "images": statistics.count, "features": features} | record)
        self._statistics = statistics

    def statistics(self, *_: object) -> Statistics:
        return self._statistics


def open_reference(spec: str, split: Literal["train", "eval"], claim: dict, dim: int) -> ImageSet:
    """Open a source, or the statistics in a .npz file.

    Statistics without a claim, as in the files of the ADM suite, are taken for Inception's. For
    other features the images of the file are used, if there are any.

    Args:
        claim: description of the features; it has the key ``published`` for Inception's.
        dim: number of features.

    Raises: InputError when the reference cannot be opened, or has statistics of other features.
    """
    path = Path(spec).expanduser()
    found = load_statistics(path) if path.suffix == ".npz" and path.is_file() else None
    if found is None:
        return SourceImages(spec, split)
    with np.load(path) as file:
        images = SourceImages(spec, split) if "arr_0" in file else None
    if not found.claim and "published" not in claim:
        if images:
            return images
        raise InputError(
            f"the statistics of {spec} do not name their features, and so are taken for those of "
            f"Inception-v3, not of {claim['network']}"
        )
    for key in ("sha256", "preprocessing"):
        if found.claim and found.claim.get(key) != claim[key]:
            raise InputError(
                f"the statistics of {spec} are those of other features: {key} is "
                f"{found.claim.get(key)} there, {claim[key]} here"
            )
    if len(found.mean) != dim:
        raise InputError(f"the statistics of {spec} are of {len(found.mean)} features, not {dim}")
    first_size = images.record["first_size"] if images else None
    return KnownStatistics(spec, found, {"sha256": file_hash(path), "first_size": first_size})
