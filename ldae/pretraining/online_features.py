"""Watch a pre-training without labels, by its features and reconstructions of the same images."""

import functools
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ldae import distributed
from ldae.backbones.preprocessing import preprocessing
from ldae.console import print_main
from ldae.data.loader import train_batches
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.evals.rankme import rankme, spread
from ldae.precision import bf16_autocast
from ldae.pretraining.reconstruction import psnr_of
from ldae.runs.kinds import Opening
from ldae.runs.metrics import read_records
from ldae.runs.symptoms import LEVELS, RANKME, SPREAD, new_symptoms, psnr_key
from ldae.train.loop import Hook
from ldae.train.plan import Plan

_IMAGES = 256  # whose features are measured
_RECONSTRUCTED = 32  # of these images
_AT_ONCE = 8  # images, since the weights and the optimizer fill most of a GPU's memory
_LEAST_IMAGES = 4096  # between two measurements, which then cost about 1 % of the training


def watch(
    config: Any, plan: Plan, run: Path, device: torch.device, source: Source, opening: Opening
) -> tuple[Hook, ...]:
    """Return the hook of ``system.watch_every``, unless it is 0.

    Its values are RankMe and the spread of the features of the first images in training order,
    center crops, and the PSNR of the reconstructions of some of them at three noise levels. They
    are computed from the weights in training, not from their average, and by rank 0 alone. After
    each measurement, the symptoms that are new are printed.
    """
    every = config.system.watch_every
    if every == "auto":
        every = max(plan.epoch // 4, _LEAST_IMAGES)
    if not every:
        return ()

    @functools.cache
    def images() -> torch.Tensor:
        count = min(_IMAGES, len(source))
        crop = CropTransform(config.data.img_size, config.data.in_chans)
        batches = train_batches(
            source,
            crop,
            seed=config.seed,
            start=0,
            stop=count,
            batch_size=count,
            workers=config.system.workers,
            bad_images="skip",
        )
        with closing(batches):
            return next(batches).images

    def call(method: Any) -> dict[str, float]:
        if not distributed.is_main():
            return {}
        try:
            return measure(method, opening, images(), device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            print_main(
                f"{device} has too little memory left to measure the features; a smaller "
                "system.device_batch leaves more, and system.watch_every 0 measures nothing"
            )
            return {}

    def judge() -> list[str]:
        return new_symptoms(read_records(run), bool(getattr(config, "init_from", "")))

    return (Hook(every, call, weights="trained", judge=judge),)


@torch.no_grad()
def measure(
    method: Any, opening: Opening, images: torch.Tensor, device: torch.device
) -> dict[str, float]:
    """Return RankMe, the spread and the PSNR at each level, of uint8 images (n, C, H, W).

    The method is left in evaluation mode. No random number of the training is drawn.
    """
    # A compiled network would be compiled again for these batches.
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        method.eval()
        backbone = opening.backbone(method, False).to(device).eval()
        normalize = preprocessing(backbone).normalize
        features = []
        for batch in images.split(_AT_ONCE):
            with bf16_autocast(device, method.bf16):
                features.append(backbone(normalize(batch.to(device))).float().cpu())
        values = {RANKME: rankme(torch.cat(features)), SPREAD: spread(torch.cat(features))}
        if opening.reconstruct:
            batches = images[:_RECONSTRUCTED].to(device).split(_AT_ONCE)
            positions = torch.arange(len(images), device=device).split(_AT_ONCE)
            for level in LEVELS:
                errors = []
                for batch, numbers in zip(batches, positions):
                    shown, clean = opening.reconstruct(method, batch, numbers, level / 100)
                    errors.append((shown - clean).square().flatten(1).mean(1))
                values[psnr_key(level)] = psnr_of(torch.cat(errors).double().mean()).item()
        return values
