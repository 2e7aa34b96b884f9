"""The adversary of a VQGAN: a patch discriminator, its hinge loss and its adaptive weight."""

from itertools import pairwise

import torch
from torch import nn
from torch.func import functional_call

from ldae.distributed import all_reduce_sum
from ldae.errors import InputError

_WIDTH, _LAYERS, _GROUPS = 64, 3, 32
_MAX_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """pix2pix's PatchGAN as LDM has it: images (B, C, S, S) to logits (B, 1, s, s), high if real.

    The images are normalised. Each logit judges one of many overlapping patches. The layers are
    4 x 4 convolutions: three of stride 2 that double the width from 64, then two of stride 1.
    Images that are too small for three layers of stride 2 get fewer.

    GroupNorm replaces LDM's BatchNorm. The logits of an image then do not depend on other images,
    so training does not depend on the number of ranks or of micro batches.

    Raises: InputError when the images are too small for one layer of stride 2.
    """

    def __init__(self, in_chans: int, img_size: int) -> None:
        super().__init__()
        strided = max((n for n in range(1, _LAYERS + 1) if img_size >> n >= 3), default=0)
        if not strided:
            raise InputError(
                "tokenizer.adversarial_weight needs images of at least 6 x 6 pixels, but "
                f"data.img_size is {img_size}"
            )
        widths = [_WIDTH * 2**level for level in range(strided + 1)]
        layers = [nn.Conv2d(in_chans, _WIDTH, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level, (in_width, width) in enumerate(pairwise(widths), start=1):
            stride = 2 if level < strided else 1
            layers += [nn.Conv2d(in_width, width, 4, stride, 1, bias=False)]
            layers += [nn.GroupNorm(_GROUPS, width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)

    def forward_frozen(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits, with gradients for the images but not for the discriminator."""
        parameters = {name: value.detach() for name, value in self.named_parameters()}
        return functional_call(self, parameters, (images,))


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Return the discriminator's loss of logits (B, 1, s, s) of real and of fake images, a scalar.

    Source: LDM; Lim and Ye 2017.
    """
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, last_weight: torch.Tensor
) -> torch.Tensor:
    """Return the weight that gives both losses gradients of the same size, a detached scalar.

    The weight is |gradient of the reconstruction loss| / |gradient of the adversarial loss| with
    respect to ``last_weight``, the weight of the decoder's last layer, and is at most 1e4.
    Gradients are summed over ranks first. Each micro batch has its own weight.

    Source: Esser et al. 2021, equation 7.
    """
    gradients = torch.stack([
        torch.autograd.grad(loss, last_weight, retain_graph=True)[0].flatten().float()
        for loss in (reconstruction, adversarial)
    ])  # fmt: skip
    reconstruction_norm, adversarial_norm = all_reduce_sum(gradients).norm(dim=1)
    return (reconstruction_norm / (adversarial_norm + 1e-4)).clamp(max=_MAX_WEIGHT).detach()
