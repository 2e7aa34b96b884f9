"""Fit a tokenizer: in one pass over images, or by training it, and report on it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ldae import console, distributed, files, tokenizers, tree
from ldae.backbones.perceptual import (
    PerceptualDistance,
    lpips_is_cached,
    open_lpips,
    open_perceptual,
)
from ldae.console import print_main
from ldae.data.loader import train_batches
from ldae.data.open import open_source
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.errors import InputError
from ldae.method import build_tokenizer
from ldae.models import DENOISERS
from ldae.plots.pictures import save_reconstruction
from ldae.pretraining.pictures import samples
from ldae.pretraining.reconstruction import measure_reconstruction
from ldae.runs import layout
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.environment import environment
from ldae.runs.folder import open_run
from ldae.settings import Config
from ldae.tokenizers import TOKENIZERS, Tokenizer
from ldae.tokenizers.losses import LossWeights, TokenizerLoss
from ldae.train.loop import Plan, plan_run
from ldae.train.run import runs_in_bf16, train_in, transform_of

_FIT_BATCH = 256
_MEASURED_IMAGES = 5_000

# Settings of a pre-training that its tokenizer does not depend on; model.patch_size it does.
_UNREAD = (
    "noise.", "objective.", "optim.", "init_from", "tokenizer.posterior", "tokenizer.path",
    "model.denoiser", "model.name", "model.depth", "model.embed_dim", "model.num_heads",
    "model.cond_ratio", "model.class_conditional", "model.label_dropout",
    *(f"{denoiser}." for denoiser in DENOISERS),
)  # fmt: skip


@dataclass
class Fit:
    """A tokenizer to fit, and what it is fitted with; all that can be refused has been."""

    config: Config
    source: Source
    device: torch.device
    tokenizer: Tokenizer
    stats: tuple[tuple[float, ...], tuple[float, ...]]
    """Mean and standard deviation of the pixels; empty: the data's own."""
    plan: Plan | None
    """Of the training; None where there is none."""

    @cached_property
    def perceptual(self) -> PerceptualDistance | None:
        """Of the loss.

        Raises: InputError when its weights are absent.
        """
        if not (self.plan and self.config.tokenizer.perceptual_weight):
            return None
        net = self.config.tokenizer.perceptual_net
        found = open_perceptual(net, self.config.data.in_chans)
        return found.to(self.device)

    def distances(self) -> list[PerceptualDistance]:
        """To report: that of the loss, and LPIPS where that is not a download."""
        found = [self.perceptual] if self.perceptual else []
        known = [distance.name for distance in found]
        if "LPIPS" not in known and self.config.data.in_chans == 3 and lpips_is_cached():
            found.append(open_lpips().to(self.device))
        return found


def prepare(config: Config, source: Source, device: torch.device, run: Path) -> Fit:
    """Check all that a fit in ``run`` needs; nothing is written.

    Raises: InputError when settings do not fit together, or a perceptual network is absent.
    """
    _check_settings(config)
    tokenizer = build_tokenizer(config)
    plan = None
    if tokenizer.trained and not config.tokenizer.pretrained:
        plan = plan_run(len(source), config.tokenizer.optim, config.system)
    fit = Fit(config, source, device, tokenizer, _pixel_stats(config), plan)
    if plan and not (config.tokenizer.path or (run / layout.TOKENIZER).exists()):
        start = config.tokenizer.adversarial_start
        if config.tokenizer.adversarial_weight and start >= plan.steps:
            raise InputError(
                f"tokenizer.adversarial_start {start} is never reached in the {plan.steps} steps "
                "of tokenizer.optim"
            )
        tokenizer_loss(fit)  # what is absent or does not fit is told now
    if config.tokenizer.path:
        tokenizers.load(tokenizer, Path(config.tokenizer.path))
    return fit


def tokenizer_of_run(fit: Fit, run: Path, row: str) -> Tokenizer:
    """The tokenizer of a pre-training in ``run``: the fitted one there or at tokenizer.path, or a new
    fit. One that is trained is a run of its own in the sub-folder tokenizer."""
    path, given = run / layout.TOKENIZER, fit.config.tokenizer.path
    folder = run / layout.TOKENIZER_RUN if fit.plan else run
    if path.exists() and (given or fit.plan):
        tokenizers.load(fit.tokenizer, path)
        return fit.tokenizer
    if not given:  # which is loaded already
        with open_fit(fit, folder) if fit.plan else nullcontext():
            carry_out(fit, folder, row)
    if distributed.is_main() and not path.exists():
        tokenizers.save(fit.tokenizer, path)
    distributed.barrier()
    return fit.tokenizer


def open_fit(fit: Fit, run: Path) -> AbstractContextManager:
    patch_size = {"model.patch_size": fit.tokenizer.patch_size}
    begun = (run / layout.TOKENIZER).exists()
    config = tree.replace(fit.config, patch_size)
    return open_run(run, "tokenizer", config, fit.source, fit.device, _UNREAD, begun)


def carry_out(fit: Fit, run: Path, row: str) -> None:
    """Fit in an opened folder, or load what was fitted there, and report if that was not done yet."""
    path = run / layout.TOKENIZER
    if path.exists():
        tokenizers.load(fit.tokenizer, path)
        fit.tokenizer.to(fit.device)
    else:
        _train(fit, run, row) if fit.tokenizer.trained else _fit_statistics(fit)
        if distributed.is_main():
            tokenizers.save(fit.tokenizer, path)
    if not (run / layout.RECONSTRUCTION).exists():
        _report(fit, run, row)
    distributed.barrier()
    fit.tokenizer.cpu()


def _fit_statistics(fit: Fit) -> None:
    tokenizer = fit.tokenizer.to(fit.device)
    tokenizer.fit(_first_images(fit), *fit.stats)
    if summary := tokenizer.summary():
        print_main(f"tokenizer: {summary}")


def _train(fit: Fit, run: Path, row: str) -> None:
    """Pixel statistics, training, latent statistics; a published network gets the last alone."""
    tokenizer, config = fit.tokenizer.to(fit.device), fit.config
    if fit.plan:
        mean, std = fit.stats
        if mean:
            tokenizer.set_pixel_stats(torch.tensor(mean), torch.tensor(std))
        elif not Checkpoints(run).paths():  # else they are in there
            tokenizer.fit_pixels(_first_images(fit))
        # Not compiled: the adversary's adaptive weight asks for gradients within the forward pass.
        trained = train_in(
            run,
            tokenizer_loss(fit),
            config,
            config.tokenizer.optim,
            fit.plan,
            fit.source,
            row=f"tokenizer of {row}",
            transform=transform_of(config),
            device=fit.device,
        )
        fit.tokenizer = trained.tokenizer  # the moving average's, where the recipe has one
    fit.tokenizer.fit_latents(_first_images(fit))


def tokenizer_loss(fit: Fit) -> TokenizerLoss:
    """What a trained tokenizer minimises, on its device, seeded by the seed of the configuration.

    Raises: InputError when a network does not fit the images, or its weights are absent.
    """
    config, tokenizer = fit.config, fit.config.tokenizer
    weights = LossWeights(
        tokenizer.kl_weight, tokenizer.perceptual_weight, tokenizer.adversarial_weight
    )
    torch.manual_seed(config.seed)
    return TokenizerLoss(
        fit.tokenizer,
        weights,
        fit.perceptual,
        adversarial_start=config.tokenizer.adversarial_start,
        batch_size=fit.plan.batch_size,
        seed=config.seed,
        bf16=runs_in_bf16(config.system.precision, fit.device),
    ).to(fit.device)


def _report(fit: Fit, run: Path, row: str) -> None:
    config, tokenizer = fit.config, fit.tokenizer
    source = open_source(config.data.eval_source or config.data.source, "eval")
    center = CropTransform(config.data.img_size, config.data.in_chans)
    wanted = min(config.tokenizer.fit_images or _MEASURED_IMAGES, _MEASURED_IMAGES)
    images = Images(fit, source, center, wanted, seed=0, bad_images="skip")
    results = measure_reconstruction(tokenizer, images, fit.distances())
    if not distributed.is_main():
        return
    save_reconstruction(tokenizer, samples(config, fit.device), run / layout.RECONSTRUCTED)
    record = {
        "row": row,
        "tokenizer": tokenizers.describe(tokenizer),
        "data": {"spec": source.spec, "split": source.split},
        "results": results,
        "environment": environment(fit.device),
    }
    files.write_json(run / layout.RECONSTRUCTION, record)
    told = [f"{name} {value:.4g}" for name, value in results.items() if name != "images"]
    where = f"{results['images']:,} images of {source.spec}"
    print_main(f"{config.tokenizer.name}: {', '.join(told)} over {where}")


def _first_images(fit: Fit) -> "Images":
    """Return the images that a fit sees: the first ones in training order."""
    config = fit.config
    wanted = config.tokenizer.fit_images or len(fit.source)
    return Images(
        fit, fit.source, transform_of(config), wanted, config.seed, config.data.bad_images
    )


@dataclass(frozen=True)
class Images:
    """This rank's share of so many images, to a whole number of batches, in a random order.

    Each pass gives the same batches, uint8 (B, C, H, W). A network sees no more images at once than
    it does in training.
    """

    fit: Fit
    source: Source
    transform: CropTransform
    wanted: int
    seed: int
    bad_images: str

    def __iter__(self) -> Iterator[torch.Tensor]:
        plan, world = self.fit.plan, distributed.world_size()
        wanted, share = min(self.wanted, len(self.source)), _FIT_BATCH
        if plan:
            share = plan.batch_size // world // plan.micro_batches
        batch = min(share, max(1, wanted // world)) * world
        stop = max(batch, wanted // batch * batch)
        batches = train_batches(
            self.source,
            self.transform,
            seed=self.seed,
            start=0,
            stop=stop,
            batch_size=batch,
            rank=distributed.rank(),
            world_size=world,
            workers=self.fit.config.system.workers,
            bad_images=self.bad_images,
        )
        with console.progress(stop, "tokenizer") as bar:
            for found in batches:
                yield found.images
                bar.update(batch)


def _check_settings(config: Config) -> None:
    """Raises: InputError for settings that contradict each other."""
    asked, data = config.tokenizer, config.data
    takers = {name: kind.settings() for name, kind in TOKENIZERS.items()}
    tree.check_used(asked, asked.name, takers, "tokenizer.")
    if asked.kl_weight and asked.codes:
        raise InputError(
            "tokenizer.kl_weight needs a Gaussian posterior, which tokenizer.codes replaces"
        )
    if asked.pretrained and (data.mean or data.std or data.stats != "auto"):
        raise InputError(
            "tokenizer.pretrained sees pixels in [-1, 1]: data.mean, data.std and data.stats can not "
            "be set beside it"
        )


def _pixel_stats(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that are given, or empty for the data's own."""
    mean, std, chans = config.data.mean, config.data.std, config.data.in_chans
    if not mean and not std and config.data.stats == "imagenet":
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if mean or std:
        for name, values in (("data.mean", mean), ("data.std", std)):
            if len(values) != chans:
                raise InputError(
                    f"{name} needs one number for each of {chans} channels, not {values}"
                )
    return mean, std
