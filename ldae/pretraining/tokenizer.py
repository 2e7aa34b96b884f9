"""Fitting of a tokenizer, in one pass over images or by training, and its reconstruction report."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from ldae import distributed, files, tokenizers, tree
from ldae.console import print_main
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.errors import InputError
from ldae.method import build_tokenizer
from ldae.models import DENOISERS
from ldae.plots.pictures import save_reconstruction
from ldae.precision import runs_in_bf16
from ldae.pretraining.images import (
    FIT_BATCH,
    FitImages,
    evaluation_images,
    pixel_stats,
    sample_images,
)
from ldae.pretraining.perceptual import (
    PerceptualDistance,
    lpips_is_cached,
    open_lpips,
    open_perceptual,
)
from ldae.pretraining.reconstruction import measure_reconstruction
from ldae.runs import layout
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.environment import environment
from ldae.runs.folder import open_run
from ldae.runs.skipped import record_skipped
from ldae.settings import Config
from ldae.tokenizers import TOKENIZERS, Tokenizer
from ldae.tokenizers.losses import TokenizerLoss
from ldae.train.plan import Plan, plan_run
from ldae.train.run import check_warmup, train_in, transform_of

_UNKNOWN_BATCH = 32  # images at a time, where the training searches for the size of micro batches
_MEASURED_IMAGES = 5_000  # at most, for the reconstruction

# Settings of a pre-training that its tokenizer does not depend on. It depends on model.patch_size.
_IGNORED = (
    "noise.", "objective.", "masking.", "features.", "optim.", "init_from",
    "tokenizer.posterior", "tokenizer.path",
    "model.denoiser", "model.name", "model.depth", "model.embed_dim", "model.num_heads",
    "model.decoder_depth", "model.decoder_embed_dim", "model.decoder_num_heads",
    "model.mlp_ratio", "model.vit.", "model.cond_ratio", "model.class_conditional",
    "model.label_dropout",
    *(f"{denoiser}." for denoiser in DENOISERS),
)  # fmt: skip


@dataclass
class Fit:
    """A tokenizer and everything it is fitted with, after all checks."""

    config: Config
    source: Source
    evaluation: Source
    """Images by which the reconstruction is measured."""
    device: torch.device
    tokenizer: Tokenizer
    stats: tuple[tuple[float, ...], tuple[float, ...]]
    """Mean and standard deviation of the pixels; empty to measure them."""
    plan: Plan | None
    """The plan of the training; None for a fit in one pass, a given file and published weights."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Images that this rank could not decode and skipped: name -> reason."""

    @cached_property
    def perceptual(self) -> PerceptualDistance | None:
        """The perceptual distance in the loss.

        Raises: InputError when its weights are missing.
        """
        config = self.config
        if not (self.plan and config.tokenizer.perceptual_weight):
            return None
        distance = open_perceptual(config.tokenizer.perceptual_net, config.data.in_chans)
        return distance.to(self.device)

    def distances(self) -> list[PerceptualDistance]:
        """Return the distances to report: the loss's, and LPIPS if its weights are downloaded."""
        distances = [self.perceptual] if self.perceptual else []
        names = [distance.name for distance in distances]
        if "LPIPS" not in names and self.config.data.in_chans == 3 and lpips_is_cached():
            distances.append(open_lpips().to(self.device))
        return distances


def prepare(config: Config, source: Source, device: torch.device, run: Path) -> Fit:
    """Check everything that a fit in ``run`` needs; nothing is written.

    The settings of the returned fit name the latent scale instead of ``auto``.

    Raises: InputError when settings contradict each other, or a perceptual network is missing.
    """
    _check_settings(config)
    tokenizer = build_tokenizer(config)
    config = tree.replace(config, {"tokenizer.scale": tokenizer.scale})
    plan = None
    if tokenizer.trained and not (config.tokenizer.path or config.tokenizer.pretrained):
        plan = plan_run(len(source), config.tokenizer.optim, config.system, device)
    evaluation = evaluation_images(config.data)
    fit = Fit(config, source, evaluation, device, tokenizer, pixel_stats(config.data), plan)
    if plan and not (run / layout.TOKENIZER).exists():
        inner = run / layout.TOKENIZER_RUN  # the tokenizer's own run in a pre-training
        check_warmup(inner if inner.exists() else run, config.tokenizer.optim, "tokenizer.optim")
        start = config.tokenizer.adversarial_start
        if config.tokenizer.adversarial_weight and start >= plan.steps:
            raise InputError(
                f"tokenizer.adversarial_start {start} is never reached in the {plan.steps} steps "
                "of tokenizer.optim"
            )
        tokenizer_loss(fit)  # refuses a network that is missing or does not fit
    if config.tokenizer.path:
        own = run / layout.TOKENIZER
        resumes = own.exists() and Checkpoints(run).paths()
        tokenizers.load(tokenizer, own if resumes else Path(config.tokenizer.path).expanduser())
    return fit


def tokenizer_of_run(fit: Fit, run: Path, row: str) -> Tokenizer:
    """Return the tokenizer of the pre-training in ``run``, fitted first if there is none yet.

    A tokenizer that is trained has a run of its own, in the sub-folder tokenizer; ``run`` gets a
    copy, as it does of a given file.
    """
    if not (fit.plan or fit.config.tokenizer.path):
        fit_or_load(fit, run, row)
        return fit.tokenizer
    path = run / layout.TOKENIZER
    if distributed.gather_values(path.exists())[0]:  # on rank 0, before it writes the file
        tokenizers.load(fit.tokenizer, path)
        return fit.tokenizer
    if fit.plan:  # else prepare() has loaded the given file
        inner = run / layout.TOKENIZER_RUN
        with open_fit(fit, inner):
            fit_or_load(fit, inner, row)
    if distributed.is_main():
        tokenizers.save(fit.tokenizer, path)
    distributed.barrier()
    return fit.tokenizer


def open_fit(fit: Fit, run: Path) -> AbstractContextManager:
    """Open the run folder of a tokenizer, see ``open_run``."""
    config = tree.replace(fit.config, {"model.patch_size": fit.tokenizer.patch_size})
    fixed = (run / layout.TOKENIZER).exists()
    return open_run(run, "tokenizer", config, fit.source, fit.device, _IGNORED, fixed)


def fit_or_load(fit: Fit, run: Path, row: str) -> None:
    """Fit the tokenizer in an opened folder or load it from there, and write missing reports."""
    path = run / layout.TOKENIZER
    if path.exists():
        tokenizers.load(fit.tokenizer, path)
        fit.tokenizer.to(fit.device)
    else:
        if fit.tokenizer.trained:
            _train(fit, run, row)
        else:
            _fit_in_one_pass(fit)
        record_skipped(run, fit.skipped)
        if distributed.is_main():
            tokenizers.save(fit.tokenizer, path)
    if not (run / layout.RECONSTRUCTION).exists():
        _report(fit, run, row)
        record_skipped(run, fit.skipped)
    distributed.barrier()
    fit.tokenizer.cpu()


def _fit_in_one_pass(fit: Fit) -> None:
    tokenizer = fit.tokenizer.to(fit.device)
    tokenizer.fit(_first_images(fit), *fit.stats)
    if summary := tokenizer.summary():
        print_main(f"tokenizer: {summary}")


def _train(fit: Fit, run: Path, row: str) -> None:
    """Fit pixel statistics, train, and fit latent statistics.

    Published weights need the latent statistics only.
    """
    tokenizer, config = fit.tokenizer.to(fit.device), fit.config
    if fit.plan:
        mean, std = fit.stats
        if mean:
            tokenizer.set_pixel_stats(torch.tensor(mean), torch.tensor(std))
        elif not Checkpoints(run).paths():  # a checkpoint has them
            tokenizer.fit_pixels(_first_images(fit))
        # Not compiled, since the adversary's adaptive weight takes gradients in the forward pass.
        trained = train_in(
            run,
            tokenizer_loss(fit),
            tree.replace(config, {"system.compile": "off"}),
            config.tokenizer.optim,
            fit.plan,
            fit.source,
            row=f"tokenizer of {row}",
            transform=transform_of(config),
            device=fit.device,
        )
        fit.tokenizer = trained.tokenizer  # or its moving average, where the recipe has one
    fit.tokenizer.fit_latents(_first_images(fit))


def tokenizer_loss(fit: Fit) -> TokenizerLoss:
    """Return the loss of a tokenizer that is trained, on its device, seeded by the configuration.

    Raises: InputError when a network does not fit the images, or its weights are missing.
    """
    config, tokenizer = fit.config, fit.config.tokenizer
    torch.manual_seed(config.seed)
    return TokenizerLoss(
        fit.tokenizer,
        fit.perceptual,
        kl_weight=tokenizer.kl_weight,
        perceptual_weight=tokenizer.perceptual_weight,
        adversarial_weight=tokenizer.adversarial_weight,
        adversarial_start=tokenizer.adversarial_start,
        batch_size=fit.plan.batch_size,
        seed=config.seed,
        bf16=runs_in_bf16(config.system.precision, fit.device),
    ).to(fit.device)


def _report(fit: Fit, run: Path, row: str) -> None:
    """Measure the reconstruction; write reconstructed.png and reconstruction.json, print a line."""
    config, tokenizer, source = fit.config, fit.tokenizer, fit.evaluation
    center = CropTransform(config.data.img_size, config.data.in_chans)
    count = min(config.tokenizer.fit_images or _MEASURED_IMAGES, _MEASURED_IMAGES)
    images = _fit_images(fit, source, center, count, seed=0)
    results = measure_reconstruction(tokenizer, images, fit.distances())
    if not distributed.is_main():
        return
    save_reconstruction(
        tokenizer, sample_images(config.data, fit.device), run / layout.RECONSTRUCTED
    )
    record = {
        "row": row,
        "tokenizer": tokenizers.describe(tokenizer),
        "data": {
            "spec": source.spec,
            "split": source.split,
            "resized_twice": source.resizes_twice(center),
        },
        "results": results,
        "environment": environment(fit.device),
    }
    files.write_json(run / layout.RECONSTRUCTION, record)
    numbers = ", ".join(
        f"{name} {value:.4g}" for name, value in results.items() if name != "images"
    )
    where = f"{results['images']:,} images of {source.spec}"
    print_main(f"{config.tokenizer.name}: {numbers} over {where}")


def _first_images(fit: Fit) -> FitImages:
    """Return the images of a fit: the first ones in training order."""
    config = fit.config
    count = config.tokenizer.fit_images or len(fit.source)
    return _fit_images(fit, fit.source, transform_of(config), count, config.seed)


def _fit_images(
    fit: Fit, source: Source, transform: CropTransform, count: int, seed: int
) -> FitImages:
    """Return images for a fit or its report, in batches that the memory of the device can take.

    A batch is no larger than in training, and small where the training searches for its size.
    """
    config, plan, at_once = fit.config, fit.plan, FIT_BATCH
    if plan:
        at_once = min(plan.micro_batch, _UNKNOWN_BATCH if plan.searched else plan.micro_batch)
    return FitImages(
        source,
        transform,
        count,
        seed,
        at_once,
        config.system.workers,
        config.data.bad_images,
        fit.skipped,
    )


def _check_settings(config: Config) -> None:
    """Check the settings of a fit. Raises: InputError when they contradict each other."""
    settings, data = config.tokenizer, config.data
    takers = {name: kind.settings() for name, kind in TOKENIZERS.items()}
    tree.check_used(settings, settings.name, takers, "tokenizer.")
    if settings.kl_weight and settings.codes:
        raise InputError(
            "tokenizer.kl_weight needs a Gaussian posterior, which tokenizer.codes replaces"
        )
    if settings.pretrained and (data.mean or data.std or data.stats != "auto"):
        raise InputError(
            "tokenizer.pretrained takes pixels in [-1, 1]: data.mean, data.std and data.stats "
            "cannot be set beside it"
        )
