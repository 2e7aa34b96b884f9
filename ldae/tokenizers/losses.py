"""The loss of a trained tokenizer: reconstruction, KL, codebook, perceptual, adversarial terms."""

from collections.abc import Callable

import torch
from torch import nn

from ldae import draws
from ldae.precision import bf16_autocast
from ldae.tokenizers.adversarial import PatchDiscriminator, adaptive_weight, hinge_loss
from ldae.tokenizers.contract import PatchTokenizer
from ldae.tokenizers.trained import TrainedTokenizer

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Distance between two batches of images in [0, 1]: (B, C, H, W) twice -> (B,)."""


class TokenizerLoss(nn.Module):
    """The loss of a batch of images, for the training loop and its one optimizer.

    The loss is the mean over images of

        |x - x_hat| + kl_weight * KL[posterior | N(0, I)]
        + CHW * (perceptual_weight * distance + codebook loss)
        + adversarial_weight * adaptive weight * -D(x_hat)

    The first term is the absolute error of pixels in [-1, 1], summed over an image, as in latent
    diffusion (LDM), whose weights are the defaults. When the tokenizer is patch-wise, it is the
    squared error of normalised pixels (paper, section 4.2). The perceptual and the codebook term
    are means. Times CHW, the count of numbers in an image, they have the share that LDM and VQGAN
    give them. For the adaptive weight see ``adaptive_weight``.

    From step ``adversarial_start`` on, the discriminator's hinge loss is added. The discriminator
    sees detached reconstructions, and the tokenizer's adversarial term uses a frozen discriminator,
    so one backward pass gives both networks the gradients of their own losses.

    Args:
        perceptual: distance of the perceptual term; its network is not part of this module.
        kl_weight, perceptual_weight, adversarial_weight: of the terms that are added to the
            reconstruction; a term of weight 0 is not built.
        batch_size: images per step, to convert positions to steps.
        seed: with an image's position, it determines the sample of the posterior.
        bf16: run the trained networks under autocast.
    """

    def __init__(
        self,
        tokenizer: TrainedTokenizer,
        perceptual: Distance | None = None,
        *,
        kl_weight: float = 0.0,
        perceptual_weight: float = 0.0,
        adversarial_weight: float = 0.0,
        adversarial_start: int = 0,
        batch_size: int = 1,
        seed: int = 0,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer, self.bf16 = tokenizer, bf16
        self.kl_weight, self.perceptual_weight = kl_weight, perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.perceptual = perceptual if perceptual_weight else None
        self.discriminator = None
        if adversarial_weight:
            self.discriminator = PatchDiscriminator(tokenizer.in_chans, tokenizer.img_size)
        self.seed, self.batch_size, self.adversarial_start = seed, batch_size, adversarial_start
        self._calls_to_start, self._started = 0, False

    def forward(
        self, images: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, a scalar, and its unweighted parts, detached.

        Args:
            images: uint8 (B, C, H, W).
            positions: int64 (B,), the number of each image in the run.
            labels: not read.
        """
        x = self.tokenizer.normalize(images)  #                 (B, C, H, W)
        eps = None
        if self.tokenizer.stochastic:
            shape = (self.tokenizer.num_tokens, self.tokenizer.dim)
            eps = draws.normal(self.seed, positions, shape, draws.POSTERIOR).to(x)
        with self._autocast():
            x_hat, kl, codebook = self.tokenizer.reconstruct(x, eps)
        error = x_hat - x  #                                    (B, C, H, W)
        if isinstance(self.tokenizer, PatchTokenizer):
            error = error.square()
        else:
            std = 2 * self.tokenizer.pixel_std[:, None, None]  # of pixels in [-1, 1]
            error = (std * error).abs()
        reconstruction = error.flatten(1).sum(1).mean()
        parts = {"reconstruction": reconstruction}
        numel = x[0].numel()
        if self.perceptual:
            pair = (self.tokenizer.denormalize(part) for part in (x_hat, x))
            parts["perceptual"] = self.perceptual(*pair).mean()
            reconstruction = reconstruction + self.perceptual_weight * numel * parts["perceptual"]
        loss = reconstruction
        if self.tokenizer.stochastic:
            parts["kl"] = kl.mean()
            loss = loss + self.kl_weight * parts["kl"]
        if self.tokenizer.quantised:
            parts["codebook"] = codebook
            loss = loss + numel * codebook
        if self.discriminator is not None:
            started = self._has_started(positions)
            term, adversarial_parts = self._adversarial_term(x, x_hat, reconstruction, started)
            loss, parts = loss + term, parts | adversarial_parts
        return loss, {name: part.detach() for name, part in parts.items()}

    def _adversarial_term(
        self, x: torch.Tensor, x_hat: torch.Tensor, reconstruction: torch.Tensor, started: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the adversary's share of the loss and its parts, all zero before the start.

        ``x`` and ``x_hat`` are normalised images (B, C, H, W); ``reconstruction`` and all that is
        returned are scalars.
        """
        if not started:
            # DDP waits for gradients of all parameters, so each gets a gradient of zero.
            zero = 0 * sum(part.sum() for part in self.discriminator.parameters())
            return zero, dict.fromkeys(("adversarial", "adaptive_weight", "discriminator"), zero)
        with self._autocast():
            generator = -self.discriminator.forward_frozen(x_hat).float().mean()
            real, fake = self.discriminator(x), self.discriminator(x_hat.detach())
        weight = adaptive_weight(reconstruction, generator, self.tokenizer.last_weight)
        hinge = hinge_loss(real.float(), fake.float())
        parts = {"adversarial": generator, "adaptive_weight": weight, "discriminator": hinge}
        return self.adversarial_weight * weight * generator + hinge, parts

    def _has_started(self, positions: torch.Tensor) -> bool:
        """Return whether these images belong to step ``adversarial_start`` or a later one.

        Reading a position makes the host wait for the GPU. Steps only increase, and each step takes
        at least one call. So no position is read until the start may have come, nor after it.
        """
        if self._calls_to_start:
            self._calls_to_start -= 1
            return False
        if not self._started:
            step = int(positions[0]) // self.batch_size
            self._started = step >= self.adversarial_start
            self._calls_to_start = max(0, self.adversarial_start - step - 1)
        return self._started

    def _autocast(self) -> torch.autocast:
        return bf16_autocast(self.tokenizer.scales.device, self.bf16)
