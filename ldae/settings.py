"""The configuration. Its defaults are l-DAE at the paper's scale, each with its why beside it."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ldae.tree import COUNT, DECAY, NOT_NEGATIVE, POSITIVE, SHARE, Choice, Range


@dataclass(frozen=True)
class DataSettings:
    """Which images, and how they become squares."""

    source: Annotated[str, tyro.conf.arg(aliases=["--data"], metavar="SOURCE")] = ""
    """A folder, a .zip or .tar of one, torch/NAME@DIR, hfds/NAME, scattered-digits[:N] or digits."""
    eval_source: Annotated[str, tyro.conf.arg(aliases=["--eval-data"], metavar="SOURCE")] = ""
    """Images of the online k-NN; empty: the evaluation split of the source."""
    img_size: Annotated[int, COUNT] = 256  # 16 x 16 tokens of 16 x 16 pixels
    """Side of the square that the network sees, in pixels."""
    in_chans: Annotated[int, COUNT] = 3
    """Channels: 1 grey, 3 RGB, 4 RGBA, any number from .npy arrays."""
    crop: Literal["center", "random"] = "center"  # the paper: l-DAE hardly relies on augmentation
    """Center crop, or random resized crop (+0.5 points in the paper)."""
    flip: bool = False  # the paper states none
    """Mirror half of the training images."""
    stats: Literal["auto", "imagenet"] = "auto"
    """Where mean and std come from when they are not given: the data itself, or ImageNet's."""
    mean: Annotated[tuple[float, ...], SHARE] = ()
    """Mean of each channel, in [0, 1]."""
    std: Annotated[tuple[float, ...], POSITIVE] = ()
    """Standard deviation of each channel, in [0, 1]."""
    bad_images: Literal["stop", "skip"] = "stop"
    """What an undecodable image does: stop the run, or be replaced by the next one and counted."""


@dataclass(frozen=True)
class OptimSettings:
    """The recipe. Progress is counted in images."""

    batch_size: Annotated[int, COUNT] = 2048
    """Images of one step, over all devices."""
    blr: Annotated[float, POSITIVE] = 1e-4
    """Learning rate at batch 256: lr = blr * batch_size / 256."""
    epochs: Annotated[float, POSITIVE] = 400
    """Passes over the data."""
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 100
    """Passes of linear warm-up, before the half-cosine to min_lr."""
    min_lr: Annotated[float, NOT_NEGATIVE] = 0.0
    """Learning rate at the end of the half-cosine."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0  # DiT's and the paper's
    """AdamW's, on matrices only."""
    betas: Annotated[tuple[float, float], DECAY] = (0.9, 0.999)  # unstated in the paper; DiT's
    """AdamW's."""
    clip_grad: Annotated[float, NOT_NEGATIVE] = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    ema: Annotated[float, DECAY] = 0.0
    """Decay of the moving average of the weights, a step; 0: none. Evaluations use it if it is on."""


@dataclass(frozen=True)
class TokenizerSettings:
    """How an image becomes latent tokens."""

    name: Annotated[str, Choice("ldae.tokenizers:TOKENIZERS")] = "patch_pca"
    """The map from pixels to tokens."""
    dim: Annotated[int, COUNT] = 32  # the best of 8 to 128 for PCA of 16 x 16 patches (Table 2)
    """Latent dimension d of one token."""
    scale: Literal["raw", "global", "per-axis"] = "per-axis"  # benchmarks/results/cifar10-latents
    """Scale of latents before unit noise: as they are, unit mean variance, unit variance each."""
    posterior: Literal["sample", "mean"] = "sample"  # DiT's
    """What a VAE's latents are in pre-training: drawn from its posterior, or the mean of it."""
    fit_images: Annotated[int, NOT_NEGATIVE] = 20_000  # 5 million patches, for 768 axes
    """Images of the statistics (axes, pixels, scales), the first in training order; 0: every one."""
    path: str = ""
    """A fitted tokenizer.safetensors to use instead of fitting one."""
    pretrained: str = ""
    """conv_vae: a published AutoencoderKL or VQModel, a folder or a name on the hub, as it is."""
    width: Annotated[int, COUNT] = 128  # LDM's
    """conv_vae: channels at full resolution; they double at the second and the third."""
    codes: Annotated[int, NOT_NEGATIVE] = 0
    """conv_vae: size of the codebook of vector quantisation; 0: none, but a Gaussian posterior."""
    kl_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of KL[posterior | N(0, 1)], a sum over an image as is the reconstruction error."""
    perceptual_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    """conv_vae: weight of the perceptual distance, times the numbers of an image."""
    perceptual_net: str = "vgg16"
    """vgg16: LPIPS, by torchvision's weights, or vgg16@FILE; else a backbone's features, as a spec."""
    adversarial_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    """conv_vae: weight of the PatchGAN's hinge loss, times its adaptive weight."""
    adversarial_start: Annotated[int, NOT_NEGATIVE] = 50_000  # LDM's
    """Step from which on the discriminator is trained and counts."""
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(
            batch_size=256,
            blr=1.152e-3,  # LDM's 4.5e-6 an image
            epochs=40,
            warmup_epochs=1,
            betas=(0.5, 0.9),
        )
    )
    """The recipe of the tokenizers that are trained: patch_ae, patch_vae and conv_vae."""


@dataclass(frozen=True)
class NoiseSettings:
    """z_t = gamma_t z_0 + sigma_t eps."""

    schedule: Annotated[str, Choice("ldae.noise:SCHEDULES")] = "linear_sigma"
    """ddpm, cosine, linear_gamma2: gamma^2 + sigma^2 = 1. linear_sigma, geometric, single: gamma = 1.
    rectified_flow: gamma + sigma = 1."""
    steps: Annotated[int, COUNT] = 1000
    """Number T of noise levels; single has one."""
    max_sigma: Annotated[float, POSITIVE] = math.sqrt(2)  # a signal-to-noise ratio of 1/2
    """Largest sigma of linear_sigma and geometric."""
    min_sigma: Annotated[float, POSITIVE] = 0.01
    """Smallest sigma of geometric."""
    single_sigma: Annotated[float, POSITIVE] = math.sqrt(1 / 3)
    """The sigma of single."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the network sees and predicts."""

    input: Literal["latent", "image"] = "image"
    """Noised latents, or their inverse projection: a noisy image."""
    target: Annotated[str, Choice("ldae.objective:TARGETS")] = "image"
    """The noise, the clean latent z_0, v, the score or the velocity of z_t (ldae/prediction.py); the
    inverse projection of z_0, or the original image."""
    weight: Annotated[str, Choice("ldae.objective:WEIGHTS")] = "inverse"
    """lambda_t: 1, gamma_t^2, sigma_t^2, or 1 / (1 + sigma_t^2)."""
    residual_weight: Annotated[float, NOT_NEGATIVE] = 0.1
    """Weight of the error outside the first d principal axes when the target is the image."""


@dataclass(frozen=True)
class ModelSettings:
    """The denoiser. DiT's encoder is described in timm's words; its decoder has as many blocks."""

    denoiser: Annotated[str, Choice("ldae.models:DENOISERS")] = "dit"
    """The network that denoises tokens."""
    name: str = "vit_large_patch16_224"
    """A timm ViT; the fields below override what it says."""
    patch_size: Annotated[int | None, COUNT] = None
    """Side of a patch in pixels; by default that of name."""
    depth: Annotated[int | None, COUNT] = 12  # "ViT-1/2L": DiT-L's 24 blocks are 12 + 12
    """Blocks of the encoder."""
    embed_dim: Annotated[int | None, COUNT] = None
    """Width of the tokens."""
    num_heads: Annotated[int | None, COUNT] = None
    """Attention heads."""
    cond_ratio: Annotated[float, POSITIVE] = 0.25  # at DiT's 1 it is a third of the parameters
    """Width of the conditioning as a share of embed_dim."""
    class_conditional: bool = False
    """Tell the network the label, as DiT does."""
    label_dropout: Annotated[float, SHARE] = 0.1
    """How often the label is withheld when class_conditional."""


@dataclass(frozen=True)
class ExecutionSettings:
    """How any run is executed. These settings may change between the parts of a resumed run."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the network; auto: bf16 where the device computes it natively."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on GPUs."""
    checkpoint_activations: bool = False
    """Recompute the blocks in the backward pass: less memory, a third more time."""
    device_batch: Annotated[int, NOT_NEGATIVE] = 0
    """Largest batch of one device at once; smaller than its share: gradients accumulate. 0: all."""
    workers: Annotated[int, NOT_NEGATIVE] = 8
    """Data workers of each process; 0: load in the process itself."""
    log_every: Annotated[int, COUNT] = 20
    """Steps between two lines of progress."""
    save_minutes: Annotated[float, NOT_NEGATIVE] = 10
    """Minutes between two checkpoints; there is always one at the end."""
    keep: Annotated[int, NOT_NEGATIVE] = 2
    """Newest checkpoints to keep; 0: all."""
    explosion: Annotated[float, Range(1, open_low=True, or_zero=True)] = 0.0
    """A loss of more than so many times the median of the last 100 steps is undone: the run goes back
    to its last checkpoint, once, and leaves out the batch. 0: never."""
    fsdp: bool = False
    """Spread weights, gradients and moments over the ranks (FSDP2), for what does not fit on each."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder (extra: tensorboard)."""
    wandb: str = ""
    """Weights & Biases project to log to (extra: wandb)."""


@dataclass(frozen=True)
class SystemSettings(ExecutionSettings):
    """How a pre-training is executed."""

    knn_every: Annotated[int, NOT_NEGATIVE] = 0
    """Epochs between two online k-NN evaluations; 0: none."""
    rank_timeout: Annotated[float, POSITIVE] = 30
    """Minutes that ranks wait for each other until they name the one that hangs, and end."""


@dataclass(frozen=True)
class Config:
    """One pre-training."""

    data: DataSettings = field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    system: SystemSettings = field(default_factory=SystemSettings)
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Of the weights, the data order, the augmentation and the noise."""
    init_from: str = ""
    """An exported backbone to start the encoder from."""
