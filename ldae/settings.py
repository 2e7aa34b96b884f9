"""The configuration of a pre-training. The defaults are l-DAE at the paper's scale."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from ldae.tree import COUNT, DECAY, NOT_NEGATIVE, POSITIVE, SHARE, KeyOf, Range


@dataclass(frozen=True)
class DataSettings:
    """The images, and how they are cropped and normalised."""

    source: Annotated[str, tyro.conf.arg(aliases=["--data"], metavar="SOURCE")] = ""
    """A folder, its .zip or .tar; a folder of .tar shards or .parquet files; a list (.txt, .csv,
    .tsv); a file of `ldae cache`; torch/NAME@DIR (torchvision); hfds/NAME (Hugging Face datasets);
    scattered-digits[:N], digits or digit-scenes[:N] (built in)."""
    latents: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """conv_vae: the latents of the training images, which `ldae cache --latents` wrote; the
    tokenizer, named by tokenizer.path, then encodes no image in training."""
    eval_source: Annotated[str, tyro.conf.arg(aliases=["--eval-data"], metavar="SOURCE")] = ""
    """Evaluation images of the tokenizer, the online k-NN and the pictures; empty: the evaluation
    split of the images, if they have one."""
    img_size: Annotated[int, COUNT] = 256  # 16 x 16 tokens of 16 x 16 pixels
    """Side of the square image, in pixels."""
    in_chans: Annotated[int, COUNT] = 3
    """Channels: 1 grey, 3 RGB, 4 RGBA, or any number of .npy arrays and TIFF bands."""
    crop: Literal["center", "random"] = "center"  # the paper: l-DAE hardly relies on augmentation
    """Center crop or random resized crop (+0.5 points in the paper)."""
    flip: bool = False  # the paper states none
    """Mirror half of the training images."""
    stats: Literal["auto", "imagenet"] = "auto"
    """Default mean and std of the channels; auto: measured on the data."""
    mean: Annotated[tuple[float, ...], SHARE] = ()
    """Mean of each channel, in [0, 1]."""
    std: Annotated[tuple[float, ...], POSITIVE] = ()
    """Standard deviation of each channel, in [0, 1]."""
    bad_images: Literal["stop", "skip"] = "stop"
    """For an undecodable image: stop the run, or record it and use the next image instead."""


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer and its learning rate, which is a function of the images seen."""

    batch_size: Annotated[int, COUNT] = 2048
    """Images in a step, over all devices."""
    blr: Annotated[float, POSITIVE] = 1e-4
    """Learning rate at batch 256: lr = blr * batch_size / 256."""
    epochs: Annotated[float, POSITIVE] = 400
    """Passes over the data."""
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 100
    """Epochs of linear warm-up, before the half-cosine to min_lr."""
    min_lr: Annotated[float, NOT_NEGATIVE] = 0.0
    """Learning rate at the end of the half-cosine."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0  # DiT's and the paper's
    """Weight decay of AdamW, on matrices only."""
    betas: Annotated[tuple[float, float], DECAY] = (0.9, 0.999)  # unstated in the paper; DiT's
    """Betas of AdamW."""
    clip_grad: Annotated[float, NOT_NEGATIVE] = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    ema: Annotated[float, DECAY] = 0.0
    """Decay per step of the average of the weights, which evaluations then use; 0: no average."""
    ema_warmup: bool = False
    """Let the decay of the average rise from 0, so that it forgets the initial weights."""


@dataclass(frozen=True)
class TokenizerSettings:
    """The tokenizer: the map from images to latent tokens."""

    name: Annotated[str, KeyOf("ldae.tokenizers:TOKENIZERS")] = "patch_pca"
    """The kind of tokenizer."""
    dim: Annotated[int, COUNT] = 32  # the best of 8 to 128 for PCA of 16 x 16 patches (Table 2)
    """Dimension d of a latent token."""
    scale: Literal["auto", "raw", "global", "per-axis"] = "auto"
    """Scale of the latents: raw (unchanged, or with the published factor), global (unit mean
    variance) or per-axis (unit variance of each axis). auto: per-axis for patch-wise tokenizers,
    global for conv_vae, raw for published weights."""
    posterior: Literal["sample", "mean"] = "sample"  # DiT's
    """Latents of a VAE in pre-training: samples from the posterior, or its mean."""
    fit_images: Annotated[int, NOT_NEGATIVE] = 20_000  # 5 million patches, for 768 axes
    """Images to fit axes, pixel statistics and scales on, the first in training order; 0: all."""
    path: str = ""
    """A fitted tokenizer.safetensors to use instead of fitting a tokenizer."""
    pretrained: str = ""
    """conv_vae: a published AutoencoderKL or VQModel, used unchanged: a folder or a hub name."""
    width: Annotated[int, COUNT] = 128  # LDM's
    """conv_vae: channels at full resolution; doubled at the second and the third resolution."""
    codes: Annotated[int, NOT_NEGATIVE] = 0
    """conv_vae: size of the codebook of vector quantisation; 0: a Gaussian posterior instead."""
    kl_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of KL[posterior | N(0, 1)]; like the reconstruction error, a sum over an image."""
    perceptual_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    """conv_vae: weight of the perceptual distance, times the count of numbers in an image."""
    perceptual_net: str = "vgg16"
    """vgg16 for LPIPS with torchvision's weights, vgg16@FILE, or the spec of any backbone."""
    adversarial_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    """conv_vae: weight of the PatchGAN's hinge loss, times its adaptive weight."""
    adversarial_start: Annotated[int, NOT_NEGATIVE] = 50_000  # LDM's
    """First step in which the discriminator is trained and adds to the loss."""
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(
            batch_size=256,
            blr=1.152e-3,  # LDM's 4.5e-6 an image
            epochs=40,
            warmup_epochs=1,
            betas=(0.5, 0.9),
        )
    )
    """The recipe of patch_ae, patch_vae and conv_vae, the tokenizers that gradients train."""


@dataclass(frozen=True)
class NoiseSettings:
    """The noise: z_t = gamma_t z_0 + sigma_t eps."""

    schedule: Annotated[str, KeyOf("ldae.noise:SCHEDULES")] = "linear_sigma"
    """ddpm, cosine and linear_gamma2 keep gamma^2 + sigma^2 = 1; linear_sigma, geometric and single
    gamma = 1; rectified_flow gamma + sigma = 1."""
    steps: Annotated[int, COUNT] = 1000
    """Number T of noise levels; single has one level."""
    max_sigma: Annotated[float, POSITIVE] = math.sqrt(2)  # a signal-to-noise ratio of 1/2
    """Largest sigma of linear_sigma and geometric."""
    min_sigma: Annotated[float, POSITIVE] = 0.01
    """Smallest sigma of geometric."""
    single_sigma: Annotated[float, POSITIVE] = math.sqrt(1 / 3)
    """Sigma of single."""
    clean_share: Annotated[float, SHARE] = 0.0
    """Share of the training images at the lowest noise level, t = 0, where linear_sigma adds no
    noise. The levels of the others are uniform."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """The input and the target of the network, and the weights of the loss."""

    input: Literal["latent", "image"] = "image"
    """Noised latents z_t, or their inverse projection: a noisy image."""
    target: Annotated[str, KeyOf("ldae.objective:TARGETS")] = "image"
    """image: the original image; projected: the inverse projection of z_0; whitened: the image on
    its principal axes, each with unit variance; normalized: MAE's pixels, where each patch has zero
    mean and unit variance; latent: z_0; eps, v, score, velocity: see ldae/prediction.py."""
    weight: Annotated[str, KeyOf("ldae.objective:WEIGHTS")] = "inverse"
    """Weight lambda_t of a noise level: 1, gamma_t^2, sigma_t^2 or 1 / (1 + sigma_t^2)."""
    residual_weight: Annotated[float, NOT_NEGATIVE] = 0.1
    """Weight of the error outside the first d principal axes, for the targets image and whitened.
    With target whitened, 1 weights all axes alike, and with 0 only the first d axes count."""


@dataclass(frozen=True)
class MaskingSettings:
    """The tokens that are dropped before the encoder, as in MAE, and the weights of the others."""

    ratio: Annotated[float, SHARE] = 0.0
    """Share of the tokens that the encoder does not get. The decoder gets a learned token in place
    of each, and predicts all tokens. Features of a run are always those of all tokens."""
    kept_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of a kept token in the loss, a weighted mean in which a dropped token has weight 1."""


@dataclass(frozen=True)
class FeatureSettings:
    """The feature target: features of the clean image by a moving average of the encoder, as in
    data2vec, beside the row's own target."""

    share: Annotated[float, SHARE] = 0.0
    """Share of the feature target in the loss, of which the other target has the rest; 0: off."""
    kept_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of a kept token in the loss of the feature target, as masking.kept_weight."""
    decay: Annotated[float, DECAY] = 0.996  # BYOL's
    """Decay per step of the moving average of the encoder."""


@dataclass(frozen=True)
class ViTSettings:
    """The parts of DiT's blocks and of its encoder. init_from takes them from the start."""

    class_token: bool = False
    """A learned token before the patches, which ends with the encoder."""
    reg_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """Register tokens, which follow the class token and end with the encoder too."""
    act_layer: Annotated[str, KeyOf("ldae.models.activations:ACTIVATIONS")] = "gelu_tanh"
    """The activation of the MLPs."""
    norm_eps: Annotated[float, POSITIVE] = 1e-6
    """Epsilon of the LayerNorms in blocks."""
    pre_norm: bool = False
    """A LayerNorm before the first block, as in CLIP."""
    final_norm: bool = False
    """A LayerNorm behind the last block of the encoder."""
    pos_embed: Literal["sincos", "learn"] = "sincos"
    """Positions: sine-cosine constants, or a learned table that begins as these."""


@dataclass(frozen=True)
class ModelSettings:
    """The choice of a denoiser, and the sizes of DiT: its encoder and its decoder."""

    denoiser: Annotated[str, KeyOf("ldae.models:DENOISERS")] = "dit"
    """The kind of denoiser."""
    name: str = "vit_large_patch16_224"
    """A timm ViT. It gives those of patch_size, depth, embed_dim, num_heads and mlp_ratio that are
    null. depth is not, but has the paper's 12 blocks: set half of the blocks of another ViT."""
    patch_size: Annotated[int | None, COUNT] = None
    """Side of a patch, in pixels."""
    depth: Annotated[int | None, COUNT] = 12  # "ViT-1/2L": DiT-L's 24 blocks are 12 + 12
    """Blocks of the encoder."""
    embed_dim: Annotated[int | None, COUNT] = None
    """Width of the encoder."""
    num_heads: Annotated[int | None, COUNT] = None
    """Attention heads of the encoder."""
    mlp_ratio: Annotated[float | None, POSITIVE] = None
    """Width of the MLPs, as a multiple of that of the tokens."""
    decoder_depth: Annotated[int | None, COUNT] = None
    """Blocks of the decoder; by default as many as the encoder has."""
    decoder_embed_dim: Annotated[int | None, COUNT] = None
    """Width of the decoder; by default that of the encoder."""
    decoder_num_heads: Annotated[int | None, COUNT] = None
    """Attention heads of the decoder; by default as many as the encoder has."""
    vit: ViTSettings = field(default_factory=ViTSettings)
    cond_ratio: Annotated[float, POSITIVE] = 0.25  # DiT's 1 takes a third of the parameters
    """Width of the conditioning as a share of embed_dim."""
    class_conditional: bool = False
    """Condition the network on the label, as DiT does."""
    label_dropout: Annotated[float, SHARE] = 0.1
    """Probability that a label is dropped, with class_conditional."""


@dataclass(frozen=True)
class UNetSettings:
    """The sizes of the U-Net, with model.denoiser unet. The defaults are DDPM's for CIFAR-10."""

    channels: Annotated[tuple[int, ...], COUNT] = (128, 256, 256, 256)
    """Width of each level; the map is halved from one level to the next."""
    layers: Annotated[int, COUNT] = 2
    """Residual blocks of a level on the way down; there is one more on the way up."""
    attn_resolutions: Annotated[tuple[int, ...], COUNT] = (16,)
    """Sides of the maps, in tokens, whose levels have self-attention. The middle always has."""
    dropout: Annotated[float, DECAY] = 0.1
    """Dropout inside of the residual blocks."""
    groups: Annotated[int, COUNT] = 32
    """Groups of the group normalisation."""


@dataclass(frozen=True)
class ExecutionSettings:
    """The execution of a run. These settings may change when a run resumes."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """Precision of the network; auto: bf16 on devices on which it is faster than float32. All but
    tf32 compute float32 products without TF32."""
    deterministic: bool = False
    """On a GPU, use only algorithms that give the same bits each time; they are slower. A resumed
    run equals an undisturbed one bit for bit on a CPU; no GPU has shown this yet."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, which compiles a block once for all blocks; auto: on GPUs, if there are the C
    compiler and Python's headers by which their kernels are built."""
    cuda_graphs: bool = False
    """With compile, on a single GPU: replay the kernels of a block as a CUDA graph, for steps of
    less than about 20 ms, in which launching kernels takes long. No GPU has run this yet."""
    memory_budget: Annotated[float, SHARE] = 0.5
    """With compile: the share of a block's activations to keep for the backward pass, which
    recomputes the others, the cheapest first."""
    checkpoint_activations: bool = False
    """Recompute whole blocks in the backward pass: little memory, a third more time."""
    device_batch: Annotated[int | Literal["auto"], NOT_NEGATIVE] = "auto"
    """Largest batch of a device; a larger share of optim.batch_size is split, and gradients
    accumulate. 0: the whole share; auto: the largest that fits into the memory of a GPU, tried
    before the first step and kept in checkpoints (the whole share with fsdp)."""
    workers: Annotated[int, NOT_NEGATIVE] = 8
    """Data workers of each process; 0: load in the process itself."""
    log_every: Annotated[int, COUNT] = 20
    """Steps between two lines of progress, which are records in metrics.jsonl too; fewer in short
    runs, so that each has at least ten lines."""
    save_minutes: Annotated[float, NOT_NEGATIVE] = 10
    """Minutes between two checkpoints; the end of the run is always saved."""
    keep: Annotated[int, NOT_NEGATIVE] = 2
    """Newest checkpoints to keep; 0: all."""
    explosion: Annotated[float, Range(1, open_low=True, or_zero=True)] = 0.0
    """If the loss exceeds this multiple of the median of the last 100 steps, return to the last
    checkpoint and leave out the batch. A second time before the next checkpoint ends the run. 0:
    off."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer moments over the ranks (FSDP2)."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder (extra: tensorboard)."""
    wandb: str = ""
    """Weights & Biases project to log to (extra: wandb)."""


@dataclass(frozen=True)
class SystemSettings(ExecutionSettings):
    """The execution of a pre-training."""

    knn_every: Annotated[int, NOT_NEGATIVE] = 0
    """Epochs between two online k-NN evaluations; 0: none."""
    knn_source: Annotated[str, tyro.conf.arg(metavar="SOURCE")] = ""
    """Labelled images of the online k-NN; empty: the training images."""
    watch_every: Annotated[int | Literal["auto"], NOT_NEGATIVE] = "auto"
    """Images between two measurements of the features (RankMe, spread) and of the reconstruction at
    three noise levels, on 256 training images without labels; a collapse or a standstill is
    reported. auto: a quarter of an epoch, at least 4096; 0: none."""
    rank_timeout: Annotated[float, POSITIVE] = 30
    """Minutes that ranks wait for each other before they name the rank that hangs and end."""


@dataclass(frozen=True)
class Config:
    """The settings of a pre-training."""

    data: DataSettings = field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    masking: MaskingSettings = field(default_factory=MaskingSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    unet: UNetSettings = field(default_factory=UNetSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    system: SystemSettings = field(default_factory=SystemSettings)
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of the weights, the data order, the augmentation and the noise."""
    init_from: str = ""
    """A plain ViT to start the encoder from: a run, an exported folder, a timm name or NAME@FILE.
    It decides the encoder's architecture, and the pixel statistics unless these are given."""


UNNAMED_SIZES: dict[str, Any] = {
    "model.name": "",
    "model.patch_size": None,
    "model.depth": None,
    "model.embed_dim": None,
    "model.num_heads": None,
    "model.mlp_ratio": None,
}
"""The sizes that init_from decides, none of them named."""
