"""The mean and the standard deviation of the pixels, by which images are normalised."""

from collections.abc import Iterable

import torch
from torch import nn

from ldae.errors import InputError
from ldae.moments import Moments


class PixelStatistics(nn.Module):
    """The mean and the standard deviation of each channel of square images, in [0, 1]."""

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, img_size: int, in_chans: int) -> None:
        super().__init__()
        self.img_size, self.in_chans = img_size, in_chans
        self.register_buffer("pixel_mean", torch.zeros(in_chans))
        self.register_buffer("pixel_std", torch.ones(in_chans))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Convert uint8 images to float, each channel with zero mean and unit variance."""
        mean, std = self.pixel_mean[:, None, None], self.pixel_std[:, None, None]
        return (images.to(mean.dtype) / 255 - mean) / std

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """Convert normalised images back to [0, 1], without clamping."""
        return images * self.pixel_std[:, None, None] + self.pixel_mean[:, None, None]

    @torch.no_grad()
    def fit_pixels(self, images: Iterable[torch.Tensor]) -> None:
        """Set the statistics in one pass over uint8 images (B, C, H, W).

        Each rank passes its own share of the images.

        Raises: InputError when there are no images, or when a channel is constant.
        """
        moments = Moments(self.in_chans, self.pixel_mean.device)
        for batch in images:
            pixels = batch.to(self.pixel_mean.device, torch.float32) - 128
            moments.update(pixels.movedim(1, -1).flatten(0, -2))
        moments.all_reduce()
        check_not_empty(moments)
        variance = moments.covariance().diagonal().clamp(min=0)
        self.set_pixel_stats((moments.mean() + 128) / 255, variance.sqrt() / 255)

    def set_pixel_stats(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set the mean and standard deviation (C,) of the pixels, in [0, 1].

        Raises: InputError when a channel is constant.
        """
        constant = (std <= 1e-6).nonzero().flatten().tolist()
        if constant:
            raise InputError(
                f"channel {constant[0]} is the same in every pixel of the images, so nothing can "
                "be learned from it: check data.in_chans"
            )
        self.pixel_mean.copy_(mean)
        self.pixel_std.copy_(std)


def check_not_empty(moments: Moments) -> None:
    """Check that the moments count at least one vector.

    Raises: InputError when they count none.
    """
    if not moments.count:
        raise InputError("there is no image to fit to")
