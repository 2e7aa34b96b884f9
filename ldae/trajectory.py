"""The paper's trajectory (tables 1 to 3, Fig. 6) as code: each row changes the row before it."""

from dataclasses import dataclass, field
from typing import Any

from ldae.errors import InputError, unknown
from ldae.settings import Config
from ldae.tree import flatten, put


@dataclass(frozen=True)
class Row:
    """A row of the trajectory, with its published ImageNet numbers (DiT-L, 400 epochs)."""

    number: int | None
    """Place in the trajectory; None for a row of ``BESIDE``."""
    name: str
    summary: str
    changes: dict[str, Any] = field(hash=False)
    """Changes to the row before, or to ``base``."""
    accuracy: float | None = None
    """Published top-1 accuracy of linear probing the encoder, in percent."""
    fid: float | None = None
    """Published FID-50K, if there is one."""
    base: str = ""
    """Name of the row that a row outside the trajectory changes."""
    recipe: dict[str, Any] = field(default_factory=dict, hash=False)
    """Changes to the data and the training, where the row was published with its own. A run of the
    row may have others."""


ROWS = (
    Row(1, "dit", "DiT-L on a VQGAN-KL tokenizer, class-conditional", {
        "tokenizer.name": "conv_vae", "tokenizer.dim": 16,
        "tokenizer.kl_weight": 1e-6,
        "tokenizer.perceptual_weight": 1.0, "tokenizer.adversarial_weight": 0.5,
        "noise.schedule": "ddpm",
        "objective.input": "latent", "objective.target": "eps", "objective.weight": "uniform",
        "model.class_conditional": True,
    }, 57.5, 11.6),
    Row(2, "unconditional", "remove class-conditioning",
        {"model.class_conditional": False}, 62.5, 30.9),
    Row(3, "no_perceptual", "remove the VQGAN's perceptual loss",
        {"tokenizer.perceptual_weight": 0.0}, 58.4, 54.3),
    Row(4, "no_adversarial", "remove the VQGAN's adversarial loss",
        {"tokenizer.adversarial_weight": 0.0}, 59.0, 75.6),
    Row(5, "linear_gamma2", "replace the noise schedule",
        {"noise.schedule": "linear_gamma2"}, 63.4, 93.2),
    Row(6, "patch_vae", "patch-wise VAE; each latent axis has its own scale",
        {"tokenizer.name": "patch_vae", "tokenizer.kl_weight": 1.0}, 64.9),
    Row(7, "patch_ae", "patch-wise AE",
        {"tokenizer.name": "patch_ae", "tokenizer.kl_weight": 0.0}, 64.7),
    Row(8, "patch_pca", "patch-wise PCA",
        {"tokenizer.name": "patch_pca", "tokenizer.dim": 32}, 65.1),
    Row(9, "predict_latent", "predict clean data",
        {"objective.target": "latent", "objective.weight": "gamma2"}, 62.4),
    Row(10, "no_input_scaling", "remove input scaling",
        {"noise.schedule": "linear_sigma", "objective.weight": "inverse"}, 63.6),
    Row(11, "image_input", "image input by inverse PCA", {"objective.input": "image"}, 63.6),
    Row(12, "image_output", "image output by inverse PCA",
        {"objective.target": "projected"}, 63.9),
    Row(13, "l_dae", "predict the original image: l-DAE", {"objective.target": "image"}, 64.5),
    Row(14, "l_dae_single", "a single noise level", {"noise.schedule": "single"}, 61.5),
)  # fmt: skip

# Rows outside the trajectory: the paper mentions them, or they begin where it ends.
BESIDE = (
    Row(None, "dae", "a classical DAE: noise on pixels, no latent",
        {"tokenizer.name": "pixel", "tokenizer.dim": 768, "tokenizer.scale": "raw"},
        base="l_dae_single"),
    # What won the contest with MAE (docs/results.md): MAE's mask, its target and the sizes of its
    # decoder, and noise on half of the images.
    Row(None, "l_dae_masked", "l-DAE of a quarter of the tokens; predicts the others as MAE does", {
        "masking.ratio": 0.75, "masking.kept_weight": 0.0,
        "noise.clean_share": 0.5, "noise.max_sigma": 0.5,
        "objective.target": "normalized",
        "model.decoder_depth": 8, "model.decoder_embed_dim": 512, "model.decoder_num_heads": 16,
    }, base="l_dae"),
    Row(None, "vqvae", "row 4 on a VQ-VAE",
        {"tokenizer.codes": 16_384, "tokenizer.kl_weight": 0.0}, base="no_adversarial"),
    Row(None, "vqgan", "row 2 on a VQGAN",
        {"tokenizer.codes": 16_384, "tokenizer.kl_weight": 0.0}, base="unconditional"),
    # Ho et al. 2020 on CIFAR-10: 800,000 steps of Adam, which is AdamW without weight decay, on
    # pixels in [-1, 1]. Their samples are those of `--sampler ddpm --steps 1000 --clip`, but with
    # beta_t as the variance of a step, the larger of the two that they compare.
    Row(None, "ddpm", "DDPM: a U-Net on the pixels of 32 x 32 images", {
        "tokenizer.name": "pixel", "tokenizer.dim": 3, "tokenizer.scale": "raw",
        "noise.schedule": "ddpm",
        "model.denoiser": "unet", "model.patch_size": 1,
    }, base="patch_pca", recipe={
        "data.img_size": 32, "data.flip": True,
        "data.mean": (0.5, 0.5, 0.5), "data.std": (0.5, 0.5, 0.5),
        "optim.batch_size": 128, "optim.blr": 4e-4, "optim.min_lr": 2e-4,  # a constant 2e-4
        "optim.epochs": 2048, "optim.warmup_epochs": 12.8,  # 5,000 steps
        "optim.clip_grad": 1.0, "optim.ema": 0.9999,
    }),
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """The size at which any row is run."""

    changes: dict[str, Any] = field(hash=False)
    """Changes that are applied after those of the row."""
    sizes: dict[str, dict[Any, Any]] = field(hash=False)
    """Setting -> value at the paper's scale -> value at this scale. A row with another value keeps
    it."""


SCALES: dict[str, Scale] = {
    # ViT-1/2L, 256 x 256, batch 2048, 400 epochs: the defaults of settings.py.
    "paper": Scale({}, {}),
    # 32 x 32 images on one device.
    "small": Scale({
        "data.img_size": 32,
        "model.name": "vit_tiny_patch16_224", "model.depth": 4,
        "tokenizer.width": 32,
        "tokenizer.optim.batch_size": 64, "tokenizer.optim.epochs": 20,
        "tokenizer.adversarial_start": 2_000,
        "optim.batch_size": 256, "optim.blr": 1e-3, "optim.epochs": 200, "optim.warmup_epochs": 10,
        "system.workers": 2,
    }, {
        "tokenizer.dim": {16: 16, 32: 24, 768: 48}, "tokenizer.codes": {16_384: 1_024},
        "model.patch_size": {None: 4},
        "model.decoder_depth": {8: 2}, "model.decoder_embed_dim": {512: 96},
        "model.decoder_num_heads": {16: 3},
        "unet.channels": {(128, 256, 256, 256): (64, 128, 128, 128)},
    }),
    # The demonstration: minutes on two cores.
    "demo": Scale({
        "data.img_size": 32,
        "model.name": "vit_tiny_patch16_224", "model.depth": 2,
        "model.embed_dim": 128, "model.num_heads": 4,
        "tokenizer.width": 16,
        "tokenizer.optim.batch_size": 32, "tokenizer.optim.epochs": 2,
        "tokenizer.optim.warmup_epochs": 0.1,
        "tokenizer.adversarial_start": 500,
        "optim.batch_size": 128, "optim.blr": 2e-3, "optim.epochs": 4, "optim.warmup_epochs": 0.5,
        "system.log_every": 50, "system.workers": 0,
    }, {
        "tokenizer.dim": {16: 8, 32: 8, 768: 48}, "tokenizer.codes": {16_384: 256},
        "model.patch_size": {None: 4},
        "model.decoder_depth": {8: 1}, "model.decoder_embed_dim": {512: 64},
        "model.decoder_num_heads": {16: 4},
        "unet.channels": {(128, 256, 256, 256): (16, 32, 64)}, "unet.layers": {2: 1},
        "unet.attn_resolutions": {(16,): (8,)}, "unet.groups": {32: 8}, "unet.dropout": {0.1: 0.0},
        "optim.ema": {0.9999: 0.99},
    }),
}  # fmt: skip


ALL = (*ROWS, *BESIDE)
DEFAULT = "l_dae"
SUMMARIES = {row.name: row.summary for row in ALL}


def row(name: str | int) -> Row:
    """Return the row of this name or number.

    Raises: InputError with the nearest name when there is none.
    """
    rows = {row.name: row for row in ALL} | {str(row.number): row for row in ROWS}
    if str(name) not in rows:
        raise unknown("there is no row", name, SUMMARIES, " (`ldae show` lists all)")
    return rows[str(name)]


def row_of(settings: Config) -> Row | None:
    """Return the row whose settings a run has, sizes aside, or None.

    The settings of a run name the latent scale that ``auto`` stands for, and those of a row may
    have ``auto``.
    """
    from ldae.tokenizers import TOKENIZERS  # imports torch

    sizes = {name for scale in SCALES.values() for name in scale.sizes}
    deciding = {name for row in ALL for name in row.changes} - sizes
    found = flatten(settings)
    auto = TOKENIZERS[settings.tokenizer.name].auto_scale
    if found["tokenizer.scale"] == ("raw" if settings.tokenizer.pretrained else auto):
        found["tokenizer.scale"] = "auto"
    for row in ALL:
        wanted = flatten(config(row.name))
        if all(found[name] == wanted[name] for name in deciding):
            return row
    return None


def at_scale(settings: Any, name: str) -> Any:
    """Return settings of any kind of pre-training, changed to those of a scale.

    Changes of settings that this kind does not have are left out.

    Raises: InputError with the nearest name when there is no such scale.
    """
    if name == "auto":
        raise InputError("the scale auto is chosen on the images of a run, by `ldae pretrain` only")
    if name not in SCALES:
        raise unknown("there is no scale", name, SCALES, f"; the scales are {', '.join(SCALES)}")
    scale, known = SCALES[name], flatten(settings)
    changes = {key: sizes.get(known.get(key), known.get(key)) for key, sizes in scale.sizes.items()}
    changes |= scale.changes
    return put(settings, {key: value for key, value in changes.items() if key in known})


def config(name: str | int = DEFAULT, scale: str = "paper") -> Config:
    """Return the configuration of a row at a scale.

    Raises: InputError for a row or a scale that does not exist.
    """
    last = row(name)
    changes: dict[str, Any] = {}
    for step in ROWS[: row(last.base or name).number]:  # up to the row, or up to its base
        changes |= step.changes
    return at_scale(put(Config(), changes | last.changes | last.recipe), scale)
