"""The adversary of a VQGAN: a discriminator of patches, its hinge losses, the balance between them."""

import torch
from torch import nn
from torch.func import functional_call

from ldae.distributed import all_reduce_sum
from ldae.errors import InputError

_WIDTH, _LAYERS, _GROUPS = 64, 3, 32
_LARGEST_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """Normalised images (B, C, S, S) to logits of overlapping patches (B, 1, s, s), high where real.

    pix2pix's PatchGAN as LDM has it: 4 x 4 convolutions, three of stride 2 that double the width
    from 64, fewer where the image is too small for them, then two of stride 1. GroupNorm stands in
    for LDM's BatchNorm: the logits of an image then depend on no other image, so that neither the
    number of ranks nor that of micro batches changes what is learnt.

    Raises: InputError when an image is too small for one layer of stride 2.
    """

    def __init__(self, in_chans: int, img_size: int) -> None:
        super().__init__()
        fitting = [count for count in range(1, _LAYERS + 1) if img_size >> count >= 3]
        if not fitting:
            raise InputError(
                f"tokenizer.adversarial_weight needs images of 6 x 6 pixels, data.img_size is {img_size}"
            )
        widths = [_WIDTH * 2**level for level in range(fitting[-1] + 1)]
        layers = [nn.Conv2d(in_chans, _WIDTH, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level, (before, width) in enumerate(zip(widths, widths[1:]), start=1):
            stride = 2 if level < fitting[-1] else 1
            layers += [nn.Conv2d(before, width, 4, stride, 1, bias=False)]
            layers += [nn.GroupNorm(_GROUPS, width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)

    def frozen(self, images: torch.Tensor) -> torch.Tensor:
        """``forward`` whose gradient reaches the images and not the discriminator."""
        parameters = {name: value.detach() for name, value in self.named_parameters()}
        return functional_call(self, parameters, (images,))


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss of its logits, a scalar (LDM; Lim and Ye 2017)."""
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, last_weight: torch.Tensor
) -> torch.Tensor:
    """|gradient of the reconstruction| / |gradient of the adversarial loss| at the decoder's last
    layer, at most 1e4, detached (Esser et al. 2021, equation 7).

    The gradients are those of the batches of all ranks together; micro batches have each its own.
    """
    gradients = torch.stack([
        torch.autograd.grad(loss, last_weight, retain_graph=True)[0].flatten().float()
        for loss in (reconstruction, adversarial)
    ])  # fmt: skip
    wanted, found = all_reduce_sum(gradients).norm(dim=1)
    return (wanted / (found + 1e-4)).clamp(max=_LARGEST_WEIGHT).detach()
