"""The paper's Table 1 as code: each row is its difference from the row before it."""

import difflib
from dataclasses import dataclass, field
from typing import Any

from ldae.errors import InputError
from ldae.settings import Config, replace


@dataclass(frozen=True)
class Row:
    """One row of the trajectory with its published ImageNet numbers (DiT-L, 400 epochs)."""

    number: int
    name: str
    summary: str
    changes: dict[str, Any] = field(hash=False)
    accuracy: float
    """Linear probing of the encoder half, top-1 in percent."""
    fid: float | None = None
    """FID-50K, where the paper gives one."""


ROWS = (
    Row(1, "dit", "DiT-L on a VQGAN-KL tokenizer, class-conditional", {
        "tokenizer.name": "conv_vae", "tokenizer.dim": 16,
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
    Row(6, "patch_vae", "patch-wise VAE", {"tokenizer.name": "patch_vae"}, 64.9),
    Row(7, "patch_ae", "patch-wise AE", {"tokenizer.name": "patch_ae"}, 64.7),
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

# What a row is run at. Applied after the row, so that a scale fits every row.
SCALES: dict[str, dict[str, Any]] = {
    # ViT-1/2L, 256 x 256, batch 2048, 400 epochs: the defaults of settings.py.
    "paper": {},
    # 32 x 32 images on one device.
    "small": {
        "data.img_size": 32,
        "model.name": "vit_tiny_patch16_224", "model.patch_size": 4, "model.depth": 4,
        "tokenizer.dim": 24,
        "optim.batch_size": 256, "optim.blr": 1e-3, "optim.epochs": 200, "optim.warmup_epochs": 10,
        "system.workers": 2,
    },
    # The demonstration: minutes on two cores.
    "demo": {
        "data.img_size": 32,
        "model.name": "vit_tiny_patch16_224", "model.patch_size": 4, "model.depth": 2,
        "model.embed_dim": 128, "model.num_heads": 4,
        "tokenizer.dim": 8,
        "optim.batch_size": 128, "optim.blr": 2e-3, "optim.epochs": 4, "optim.warmup_epochs": 0.5,
        "system.log_every": 50, "system.workers": 0,
    },
}  # fmt: skip


def row(name: str | int) -> Row:
    """The row of this name or number.

    Raises: InputError with the nearest name when there is none.
    """
    for candidate in ROWS:
        if str(name) in (candidate.name, str(candidate.number)):
            return candidate
    near = difflib.get_close_matches(str(name), [row.name for row in ROWS], n=1, cutoff=0)
    raise InputError(
        f"there is no row {name!r}; the nearest is {near[0]!r} (`ldae show` lists all)"
    )


def config(name: str | int = "l_dae", scale: str = "paper") -> Config:
    """The full configuration of a row at a scale.

    Raises: InputError for a row or a scale that does not exist.
    """
    if scale not in SCALES:
        raise InputError(f"there is no scale {scale!r}; there are {', '.join(SCALES)}")
    last = row(name)
    built = Config()
    for step in ROWS[: last.number]:
        built = replace(built, step.changes)
    return replace(built, SCALES[scale])
