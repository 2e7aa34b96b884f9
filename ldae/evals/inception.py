"""The Inception-v3 of FID: torch-fidelity's port of the published TensorFlow network."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ldae.backbones.weights import read_checkpoint
from ldae.data.transforms import CropTransform
from ldae.errors import InputError, first_line
from ldae.files import file_hash

# First digits of the SHA-256 of the published weights, at the end of their file's name.
PUBLISHED = "6726825d"


class Inception(nn.Module):
    """Inception-v3: uint8 RGB (B, 3, H, W) -> average-pooled features (B, dim).

    The network scales images to 299 x 299 itself, bilinearly as TensorFlow 1 does.

    Args:
        weights: a file of weights; by default the published file, downloaded once to torch's hub.

    Raises: InputError without the package, and when the weights cannot be downloaded or do not fit.
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
        # torch-fidelity would run the code in a pickled file. It gets a copy of the tensors, which
        # read_checkpoint reads without running code.
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
        self.file, self.sha256 = file.name, file_hash(file)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)[0]


def _download(url: str) -> Path:
    """Return the file, downloaded to torch-fidelity's place if missing, with its hash checked."""
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), PUBLISHED, progress=False)
        except (OSError, RuntimeError) as error:  # no network, a full disk or a wrong hash
            raise InputError(
                f"the weights of Inception-v3 cannot be downloaded ({first_line(error)}): name a "
                f"copy of {url} by --weights"
            ) from error
    return file


@dataclass(frozen=True)
class InceptionTransform(CropTransform):
    """A center crop as uint8, which the network normalises itself."""

    @property
    def input_size(self) -> tuple[int, int, int]:
        return self.in_chans, self.img_size, self.img_size

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        return images
