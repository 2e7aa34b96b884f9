"""Inception-v3 as FID uses it: torch-fidelity's port of the published TensorFlow network."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ldae.backbones.weights import read_checkpoint
from ldae.data.transforms import CropTransform
from ldae.errors import InputError, first_line

# The first digits of the sha256 of the published weights, which their file's name ends with.
PUBLISHED = "6726825d"


class Inception(nn.Module):
    """uint8 RGB (B, 3, H, W) -> the averaged features (B, dim).

    The network itself scales images to 299 x 299, bilinearly as TensorFlow 1 does.

    Args:
        weights: a file of its weights; None: the published ones, downloaded once into torch's hub.

    Raises: InputError without the package, and when the weights cannot be had or do not fit.
    """

    dim = 2048

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        except ImportError as error:
            raise InputError(
                "Inception-v3 needs the package torch-fidelity: pip install 'ldae[fid]'; "
                "--features takes any backbone instead"
            ) from error
        file = weights or _download(fidelity.URL_INCEPTION_V3)
        state = read_checkpoint(file)
        # torch-fidelity would run the code that a pickled file may hold: it gets our own copy of
        # what was read without running any.
        copy = io.BytesIO()
        torch.save(state, copy)
        copy.seek(0)
        try:
            self.network = fidelity.FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(self.dim)], feature_extractor_weights_path=copy
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file} does not hold the weights of torch-fidelity's Inception-v3"
            ) from error
        with open(file, "rb") as content:
            self.sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        self.file = file.name

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)[0]


def _download(url: str) -> Path:
    """torch-fidelity's file where torch-fidelity looks for it, its hash checked when it arrives."""
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), PUBLISHED, progress=False)
        except (OSError, RuntimeError) as error:  # of network, disk or hash
            raise InputError(
                f"the weights of Inception-v3 cannot be downloaded ({first_line(error)}): give "
                f"the file by --weights, as {url} has it"
            ) from error
    return file


@dataclass(frozen=True)
class InceptionTransform(CropTransform):
    """A center crop as uint8; the network normalises by itself."""

    @property
    def input_size(self) -> tuple[int, int, int]:
        return self.in_chans, self.img_size, self.img_size

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        return images
