"""A Gaussian fitted to a run's latents, where samplers start if the noisiest z_t has signal."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from ldae import console, files
from ldae.data.image import BadImage
from ldae.data.loader import crop_batches, epoch_order
from ldae.data.open import open_source
from ldae.distributed import barrier, is_main, rank, world_size
from ldae.errors import InputError
from ldae.method import LDAE
from ldae.moments import Moments
from ldae.precision import float32_products
from ldae.runs import layout
from ldae.settings import Config
from ldae.tokenizers import PatchPCA
from ldae.train.run import transform_of

_BATCH = 256
_AXES_IMAGES = 1024  # with at least 64 tokens each, for at most 768 axes

# This share of an axis's largest variance is added to its diagonal. It exceeds the rounding errors
# of float32, in which covariances are stored.
_JITTER = 1e-6


@dataclass(frozen=True, eq=False)
class LatentGaussian:
    """A model of z_0 (N, d): one Gaussian over the N tokens for each principal axis of a token.

    A full covariance of N d numbers is too large. At the paper's scale it has 8192^2 entries, and
    estimating it takes more than 8192 images. The principal axes of a token are uncorrelated in the
    token and nearly uncorrelated between tokens. On one axis, the tokens of an image are strongly
    correlated. So d covariances of N x N are stored.
    """

    axes: torch.Tensor
    """Orthonormal rows (d, d)."""
    mean: torch.Tensor
    """Mean of the latents (N, d)."""
    covariance: torch.Tensor
    """Covariance of the tokens on each axis (d, N, N)."""
    record: dict
    """The source, the number of images and the hash of the tokenizer that it was fitted to."""

    def sample_noised(self, normals: torch.Tensor, gamma: float, sigma: float) -> torch.Tensor:
        """Turn standard normal numbers (B, N, d) into samples of z_t = gamma z_0 + sigma eps.

        z_t is Gaussian because z_0 is, so one draw is enough. The result has the precision of
        ``normals``.
        """
        factor = self._factor(gamma, sigma).to(normals)
        on_axes = torch.einsum("amn,bna->bma", factor, normals)
        return gamma * self.mean.to(normals) + on_axes @ self.axes.to(normals)

    @lru_cache(maxsize=1)  # noqa: B019  # all batches of a run start at one level
    def _factor(self, gamma: float, sigma: float) -> torch.Tensor:
        """Return the Cholesky factors of the covariances of z_t, (d, N, N)."""
        covariance = gamma**2 * self.covariance.double()
        variances = covariance.diagonal(dim1=1, dim2=2)  # a view (d, N)
        variances += sigma**2 + _JITTER * variances.amax(1, keepdim=True)
        return torch.linalg.cholesky(covariance)

    def save(self, path: Path) -> None:
        """Write the Gaussian as safetensors.

        Raises: InputError when it cannot be written.
        """
        tensors = {"axes": self.axes, "mean": self.mean, "covariance": self.covariance}
        files.write(path, safetensors.torch.save(tensors, self.record))

    @classmethod
    def load(cls, path: Path) -> "LatentGaussian":
        """Read a Gaussian that ``save`` wrote.

        Raises: InputError when the file is damaged.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                parts = (file.get_tensor(name) for name in ("axes", "mean", "covariance"))
                return cls(*parts, file.metadata())
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path} is damaged: delete it to fit the Gaussian again") from error


def load_or_fit_gaussian(
    run: Path,
    config: Config,
    method: LDAE,
    device: torch.device,
    data: str | None = None,
    workers: int = 0,
) -> LatentGaussian:
    """Return the Gaussian of a run's latents, from the run folder if it is there.

    Otherwise, when the run's tokenizer has changed, or when ``data`` names another source, it is
    fitted to the first tokenizer.fit_images images of ``data``, in training order, and written
    there, if the folder can be written to. ``data`` is by default the source of the Gaussian in the
    folder, or else the run's.

    Raises: InputError when the source cannot be opened; BadImage when an image cannot be decoded,
        unless data.bad_images is skip.
    """
    path = run / layout.LATENTS
    tokenizer = files.state_hash(method.tokenizer.state_dict())
    stored = LatentGaussian.load(path) if path.is_file() else None
    barrier()  # all ranks have read the file before rank 0 writes
    if stored and stored.record["tokenizer"] == tokenizer:
        if data in (None, stored.record["source"]):
            return stored
    spec = data or config.data.source
    console.print_main(f"fitting a Gaussian to the latents of {spec}")
    with float32_products():
        fitted = fit_gaussian(spec, config, method, device, workers)
    fitted.record["tokenizer"] = tokenizer
    if is_main():
        try:
            fitted.save(path)
        except InputError as error:  # the run may be another user's
            console.print_main(f"{error}; it is fitted again next time")
    return fitted


@torch.no_grad()
def fit_gaussian(
    spec: str, config: Config, method: LDAE, device: torch.device, workers: int = 0
) -> LatentGaussian:
    """Fit a Gaussian to the latents of a source's first images; each rank encodes its share.

    Images that the training skipped are left out.
    """
    source = open_source(spec, "train")
    count = min(config.tokenizer.fit_images or len(source), len(source))
    transform, tokenizer = transform_of(config), method.tokenizer
    order = epoch_order(config.seed, 0, len(source))

    def latents(images: int) -> Iterator[torch.Tensor]:
        share = order[:images][rank() :: world_size()]
        with console.progress(len(share), "latents") as bar:
            for batch in crop_batches(source, transform, share, _BATCH, workers):
                if batch.bad and config.data.bad_images == "stop":
                    raise BadImage(batch.bad[0][1])
                good = batch.targets == 0
                x = tokenizer.normalize(batch.images[good].to(device))
                yield method.encode(x, batch.positions[good].to(device)).double()
                bar.update(len(good))

    axes = torch.eye(tokenizer.dim, dtype=torch.float64, device=device)
    if not isinstance(tokenizer, PatchPCA):  # the latents of PatchPCA are on their principal axes
        axes = principal_axes(latents(min(count, _AXES_IMAGES)), tokenizer.dim, device)
    moments = [Moments(tokenizer.num_tokens, device) for _ in axes]
    for z_0 in latents(count):
        for part, values in zip(moments, (z_0 @ axes.T).unbind(-1), strict=True):
            part.update(values)
    for part in moments:
        part.all_reduce()
    mean = torch.stack([part.mean() for part in moments], -1) @ axes
    covariance = torch.stack([part.covariance() for part in moments])
    parts = (part.float().cpu() for part in (axes, mean, covariance))
    return LatentGaussian(*parts, {"source": spec, "images": str(int(moments[0].count))})


def principal_axes(latents: Iterable[torch.Tensor], dim: int, device: torch.device) -> torch.Tensor:
    """Return the principal axes of the tokens of latents (B, N, dim).

    Returns: orthonormal rows (dim, dim), in order of decreasing variance.
    """
    moments = Moments.of((z_0.flatten(0, 1) for z_0 in latents), dim, device)
    return torch.linalg.eigh(moments.covariance()).eigenvectors.T.flip(0)
