"""The method of the paper: from uint8 images to the loss of any of its rows."""

from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import nn

from ldae import draws, masking, noise, tokenizers
from ldae.errors import InputError
from ldae.feature_target import FeatureTarget
from ldae.models import DENOISERS
from ldae.models.contract import Denoiser
from ldae.models.vit import vit_shape
from ldae.objective import Objective
from ldae.patches import unpatchify
from ldae.precision import bf16_autocast
from ldae.settings import Config
from ldae.tokenizers import PatchTokenizer, Posterior, Tokenizer
from ldae.tree import taken_by


class Noised(NamedTuple):
    """A batch of images, encoded and noised."""

    x: torch.Tensor | Posterior
    """The normalised images (B, C, H, W), or their posteriors from a cache."""
    z_0: torch.Tensor
    """Their latents (B, N, d)."""
    eps: torch.Tensor
    """The noise (B, N, d)."""
    t: torch.Tensor
    """The noise levels, int64 (B,)."""
    tokens: torch.Tensor
    """The denoiser's input for z_t (B, N, d or D)."""
    kept: torch.Tensor | None
    """The indices of the tokens that the encoder gets, int64 (B, n); None if it gets all."""


class LDAE(nn.Module):
    """A tokenizer, a noise schedule, a denoiser and an objective.

    Rows differ in these four and share one forward pass. An image (C, H, W) is N tokens: latents of
    d numbers, or patches of D = C p^2 numbers.

    Args:
        gamma, sigma: every level of the schedule, (T,) each.
        image_input: show the denoiser the inverse projection of z_t (B, N, D) instead of z_t.
        samples_posterior: train on draws from the tokenizer's posterior instead of its mean.
        clean_share: share of the images that training noises at the lowest level, t = 0.
        label_dropout: share of the labels that training replaces by the null label.
        num_kept: number of tokens that the encoder gets in training; by default all.
        feature_target: a target beside that of the objective, for which the denoiser's output has W
            further numbers.
        seed: determines every draw, together with the image's position in the run.
        bf16: run the networks under autocast; the rest keeps the precision of the parameters.
    """

    gamma: torch.Tensor
    sigma: torch.Tensor
    feature_target: FeatureTarget | None
    compiled_parts = ("add_noise", "loss", "feature_target")  # beside the blocks of the denoiser

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
        clean_share: float = 0.0,
        label_dropout: float = 0.0,
        num_kept: int | None = None,
        feature_target: FeatureTarget | None = None,
        seed: int = 0,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(False)  # it was fitted before
        self.denoiser, self.objective = denoiser, objective
        self.feature_target = feature_target
        self.register_buffer("gamma", gamma.float(), persistent=False)
        self.register_buffer("sigma", sigma.float(), persistent=False)
        self.image_input, self.samples_posterior = image_input, samples_posterior
        self.clean_share, self.label_dropout = clean_share, label_dropout
        self.num_kept, self.seed, self.bf16 = num_kept, seed, bf16

    @property
    def feature_timestep(self) -> int:
        """The t of a backbone's features, see ``noise.feature_timestep``."""
        return noise.feature_timestep(len(self.sigma))

    def forward(
        self, images: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a batch, a scalar; with a feature target also its two parts, detached.

        Args:
            images: uint8 (B, C, H, W), or in their place rows of a latent cache, see ``read``.
            positions: int64 (B,), the number of each image in the run. With the seed it determines
                t, the noise, the draw from the posterior, the dropped labels and the kept tokens.
            labels: int64 (B,), read only by a class-conditional denoiser.
        """
        noised = self.add_noise(images, positions)
        labels = self.drop_labels(labels, positions)
        output = self.run_denoiser(noised.tokens, noised.t, labels, noised.kept)  # (B, N, d or D)
        features = self.clean_features(noised.z_0)  #                             (B, N, W), or None
        return self.loss(noised, output, features)

    def add_noise(self, images: torch.Tensor, positions: torch.Tensor) -> Noised:
        """Encode images, uint8 (B, C, H, W), and noise their latents by ``positions`` (B,)."""
        x = self.read(images)  #                                                  (B, C, H, W)
        z_0 = self.encode(x, positions)  #                                        (B, N, d)
        t = draws.timesteps(self.seed, positions, len(self.sigma), self.clean_share)  # (B,)
        eps = draws.normal(self.seed, positions, z_0.shape[1:]).to(z_0)  #        (B, N, d)
        gamma, sigma = self.level(t)  #                                           (B, 1, 1)
        z_t = gamma * z_0 + sigma * eps  #                                        (B, N, d)
        kept = self.keep(positions)  #                                            (B, n), or None
        return Noised(x, z_0, eps, t, self.network_input(z_t), kept)

    def clean_features(self, z_0: torch.Tensor) -> torch.Tensor | None:
        """Return the feature target (B, N, W) for clean latents z_0 (B, N, d), or None."""
        if self.feature_target is None:
            return None
        t = self.feature_timestep
        tokens = self.network_input(self.gamma[t] * z_0)
        with self._autocast():
            return self.feature_target(tokens, torch.full((len(z_0),), t, device=z_0.device))

    def loss(
        self, noised: Noised, output: torch.Tensor, features: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, a scalar, of the denoiser's output (B, N, d or D).

        With the feature target ``features`` (B, N, W), the output has W further numbers, and the
        two parts of the loss are returned too, detached.
        """
        x, z_0, eps, t, _, kept = noised
        target = self.objective.target(self.tokenizer, x, z_0, eps, *self.level(t))
        output, own = output.to(target), self.objective.out_dim
        loss = self.objective.loss(self.tokenizer, target - output[..., :own], t, kept)
        if self.feature_target is None or features is None:
            return loss
        return self.feature_target.add_loss(loss, features, output[..., own:], kept)

    def after_step(self) -> None:
        """Let the feature target follow the encoder; the loop calls this after each update."""
        if self.feature_target is not None:
            self.feature_target.follow(self.denoiser)

    def read(self, images: torch.Tensor) -> torch.Tensor | Posterior:
        """Return images, uint8 (B, C, H, W), normalised.

        Rows of a latent cache, float16 (B, 1 or 2, N, d), are returned as posteriors.
        """
        if images.dtype == torch.uint8:
            return self.tokenizer.normalize(images)
        return Posterior(*images.to(self.gamma).unbind(1))

    def encode(
        self, x: torch.Tensor | Posterior, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return z_0 (B, N, d) of normalised images (B, C, H, W), or of their posteriors.

        A posterior gives its mean or, if the method samples it, the draw of ``positions`` (B,).
        """
        eps = None
        if self.samples_posterior and positions is not None:
            shape = (self.tokenizer.num_tokens, self.tokenizer.dim)
            eps = draws.normal(self.seed, positions, shape, draws.POSTERIOR).to(self.gamma)
        if isinstance(x, Posterior):
            return x.sample(eps)
        with torch.no_grad(), self._autocast(self.tokenizer.trained):
            return self.tokenizer.encode(x, eps).to(x)

    def keep(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Return the indices of the kept tokens, int64 (B, n), of images at ``positions`` (B,)."""
        if self.num_kept is None:
            return None
        return masking.kept_tokens(self.seed, positions, self.tokenizer.num_tokens, self.num_kept)

    def drop_labels(
        self, labels: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor | None:
        """Return labels (B,), a share of them replaced by the null label.

        The result is None for an unconditional denoiser.
        """
        null = self.denoiser.num_classes
        if not null:
            return None
        assert labels is not None, "a class-conditional denoiser is trained with labels"
        dropped = draws.dropped_labels(self.seed, positions, self.label_dropout)
        return labels.masked_fill(dropped, null)

    def level(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gamma_t and sigma_t, (B, 1, 1) each, at t (B,)."""
        return self.gamma[t, None, None], self.sigma[t, None, None]

    def predict(
        self, z_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the denoiser's output (B, N, d or D) for z_t (B, N, d) at t (B,).

        Without ``labels`` (B,) every label is the null label.
        """
        output = self.run_denoiser(self.network_input(z_t), t, labels)
        return output[..., : self.objective.out_dim].to(z_t)

    def run_denoiser(
        self,
        tokens: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the denoiser's output for its tokens, in its own precision.

        The output is (B, N, d or D), with W further numbers a token for a feature target.
        """
        with self._autocast():
            return self.denoiser(tokens, t, labels, kept)

    def network_input(self, z_t: torch.Tensor) -> torch.Tensor:
        """Return the denoiser's tokens: z_t (B, N, d), or its inverse projection (B, N, D)."""
        if not self.image_input:
            return z_t
        assert isinstance(self.tokenizer, PatchTokenizer)  # as ``build`` checks
        return self.tokenizer.inverse(z_t)

    def input_at(
        self, x: torch.Tensor, t: int, eps: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the denoiser's tokens and condition for normalised images x (B, C, H, W) at t.

        Without ``eps`` (B, N, d) no noise is added: z_t = gamma_t z_0.
        """
        z_t = self.gamma[t] * self.encode(x)
        if eps is not None:
            z_t = z_t + self.sigma[t] * eps
        condition = self.denoiser.condition(torch.full((len(x),), t, device=x.device))
        return self.network_input(z_t), condition

    @torch.no_grad()
    def features(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Return the encoder's features (B, W) of clean normalised images at t.

        They are the mean over the tokens.
        """
        return self.denoiser.encode(*self.input_at(x, t)).mean(1)

    def denoise(
        self, z_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the predicted z_0 (B, N, d) of z_t at t (B,), for samplers.

        A network that predicts the noise or the score needs gamma_t above 0. A run whose target has
        no ``clean`` cannot be sampled.
        """
        output = self.predict(z_t, t, labels)
        assert self.objective.clean is not None  # samplers refuse other runs
        return self.objective.clean(self.tokenizer, output, z_t, *self.level(t))

    def predict_image(
        self,
        z_t: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        x: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the predicted normalised images (B, C, H, W) of z_t at t (B,).

        They are the output of a network that predicts images, and otherwise z_0 decoded. A network
        that predicts normalised patches needs the clean images x (B, C, H, W), which give each
        patch its mean and variance.
        """
        if self.objective.patches is None:
            return self.decode(self.denoise(z_t, t, labels))
        patches = self.objective.patches(self.tokenizer, self.predict(z_t, t, labels), x)
        return unpatchify(patches, self.tokenizer.patch_size, self.tokenizer.in_chans)

    def decode(self, z_0: torch.Tensor) -> torch.Tensor:
        """Return the normalised images (B, C, H, W) of latents (B, N, d)."""
        with self._autocast(self.tokenizer.trained):
            return self.tokenizer.decode(z_0).to(z_0)

    @torch.no_grad()
    def denoise_images(
        self, images: torch.Tensor, positions: torch.Tensor, t: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return clean, noised (z_t decoded) and denoised pictures of uint8 images at t.

        All are (B, C, H, W), with values in [0, 1].
        """
        x = self.tokenizer.normalize(images)
        z_0 = self.encode(x)
        steps = torch.full_like(positions, t)
        gamma, sigma = self.level(steps)
        z_t = gamma * z_0 + sigma * draws.normal(self.seed, positions, z_0.shape[1:]).to(z_0)
        pictures = (x, self.decode(z_t), self.predict_image(z_t, steps, x=x))
        clean, noised, denoised = (self.tokenizer.denormalize(p).clamp(0, 1) for p in pictures)
        return clean, noised, denoised

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        """Return the context in which the networks run, in bfloat16 if ``bf16`` is set."""
        return bf16_autocast(self.gamma.device, self.bf16 and enabled)


def build(config: Config, num_classes: int = 0, bf16: bool = False) -> LDAE:
    """Return the method of a configuration, with weights drawn from its seed.

    The tokenizer is not fitted yet.

    Raises: InputError when settings do not fit together.
    """
    tokenizer = build_tokenizer(config)
    image_input = config.objective.input == "image"
    if image_input:
        tokenizers.check_kind(PatchTokenizer, tokenizer, "objective.input image")
    gamma, sigma = noise.levels(**asdict(config.noise))
    if config.noise.clean_share and len(sigma) == 1:
        raise InputError(
            f"noise.clean_share must be 0: noise.schedule {config.noise.schedule} has one level"
        )
    objective = Objective(
        config.objective.target,
        config.objective.weight,
        config.objective.residual_weight,
        config.masking.kept_weight,
        gamma,
        sigma,
        tokenizer,
    )
    denoiser = _build_denoiser(config, tokenizer, objective, num_classes, image_input)
    tokens = tokenizer.num_tokens
    num_kept = masking.number_kept(config.masking.ratio, tokens, "masking.ratio")
    if num_kept < tokens:
        denoiser.add_mask_token()  # drawn last, so that the other weights are those without masking
    feature_target, features = None, config.features
    if features.share:
        feature_target = FeatureTarget(
            denoiser, features.share, features.decay, features.kept_weight
        )
    return LDAE(
        tokenizer,
        denoiser,
        objective,
        gamma,
        sigma,
        image_input=image_input,
        samples_posterior=tokenizer.stochastic and config.tokenizer.posterior == "sample",
        clean_share=config.noise.clean_share,
        label_dropout=config.model.label_dropout,
        num_kept=num_kept if num_kept < tokens else None,
        feature_target=feature_target,
        seed=config.seed,
        bf16=bf16,
    )


def _build_denoiser(
    config: Config,
    tokenizer: Tokenizer,
    objective: Objective,
    num_classes: int,
    image_input: bool,
) -> Denoiser:
    """Return the denoiser of a configuration, with weights drawn from its seed.

    Raises: InputError when settings do not fit together.
    """
    name = config.model.denoiser
    settings = asdict(getattr(config, name, config.model))  # DiT's are in config.model

    def create(out_dim: int) -> Denoiser:
        return DENOISERS[name](
            **taken_by(DENOISERS[name], settings),
            side=tokenizer.side,
            in_dim=tokenizer.patch_dim if image_input else tokenizer.dim,
            out_dim=out_dim,
            num_classes=num_classes if config.model.class_conditional else 0,
            checkpoint_activations=config.system.checkpoint_activations,
        )

    out_dim = objective.out_dim
    if config.features.share:
        with torch.device("meta"):  # only for its width
            out_dim += create(out_dim).width
    torch.manual_seed(config.seed)
    return create(out_dim)


def build_tokenizer(config: Config) -> Tokenizer:
    """Return the unfitted tokenizer of a configuration, with weights drawn from its seed.

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
