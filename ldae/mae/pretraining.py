"""Pre-training of an MAE."""

from dataclasses import replace
from pathlib import Path

import torch

from ldae import distributed
from ldae.console import describe
from ldae.mae.network import MAE, build
from ldae.mae.settings import MAEConfig
from ldae.mae.start import open_start, start_from
from ldae.plots.pictures import save_grid
from ldae.pretraining.images import evaluation_images, sample_images
from ldae.pretraining.training import Pretraining, prepare_pretraining
from ldae.runs import layout


def pretrain(config: MAEConfig, run: Path, row: str, dry_run: bool = False) -> None:
    """Pre-train an MAE in the folder ``run``, or resume the run there.

    Beside the files of every pre-training, the folder gets reconstructed.png: masked images,
    reconstructed ones and the originals.

    Raises: InputError for wrong settings or data; Interrupted after a stop signal.
    """
    with prepare_pretraining("mae", config, run, row) as training:
        # Everything is checked before anything is written.
        config, start = open_start(config, run)
        training = replace(training, config=config)
        mae = build(config, bf16=training.bf16)
        if start:
            start_from(mae, start)
        hooks = training.hooks()
        evaluation_images(config.data)  # of the pictures at the end
        if dry_run:
            print(describe(config, _facts(training, mae)))
            return
        with training.open_run():
            if not start:
                training.set_pixel_stats(mae.pixels)
            trained = training.train(mae, hooks)
            if distributed.is_main():
                images = sample_images(config.data, training.device)
                positions = torch.arange(len(images), device=training.device)
                save_grid(list(trained.reconstruct(images, positions)), run / layout.RECONSTRUCTED)
                print(f"{run}: done; pictures in {layout.RECONSTRUCTED}")


def _facts(training: Pretraining, mae: MAE) -> dict[str, str]:
    encoder, whole = (sum(p.numel() for p in part.parameters()) for part in (mae.encoder, mae))
    return training.facts(
        f"{whole:,} ({encoder:,} in the encoder)",
        f"{mae.num_tokens}, of which the encoder sees {mae.num_visible}",
    )
