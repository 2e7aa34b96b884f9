"""The page where the paper lives: from uint8 images to the loss of any of its rows."""

import torch
from torch import nn

from ldae import noise, tokenizers
from ldae.errors import InputError
from ldae.models.dit import Denoiser
from ldae.models.vit import vit_shape
from ldae.objective import Objective
from ldae.patches import patchify, unpatchify
from ldae.settings import Config
from ldae.tokenizers import PatchTokenizer


class LDAE(nn.Module):
    """A tokenizer, a noise schedule, a denoiser and an objective.

    Rows differ in what these four are, never in the forward pass. ``bf16`` runs the denoiser under
    autocast; everything around it stays in the parameters' precision.
    """

    def __init__(
        self,
        tokenizer: PatchTokenizer,
        denoiser: Denoiser,
        objective: Objective,
        gamma: torch.Tensor,
        sigma: torch.Tensor,
        *,
        image_input: bool,
        label_dropout: float = 0.0,
        seed: int = 0,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer, self.denoiser, self.objective = tokenizer, denoiser, objective
        self.register_buffer("gamma", gamma.float(), persistent=False)
        self.register_buffer("sigma", sigma.float(), persistent=False)
        self.image_input, self.label_dropout = image_input, label_dropout
        self.seed, self.bf16 = seed, bf16

    def forward(
        self, images: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of a batch, a scalar.

        Args:
            images: uint8 (B, C, H, W).
            positions: int64 (B,), the number of each image in the run; with the seed it determines
                t, the noise and the dropped labels.
            labels: int64 (B,), read only when the row is class-conditional.
        """
        x = self.tokenizer.normalize(images)  #                          (B, C, H, W)
        patches = patchify(x, self.tokenizer.patch_size)  #              (B, N, D)
        z_0 = self.tokenizer.project(patches)  #                         (B, N, d)
        t = noise.timesteps(self.seed, positions, len(self.sigma))  #    (B,)
        eps = noise.normal(self.seed, positions, z_0.shape[1:]).to(z_0)  # (B, N, d)
        z_t = self.corrupt(z_0, t, eps)  #                               (B, N, d)
        output = self.predict(z_t, t, self.drop_labels(labels, positions))
        target = self.objective.target(self.tokenizer, patches, z_0, eps)
        return self.objective.loss(self.tokenizer, target - output, t)

    def corrupt(self, z_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """z_t = gamma_t z_0 + sigma_t eps."""
        return self.gamma[t, None, None] * z_0 + self.sigma[t, None, None] * eps

    def predict(
        self, z_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The network's output for z_t (B, N, d) at t (B,): (B, N, d), or (B, N, D) for images."""
        tokens = self.tokenizer.inverse(z_t) if self.image_input else z_t
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.denoiser(tokens, t, labels)
        return output.to(z_t)

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

        The noised picture is the inverse projection of z_t. Where the network predicts eps, the
        denoised one is that of (z_t - sigma_t eps) / gamma_t, which needs gamma_t > 0.
        """
        x = self.tokenizer.normalize(images)
        z_0 = self.tokenizer.encode(x)
        steps = torch.full_like(positions, t)
        eps = noise.normal(self.seed, positions, z_0.shape[1:]).to(z_0)
        z_t = self.corrupt(z_0, steps, eps)
        output = self.predict(z_t, steps)
        if self.objective.target_name == "eps":
            output = (z_t - self.sigma[t] * output) / self.gamma[t]
        if self.objective.target_name in ("eps", "latent"):
            output = self.tokenizer.inverse(output)
        denoised = unpatchify(output, self.tokenizer.patch_size, self.tokenizer.in_chans)
        pictures = (x, self.tokenizer.decode(z_t), denoised)
        return tuple(self.tokenizer.denormalize(part).clamp(0, 1) for part in pictures)


def build(config: Config, num_classes: int = 0, bf16: bool = False) -> LDAE:
    """The untrained method of a configuration, with an unfitted tokenizer, seeded by its seed.

    Raises: InputError when settings do not fit together.
    """
    shape = vit_shape(
        config.model.name,
        config.model.patch_size,
        config.model.embed_dim,
        config.model.depth,
        config.model.num_heads,
    )
    if config.tokenizer.perceptual_weight or config.tokenizer.adversarial_weight:
        raise InputError(
            "tokenizer.perceptual_weight and tokenizer.adversarial_weight train conv tokenizers, "
            "which are not built yet: rows 1 to 7 can be shown but not run"
        )
    tokenizer = tokenizers.create(
        config.tokenizer.name,
        img_size=config.data.img_size,
        patch_size=shape.patch_size,
        in_chans=config.data.in_chans,
        dim=config.tokenizer.dim,
        scale=config.tokenizer.scale,
    )
    gamma, sigma = noise.schedule(
        config.noise.schedule,
        config.noise.steps,
        config.noise.max_sigma,
        config.noise.single_sigma,
    )
    image_input = config.objective.input == "image"
    image_output = config.objective.target in ("projected", "image")
    torch.manual_seed(config.seed)
    denoiser = Denoiser(
        shape,
        side=config.data.img_size // shape.patch_size,
        in_dim=tokenizer.patch_dim if image_input else tokenizer.dim,
        out_dim=tokenizer.patch_dim if image_output else tokenizer.dim,
        cond_ratio=config.model.cond_ratio,
        num_classes=num_classes if config.model.class_conditional else 0,
        checkpoint_activations=config.system.checkpoint_activations,
    )
    objective = Objective(
        config.objective.target,
        config.objective.weight,
        config.objective.residual_weight,
        gamma,
        sigma,
    )
    return LDAE(
        tokenizer,
        denoiser,
        objective,
        gamma,
        sigma,
        image_input=image_input,
        label_dropout=config.model.label_dropout,
        seed=config.seed,
        bf16=bf16,
    )
