"""Patch-wise linear tokenizers: principal axes, or (resized) pixels."""

from collections.abc import Iterable

import torch
from torch import nn

from ldae.errors import InputError
from ldae.patches import patchify, unpatchify
from ldae.tokenizers.moments import Moments


class PatchTokenizer(nn.Module):
    """z = scale * V (patch - mean), one linear map for every patch of an image.

    V holds the first ``dim`` rows of an orthonormal basis of the D = in_chans * patch_size^2 numbers
    of a patch, which the subclass chooses. The latent scale and the pixels' mean and standard
    deviation live here and nowhere else, so this one object is all that lies between uint8 images
    and latents. Images are (B, C, H, W), latents (B, N, dim), patches (B, N, D).

    Args:
        scale: ``raw``, coordinates as they are; ``global``, one factor to unit mean variance;
            ``per-axis``, unit variance on every axis.

    Raises: InputError when ``patch_size`` does not divide ``img_size`` or ``dim`` is out of range.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, dim: int, scale: str) -> None:
        super().__init__()
        full = in_chans * patch_size**2
        if img_size % patch_size:
            raise InputError(
                f"data.img_size {img_size} is not a multiple of model.patch_size {patch_size}"
            )
        if not 1 <= dim <= full:
            raise InputError(
                f"tokenizer.dim {dim} is out of range: a {patch_size} x {patch_size} patch of "
                f"{in_chans} channels has {full} dimensions"
            )
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.dim, self.patch_dim, self.scale = dim, full, scale
        self.register_buffer("pixel_mean", torch.zeros(in_chans))
        self.register_buffer("pixel_std", torch.ones(in_chans))
        self.register_buffer("patch_mean", torch.zeros(full))
        self.register_buffer("basis", torch.eye(full))  # rows are axes, the first dim are kept
        self.register_buffer("variances", torch.ones(full))  # of the data along each axis
        self.register_buffer("scales", torch.ones(dim))

    # The five maps. All are affine, which is what lets the export fold them into one convolution.

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 pixels to zero mean and unit variance a channel."""
        mean, std = self.pixel_mean[:, None, None], self.pixel_std[:, None, None]
        return (images.to(mean.dtype) / 255 - mean) / std

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images back to [0, 1], unclamped."""
        return images * self.pixel_std[:, None, None] + self.pixel_mean[:, None, None]

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches (..., D) to latents (..., dim)."""
        return (patches - self.patch_mean) @ self.basis[: self.dim].T * self.scales

    def inverse(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (..., dim) to the patches (..., D) that they stand for."""
        return latents / self.scales @ self.basis[: self.dim] + self.patch_mean

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images to latents."""
        return self.project(patchify(images, self.patch_size))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to normalised images."""
        return unpatchify(self.inverse(latents), self.patch_size, self.in_chans)

    @torch.no_grad()
    def fit(
        self,
        images: Iterable[torch.Tensor],
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
    ) -> None:
        """Choose pixel statistics, axes and scales in one pass over uint8 images (B, C, H, W).

        Each rank passes its own share of the images, and all get the same tokenizer. Pixel
        statistics that are given are kept; otherwise they are the data's.

        Raises: InputError when there are no images, or when every image is the same flat colour.
        """
        moments = Moments(self.patch_dim, self.basis.device)
        for batch in images:
            # Whole numbers around 0, whose moments are exact: so are then the fits of any number of
            # ranks the same, and faster than in float64.
            pixels = batch.to(self.basis.device, torch.float32) - 128
            moments.update(patchify(pixels, self.patch_size).flatten(0, 1))
        moments.all_reduce()
        if not moments.count:
            raise InputError("the tokenizer was given no image to fit on")

        # Moments of normalised patches follow from those of the pixels: one pass is enough.
        chans = self.in_chans
        centre, covariance = (moments.mean() + 128) / 255, moments.covariance() / 255**2
        if not mean:
            mean = centre.reshape(chans, -1).mean(1)
            power = (covariance.diagonal() + centre**2).reshape(chans, -1).mean(1)
            std = (power - mean**2).clamp(min=0).sqrt()
        mean, std = (torch.as_tensor(part).to(moments.sum) for part in (mean, std))
        for channel in (std <= 1e-6).nonzero()[:1, 0].tolist():
            raise InputError(
                f"channel {channel} is the same in every pixel of the tokenizer's images; there is "
                "nothing to learn from it (data.in_chans)"
            )
        per_patch = self.patch_dim // chans
        shift, gain = mean.repeat_interleave(per_patch), 1 / std.repeat_interleave(per_patch)
        covariance = gain[:, None] * covariance * gain

        basis = self.axes(covariance)
        variances = (basis @ covariance * basis).sum(1).clamp(min=0)
        self.pixel_mean.copy_(mean)
        self.pixel_std.copy_(std)
        self.patch_mean.copy_((centre - shift) * gain)
        self.basis.copy_(basis)
        self.variances.copy_(variances)
        self.scales.copy_(self._scales(variances[: self.dim]))

    def _scales(self, variances: torch.Tensor) -> torch.Tensor:
        if self.scale == "raw":
            return torch.full_like(variances, self.unit())
        if self.scale == "global":
            return torch.full_like(variances, 1) / variances.mean().sqrt()
        # An axis without variance carries nothing: dividing by its rounding error would make noise.
        floor = variances[0] * 1e-8
        return variances.clamp(min=float(floor)).rsqrt()

    def unit(self) -> float:
        """What turns an orthonormal coordinate into the tokenizer's own unit."""
        return 1.0

    def axes(self, covariance: torch.Tensor) -> torch.Tensor:
        """An orthonormal basis (D, D) by rows, the kept axes first."""
        raise NotImplementedError


class PatchPCA(PatchTokenizer):
    """Principal axes of patches, by falling variance (paper, section 4.2)."""

    def axes(self, covariance: torch.Tensor) -> torch.Tensor:
        basis = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)
        # An axis and its negative are equally principal: fix the sign so that two fits agree.
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        return basis * largest.sign()


class PixelTokenizer(PatchTokenizer):
    """Pixels, of the image itself or of the image made smaller by averaging (paper, Fig. 5).

    ``dim`` = in_chans * k^2 keeps k x k averaged pixels of a patch; all of them, when dim = D.

    Raises: InputError when no such k divides ``patch_size``.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, dim: int, scale: str) -> None:
        super().__init__(img_size, patch_size, in_chans, dim, scale)
        sizes = {in_chans * k**2: k for k in range(1, patch_size + 1) if patch_size % k == 0}
        if dim not in sizes:
            raise InputError(
                f"tokenizer.dim {dim} is no whole number of pixels: with patches of {patch_size} "
                f"and {in_chans} channels it is one of {', '.join(map(str, sizes))}"
            )
        self.factor = patch_size // sizes[dim]

    def unit(self) -> float:
        return 1 / self.factor  # the unit vector over f x f equal pixels of value v has length f v

    def axes(self, covariance: torch.Tensor) -> torch.Tensor:
        kept = self.patch_size // self.factor
        line = torch.eye(kept).repeat_interleave(self.factor, dim=1) / self.factor**0.5
        averages = torch.kron(torch.eye(self.in_chans), torch.kron(line, line)).to(covariance)
        rest = torch.linalg.qr(averages.T, mode="complete").Q.T[self.dim :]
        return torch.cat([averages, rest])
