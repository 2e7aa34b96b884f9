"""The page where the paper lives: from uint8 images to the loss of any of its rows."""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ldae import noise, tokenizers
from ldae.models import DENOISERS
from ldae.models.contract import Denoiser
from ldae.models.vit import vit_shape
from ldae.objective import Objective
from ldae.patches import unpatchify
from ldae.settings import Config
from ldae.tokenizers import PatchTokenizer, Tokenizer


class LDAE(nn.Module):
    """A tokenizer, a noise schedule, a denoiser and an objective.

    Rows differ in what these four are, never in the forward pass. ``bf16`` runs the denoiser under
    autocast; everything around it stays in the parameters' precision.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        denoiser: Denoiser,
        objective: Objective,
        gamma: torch.Tensor,
        sigma: torch.Tensor,
        *,
        image_input: bool,
        samples_posterior: bool = False,
        label_dropout: float = 0.0,
        seed: int = 0,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer, self.denoiser, self.objective = tokenizer, denoiser, objective
        self.tokenizer.requires_grad_(False)  # whatever it is, it was fitted before
        self.register_buffer("gamma", gamma.float(), persistent=False)
        self.register_buffer("sigma", sigma.float(), persistent=False)
        self.image_input, self.samples_posterior = image_input, samples_posterior
        self.label_dropout = label_dropout
        self.seed, self.bf16 = seed, bf16

    def forward(
        self, images: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of a batch, a scalar.

        Args:
            images: uint8 (B, C, H, W).
            positions: int64 (B,), the number of each image in the run; with the seed it determines
                t, the noise, the posterior's draw and the dropped labels.
            labels: int64 (B,), read only when the row is class-conditional.
        """
        x = self.tokenizer.normalize(images)  #                          (B, C, H, W)
        z_0 = self.encode(x, positions)  #                               (B, N, d)
        t = noise.timesteps(self.seed, positions, len(self.sigma))  #    (B,)
        eps = noise.normal(self.seed, positions, z_0.shape[1:]).to(z_0)  # (B, N, d)
        gamma, sigma = self.level(t)  #                                  (B, 1, 1)
        z_t = gamma * z_0 + sigma * eps  #                               (B, N, d)
        output = self.predict(z_t, t, self.drop_labels(labels, positions))
        target = self.objective.target(self.tokenizer, x, z_0, eps, gamma, sigma)
        return self.objective.loss(self.tokenizer, target - output, t)

    def encode(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """z_0 (B, N, d) of normalised images: where the tokenizer has a posterior, its mean, or the
        draw of these positions when the method samples it."""
        eps = None
        if self.samples_posterior and positions is not None:
            shape = (self.tokenizer.num_tokens, self.tokenizer.dim)
            eps = noise.normal(self.seed, positions, shape, noise.POSTERIOR).to(x)
        with torch.no_grad(), self._autocast(self.tokenizer.trained):
            return self.tokenizer.encode(x, eps).to(x)

    def level(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gamma_t and sigma_t of t (B,), (B, 1, 1) each."""
        return self.gamma[t, None, None], self.sigma[t, None, None]

    def predict(
        self, z_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The network's output for z_t (B, N, d) at t (B,): (B, N, d), or (B, N, D) for images."""
        tokens = self.seen(z_t)
        with self._autocast():
            output = self.denoiser(tokens, t, labels)
        return output.to(z_t)

    def seen(self, z_t: torch.Tensor) -> torch.Tensor:
        """Return the network's input for z_t (B, N, d): z_t, or its inverse projection (B, N, D)."""
        return self.tokenizer.inverse(z_t) if self.image_input else z_t

    def input_at(
        self, x: torch.Tensor, t: int, eps: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the denoiser's tokens (B, N, in_dim) and condition for normalised images x at t.

        Without ``eps`` (B, N, d) they are clean: what the network saw at that t, less the noise.
        """
        z_t = self.gamma[t] * self.encode(x)
        if eps is not None:
            z_t = z_t + self.sigma[t] * eps
        return self.seen(z_t), self.denoiser.condition(torch.full((len(x),), t, device=x.device))

    @torch.no_grad()
    def features(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Return the encoder's features of clean normalised images x at t, averaged: (B, W)."""
        return self.denoiser.encode(*self.input_at(x, t)).mean(1)

    def denoise(
        self, z_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The z_0 (B, N, d) that the network sees behind z_t at t (B,): what samplers ask for.

        The null label when ``labels`` are None. Where the network predicts the noise or the score,
        gamma_t must be above 0.
        """
        return self.objective.clean(
            self.tokenizer, self.predict(z_t, t, labels), z_t, *self.level(t)
        )

    def picture(
        self, z_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The normalised image (B, C, H, W) that the network sees behind z_t at t (B,).

        A network that predicts images shows its own; otherwise z_0 is decoded.
        """
        if not self.objective.is_image:
            return self.decode(self.denoise(z_t, t, labels))
        patches = self.predict(z_t, t, labels)
        return unpatchify(patches, self.tokenizer.patch_size, self.tokenizer.in_chans)

    def decode(self, z_0: torch.Tensor) -> torch.Tensor:
        """Latents (B, N, d) to normalised images (B, C, H, W)."""
        with self._autocast(self.tokenizer.trained):
            return self.tokenizer.decode(z_0).to(z_0)

    def _autocast(self, wanted: bool = True) -> torch.autocast:
        return torch.autocast(self.gamma.device.type, torch.bfloat16, enabled=self.bf16 and wanted)

    def drop_labels(
        self, labels: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor | None:
        """Labels with the null label in a share of them; None when the row is unconditional."""
        null = self.denoiser.num_classes
        if not null:
            return None
        return labels.masked_fill(noise.dropped(self.seed, positions, self.label_dropout), null)

    @torch.no_grad()
    def denoise_images(
        self, images: torch.Tensor, positions: torch.Tensor, t: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Clean, noised and denoised pictures in [0, 1] of uint8 images, all (B, C, H, W).

        The noised picture is z_t decoded.
        """
        x = self.tokenizer.normalize(images)
        z_0 = self.encode(x)
        steps = torch.full_like(positions, t)
        gamma, sigma = self.level(steps)
        z_t = gamma * z_0 + sigma * noise.normal(self.seed, positions, z_0.shape[1:]).to(z_0)
        pictures = (x, self.decode(z_t), self.picture(z_t, steps))
        return tuple(self.tokenizer.denormalize(part).clamp(0, 1) for part in pictures)


def build(config: Config, num_classes: int = 0, bf16: bool = False) -> LDAE:
    """The untrained method of a configuration, with an unfitted tokenizer, seeded by its seed.

    Raises: InputError when settings do not fit together.
    """
    tokenizer = build_tokenizer(config)
    image_input = config.objective.input == "image"
    if image_input:
        tokenizers.check_kind(PatchTokenizer, tokenizer, "objective.input image")
    gamma, sigma = noise.levels(**asdict(config.noise))
    objective = Objective(
        config.objective.target,
        config.objective.weight,
        config.objective.residual_weight,
        gamma,
        sigma,
        tokenizer,
    )
    torch.manual_seed(config.seed)
    denoiser = DENOISERS[config.model.denoiser](
        **denoiser_settings(config),
        side=config.data.img_size // tokenizer.patch_size,
        in_dim=tokenizer.patch_dim if image_input else tokenizer.dim,
        out_dim=tokenizer.patch_dim if objective.is_image else tokenizer.dim,
        num_classes=num_classes if config.model.class_conditional else 0,
        checkpoint_activations=config.system.checkpoint_activations,
    )
    return LDAE(
        tokenizer,
        denoiser,
        objective,
        gamma,
        sigma,
        image_input=image_input,
        samples_posterior=tokenizer.stochastic and config.tokenizer.posterior == "sample",
        label_dropout=config.model.label_dropout,
        seed=config.seed,
        bf16=bf16,
    )


def denoiser_settings(config: Config) -> dict[str, Any]:
    """Return the settings that the denoiser alone reads, by the names of its arguments.

    They are the branch of the denoiser's name. DiT's are in ``model``, beside those that all read.
    """
    model = config.model
    if model.denoiser != "dit":
        return asdict(getattr(config, model.denoiser))
    return {
        "name": model.name,
        "depth": model.depth,
        "embed_dim": model.embed_dim,
        "num_heads": model.num_heads,
        "cond_ratio": model.cond_ratio,
    }


def build_tokenizer(config: Config) -> Tokenizer:
    """The unfitted tokenizer of a configuration, seeded by its seed.

    Raises: InputError when settings do not fit together.
    """
    patch_size = config.model.patch_size or vit_shape(config.model.name).patch_size
    torch.manual_seed(config.seed)
    return tokenizers.create(
        **asdict(config.tokenizer),
        img_size=config.data.img_size,
        patch_size=patch_size,
        in_chans=config.data.in_chans,
    )
