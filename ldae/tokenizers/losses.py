"""What a trained tokenizer minimises: reconstruction, KL, codebook, perceptual and adversarial terms."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ldae import noise
from ldae.tokenizers.adversarial import PatchDiscriminator, adaptive_weight, hinge
from ldae.tokenizers.contract import PatchTokenizer
from ldae.tokenizers.learned import TrainedTokenizer

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of two batches of images in [0, 1]: (B, C, H, W) twice -> (B,)."""


@dataclass(frozen=True)
class Weights:
    """Of the terms beside the reconstruction; 0 builds nothing of a term."""

    kl: float = 0.0
    perceptual: float = 0.0
    adversarial: float = 0.0


class TokenizerLoss(nn.Module):
    """The loss of a batch and its parts, for the training loop and its one optimizer.

    |x - x_hat| summed over an image (LDM), its square where the tokenizer is patch-wise (paper,
    section 4.2), + kl * KL[posterior | N(0, I)] + CHW * (perceptual * distance + codebook loss)
    + adversarial * adaptive weight * -D(x_hat), a mean over images. CHW, the numbers of an image,
    weighs what is a mean as LDM and VQGAN do, which average all of them over an image's numbers.

    From step ``adversarial_start`` on, the discriminator's own hinge loss is added. It sees
    reconstructions without their graph, and the generator's term passes through a discriminator
    without gradients, so one backward gives each the gradients of its own loss.

    Args:
        perceptual: the distance of the perceptual term, whose network is no part of this module.
        batch_size: images of a step, by which positions become steps.
        seed: of the posterior's draws, which are functions of it and the image's position.
        bf16: run the networks that are trained under autocast.
    """

    def __init__(
        self,
        tokenizer: TrainedTokenizer,
        weights: Weights,
        perceptual: Distance | None = None,
        *,
        adversarial_start: int = 0,
        batch_size: int = 1,
        seed: int = 0,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer, self.weights, self.bf16 = tokenizer, weights, bf16
        self.perceptual = perceptual if weights.perceptual else None
        self.discriminator = None
        if weights.adversarial:
            self.discriminator = PatchDiscriminator(tokenizer.in_chans, tokenizer.img_size)
        self.seed, self.batch_size, self.adversarial_start = seed, batch_size, adversarial_start
        self._calls_to_start, self._started = 0, False

    def forward(
        self, images: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its unweighted parts, detached.

        Args:
            images: uint8 (B, C, H, W).
            positions: int64 (B,), the number of each image in the run.
            labels: not read.
        """
        x = self.tokenizer.normalize(images)
        eps = None
        if self.tokenizer.stochastic:
            shape = (self.tokenizer.tokens, self.tokenizer.dim)
            eps = noise.normal(self.seed, positions, shape, noise.POSTERIOR).to(x)
        with self._autocast():
            made = self.tokenizer.reconstruct(x, eps)
        error = made.images - x
        squared = isinstance(self.tokenizer, PatchTokenizer)
        error = error.square() if squared else error.abs()
        likeness = error.flatten(1).sum(1).mean()
        parts = {"reconstruction": likeness}
        numbers = x[0].numel()
        if self.perceptual:
            parts["perceptual"] = self._distance(made.images, x)
            likeness = likeness + self.weights.perceptual * numbers * parts["perceptual"]
        loss = likeness
        if self.tokenizer.stochastic:
            parts["kl"] = made.kl.mean()
            loss = loss + self.weights.kl * parts["kl"]
        if self.tokenizer.quantised:
            parts["codebook"] = made.codebook
            loss = loss + numbers * made.codebook
        if self.discriminator is not None:
            added, told = self._adversary(x, made.images, likeness, self._has_started(positions))
            loss, parts = loss + added, parts | told
        return loss, {name: part.detach() for name, part in parts.items()}

    def _distance(self, made: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        made, x = (self.tokenizer.denormalize(part) for part in (made, x))
        return self.perceptual(made, x).mean()

    def _adversary(
        self, x: torch.Tensor, made: torch.Tensor, likeness: torch.Tensor, started: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What the adversary adds to the loss, and its parts, which are there from the first step."""
        if not started:
            # Every parameter takes part, with gradients of zero: DDP waits for all of them.
            nothing = 0 * sum(part.sum() for part in self.discriminator.parameters())
            return nothing, dict.fromkeys(
                ("adversarial", "adaptive_weight", "discriminator"), nothing
            )
        with self._autocast():
            generator = -self.discriminator.frozen(made).float().mean()
            real, fake = self.discriminator(x), self.discriminator(made.detach())
        weight = adaptive_weight(likeness, generator, self.tokenizer.last_weight)
        own = hinge(real.float(), fake.float())
        parts = {"adversarial": generator, "adaptive_weight": weight, "discriminator": own}
        return self.weights.adversarial * weight * generator + own, parts

    def _has_started(self, positions: torch.Tensor) -> bool:
        """Whether these images' step is ``adversarial_start`` or later.

        Training goes forwards, and a step is at least one call. So a position, for which the host
        has to wait on a GPU, is read only when the start may have come, and never after it.
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
        device = self.tokenizer.scales.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16)
