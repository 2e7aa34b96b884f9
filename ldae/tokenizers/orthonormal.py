"""Linear tokenizers on an orthonormal basis: principal axes of patches, or pixels."""

from collections.abc import Iterable

import torch

from ldae.distributed import broadcast_from_main
from ldae.errors import InputError
from ldae.moments import Moments
from ldae.patches import patchify
from ldae.pixel_statistics import check_not_empty
from ldae.tokenizers.contract import PatchTokenizer, latent_scales


class OrthonormalTokenizer(PatchTokenizer):
    """A tokenizer z = scale * V (patch - mean), where the rows of V are orthonormal.

    A patch has D numbers. The subclass chooses an orthonormal basis (D, D), and V is its first
    ``dim`` rows.

    Raises: InputError when ``dim`` is out of range.
    """

    patch_mean: torch.Tensor
    basis: torch.Tensor
    variances: torch.Tensor

    def __init__(self, img_size: int, patch_size: int, in_chans: int, dim: int, scale: str) -> None:
        super().__init__(img_size, patch_size, in_chans, dim, scale)
        if not 1 <= dim <= self.patch_dim:
            raise InputError(
                f"tokenizer.dim {dim} is out of range: a {patch_size} x {patch_size} patch of "
                f"{in_chans} channels has {self.patch_dim} dimensions"
            )
        self.register_buffer("patch_mean", torch.zeros(self.patch_dim))
        self.register_buffer("basis", torch.eye(self.patch_dim))  # rows are axes, first dim kept
        self.register_buffer("variances", torch.ones(self.patch_dim))  # of the data, per axis

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        return (patches - self.patch_mean) @ self.basis[: self.dim].T * self.scales

    def inverse(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / self.scales @ self.basis[: self.dim] + self.patch_mean

    @torch.no_grad()
    def fit(
        self,
        images: Iterable[torch.Tensor],
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
    ) -> None:
        """Set pixel statistics, axes and scales in one pass; see ``Tokenizer.fit``."""
        moments = Moments(self.patch_dim, self.basis.device)
        for batch in images:
            # Moments of small integers are exact in float32. The fit is thus the same for every
            # number of ranks, and faster than in float64.
            pixels = batch.to(self.basis.device, torch.float32) - 128
            moments.update(patchify(pixels, self.patch_size).flatten(0, 1))
        moments.all_reduce()
        check_not_empty(moments)

        # One pass is enough: moments of normalised patches follow from the moments of the pixels.
        chans = self.in_chans
        patch_mean, covariance = (moments.mean() + 128) / 255, moments.covariance() / 255**2
        if not mean:
            mean = patch_mean.reshape(chans, -1).mean(1)
            power = (covariance.diagonal() + patch_mean**2).reshape(chans, -1).mean(1)
            std = (power - mean**2).clamp(min=0).sqrt()
        mean, std = (torch.as_tensor(part).to(moments.sum) for part in (mean, std))
        self.set_pixel_stats(mean, std)
        per_patch = self.patch_dim // chans
        shift, gain = mean.repeat_interleave(per_patch), 1 / std.repeat_interleave(per_patch)
        covariance = gain[:, None] * covariance * gain

        basis = self.axes(covariance)
        variances = (basis @ covariance * basis).sum(1).clamp(min=0)
        self.patch_mean.copy_((patch_mean - shift) * gain)
        self.basis.copy_(basis)
        self.variances.copy_(variances)
        self.scales.copy_(latent_scales(self.scale, variances[: self.dim], self.raw_scale))

    def summary(self) -> str:
        share = self.variances[: self.dim].sum() / self.variances.sum()
        return f"{self.dim} of {self.patch_dim} axes keep {share:.1%} of the variance"

    def axes(self, covariance: torch.Tensor) -> torch.Tensor:
        """Return an orthonormal basis (D, D), one axis a row, kept axes first.

        Args:
            covariance: of normalised patches (D, D).
        """
        raise NotImplementedError


class PatchPCA(OrthonormalTokenizer):
    """The principal axes of patches, in order of decreasing variance.

    Source: paper, section 4.2.
    """

    def axes(self, covariance: torch.Tensor) -> torch.Tensor:
        basis = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)
        # An axis and its negative are both principal. Fixing the sign makes two fits agree.
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        # GPUs of two kinds may round differently, and turn axes of like variances.
        return broadcast_from_main(basis * largest.sign())

    def whiten(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the coordinates of patches (..., D) on all D axes, each with unit variance."""
        return (patches - self.patch_mean) @ self.basis.T / self._deviations()

    def unwhiten(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Return the patches (..., D) of whitened coordinates (..., D)."""
        return coordinates * self._deviations() @ self.basis + self.patch_mean

    def _deviations(self) -> torch.Tensor:
        """Return the standard deviation (D,) on each axis, at least that of 8-bit rounding.

        Rounding a pixel to a whole grey level is noise with a variance of 1/12 squared levels. An
        axis with less variance shows nothing else.
        """
        level = 1 / (255 * self.pixel_std)  # a grey level in normalised units, for each channel
        level = level.repeat_interleave(self.patch_dim // self.in_chans)
        return self.variances.maximum(self.basis.square() @ level.square() / 12).sqrt()


class PixelTokenizer(OrthonormalTokenizer):
    """The pixels of the image, or of the image downsampled by averaging.

    ``dim`` = in_chans * k^2 keeps k x k averaged pixels of a patch; ``dim`` = D keeps all pixels.
    With the scale ``raw``, the mean of the patches is not subtracted: latents are the normalised
    pixels, such as numbers in [-1, 1] for a given mean and standard deviation of 0.5.

    Source: paper, Fig. 5.

    Raises: InputError when no such k divides ``patch_size``.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, dim: int, scale: str) -> None:
        super().__init__(img_size, patch_size, in_chans, dim, scale)
        sizes = {in_chans * k**2: k for k in range(1, patch_size + 1) if patch_size % k == 0}
        if dim not in sizes:
            raise InputError(
                f"tokenizer.dim {dim} is not a whole number of pixels: with patches of "
                f"{patch_size} and {in_chans} channels, set it to one of "
                f"{', '.join(map(str, sizes))}"
            )
        self.factor = patch_size // sizes[dim]
        self.raw_scale = 1 / self.factor  # f x f pixels of value v have the coordinate f v

    def fit(
        self,
        images: Iterable[torch.Tensor],
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
    ) -> None:
        super().fit(images, mean, std)
        if self.scale == "raw":
            self.patch_mean.zero_()

    def axes(self, covariance: torch.Tensor) -> torch.Tensor:
        kept = self.patch_size // self.factor
        line = torch.eye(kept).repeat_interleave(self.factor, dim=1) / self.factor**0.5
        averages = torch.kron(torch.eye(self.in_chans), torch.kron(line, line)).to(covariance)
        rest = torch.linalg.qr(averages.T, mode="complete").Q.T[self.dim :]
        return torch.cat([averages, rest])
