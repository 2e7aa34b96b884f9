"""A Gaussian of a run's latents, from which samplers start where noise does not drown the data."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from ldae import console, files
from ldae.data.loader import epoch_order, eval_batches
from ldae.data.open import open_source
from ldae.distributed import barrier, is_main, rank, world_size
from ldae.errors import InputError
from ldae.method import LDAE
from ldae.runs import layout
from ldae.settings import Config
from ldae.tokenizers import PatchPCA
from ldae.tokenizers.moments import Moments
from ldae.train.run import transform_of

_BATCH = 256
_AXES_IMAGES = 1024  # of 64 tokens and more each, for at most 768 axes

# Of the largest variance of an axis: above the rounding of float32, in which covariances are kept.
_JITTER = 1e-6


class LatentGaussian:
    """z_0 (N, d) as d independent Gaussians, one of the N tokens on each principal axis of a token.

    A full covariance of N d numbers does not fit: at the paper's scale it is 8192^2, and it would
    take as many images to know it. The principal axes of a token are uncorrelated in it, and nearly
    so between tokens, while on one axis the tokens of an image are strongly correlated. So what is
    kept is d matrices of N x N.
    """

    def __init__(
        self, axes: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor, record: dict
    ) -> None:
        self.axes, self.mean, self.covariance = axes, mean, covariance
        """Orthonormal rows (d, d); (N, d); (d, N, N), of the latents on these axes."""
        self.record = record
        """What it was fitted on: source, images, tokenizer."""

    def noised(self, normals: torch.Tensor, gamma: float, sigma: float) -> torch.Tensor:
        """z_t of that level, from standard normal numbers (B, N, d), in their precision.

        As z_0 is Gaussian, so is gamma z_0 + sigma eps, and one draw is both.
        """
        factor = self._factor(gamma, sigma).to(normals)
        on_axes = torch.einsum("amn,bna->bma", factor, normals)
        return gamma * self.mean.to(normals) + on_axes @ self.axes.to(normals)

    @lru_cache(maxsize=1)  # a run starts all its batches at one level
    def _factor(self, gamma: float, sigma: float) -> torch.Tensor:
        """Cholesky's (d, N, N)."""
        covariance = gamma**2 * self.covariance.double()
        variances = covariance.diagonal(dim1=1, dim2=2)  # a view (d, N)
        variances += sigma**2 + _JITTER * variances.amax(1, keepdim=True)
        return torch.linalg.cholesky(covariance)

    def save(self, path: Path) -> None:
        """Raises: InputError when the disk does not take it."""
        tensors = {"axes": self.axes, "mean": self.mean, "covariance": self.covariance}
        files.write(path, safetensors.torch.save(tensors, self.record))

    @classmethod
    def load(cls, path: Path) -> "LatentGaussian":
        """Raises: InputError when the file is damaged."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                parts = (file.get_tensor(name) for name in ("axes", "mean", "covariance"))
                return cls(*parts, file.metadata())
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path} is damaged: delete it, and it is fitted again") from error


def gaussian_of_run(
    run: Path,
    config: Config,
    method: LDAE,
    device: torch.device,
    data: str | None = None,
    workers: int = 0,
) -> LatentGaussian:
    """The Gaussian of a run's latents, which is kept in its folder.

    It is fitted, once, on the first images in training order of the source ``data``, by default the
    run's own: as many as the tokenizer was (tokenizer.fit_images). It is fitted again when the
    run's tokenizer has changed since, or another source is asked for.

    Raises: InputError when the source can not be opened, BadImage for one that can not be decoded.
    """
    path = run / layout.LATENTS
    tokenizer = files.state_hash(method.tokenizer.state_dict())
    known = LatentGaussian.load(path) if path.is_file() else None
    barrier()  # every rank has looked before one of them writes
    spec = data or config.data.source
    if known and (known.record["tokenizer"], known.record["source"]) == (tokenizer, spec):
        return known
    if is_main():
        print(f"fitting a Gaussian to the latents of {spec}", flush=True)
    fitted = fit_gaussian(spec, config, method, device, workers)
    fitted.record["tokenizer"] = tokenizer
    if is_main():
        fitted.save(path)
    return fitted


@torch.no_grad()
def fit_gaussian(
    spec: str, config: Config, method: LDAE, device: torch.device, workers: int = 0
) -> LatentGaussian:
    """The Gaussian of the latents of a source's first images, in one pass; each rank its share."""
    source = open_source(spec, "train")
    count = min(config.tokenizer.fit_images or len(source), len(source))
    transform, tokenizer = transform_of(config), method.tokenizer
    order = epoch_order(config.seed, 0, len(source))

    def latents(images: int) -> Iterator[torch.Tensor]:
        own = order[:images][rank() :: world_size()]
        with console.progress(len(own), "latents") as bar:
            for pixels, _, indices in eval_batches(source, transform, own, _BATCH, workers):
                x = tokenizer.normalize(pixels.to(device))
                yield method.encode(x, indices.to(device)).double()
                bar.update(len(pixels))

    axes = torch.eye(tokenizer.dim, dtype=torch.float64, device=device)
    if not isinstance(tokenizer, PatchPCA):  # whose axes are principal as they are
        axes = principal_axes(latents(min(count, _AXES_IMAGES)), tokenizer.dim, device)
    tokens = [Moments(tokenizer.num_tokens, device) for _ in axes]
    for z_0 in latents(count):
        for axis, values in zip(tokens, (z_0 @ axes.T).unbind(-1), strict=True):
            axis.update(values)
    for axis in tokens:
        axis.all_reduce()
    mean = torch.stack([axis.mean() for axis in tokens], -1) @ axes
    covariance = torch.stack([axis.covariance() for axis in tokens])
    parts = (part.float().cpu() for part in (axes, mean, covariance))
    return LatentGaussian(*parts, {"source": spec, "images": str(count)})


def principal_axes(latents: Iterable[torch.Tensor], dim: int, device: torch.device) -> torch.Tensor:
    """Of single tokens of latents (B, N, dim): orthonormal rows, by falling variance."""
    moments = Moments(dim, device)
    for z_0 in latents:
        moments.update(z_0.flatten(0, 1))
    moments.all_reduce()
    return torch.linalg.eigh(moments.covariance()).eigenvectors.T.flip(0)
