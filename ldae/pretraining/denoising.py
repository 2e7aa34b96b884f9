"""Pre-training by denoising: the rows of the paper."""

from dataclasses import replace
from pathlib import Path

from ldae import distributed
from ldae.backbones.fold import TOLERANCE, init_from
from ldae.console import describe, print_main
from ldae.data.cached import copy_latents
from ldae.errors import InputError
from ldae.method import LDAE, build
from ldae.plots.pictures import save_denoising, save_filters
from ldae.pretraining.images import sample_images
from ldae.pretraining.latents import open_latents
from ldae.pretraining.start import open_start
from ldae.pretraining.tokenizer import prepare, tokenizer_of_run
from ldae.pretraining.training import Pretraining, prepare_pretraining
from ldae.runs import layout
from ldae.settings import Config
from ldae.tokenizers import PatchTokenizer


def pretrain(config: Config, run: Path, row: str, dry_run: bool = False) -> None:
    """Pre-train a row of the paper in the folder ``run``, or resume the run there.

    Beside the files of every pre-training, the folder gets tokenizer.safetensors with
    reconstruction.json and reconstructed.png, denoised.png and, for a patch-wise tokenizer,
    filters.png. A tokenizer that is trained has a run of its own, in the sub-folder tokenizer.

    Raises: InputError for wrong settings or data; Interrupted after a stop signal.
    """
    with prepare_pretraining("pretraining", config, run, row) as training:
        source, device = training.source, training.device
        if config.model.class_conditional and source.labels is None:
            raise InputError(f"model.class_conditional needs labels; {source.spec} has none")
        config, start = open_start(config, run)
        training = replace(training, config=config)
        method = build(config, num_classes=len(source.classes or ()), bf16=training.bf16)
        # Everything is checked before anything is written.
        hooks = training.hooks()
        fit = prepare(config, source, device, run)
        training, transform = replace(training, config=fit.config), None
        if config.data.latents:
            latents, transform = open_latents(fit.config, fit.tokenizer, source), copy_latents
            training = replace(training, source=latents)
        if dry_run:
            print(describe(fit.config, _facts(training, method)))
            return
        with training.open_run():
            method.tokenizer.load_state_dict(tokenizer_of_run(fit, run, row).state_dict())
            if start:
                dropped = init_from(method, start)
                if dropped > TOLERANCE:
                    print_main(
                        f"init_from {config.init_from}: the tokenizer drops {100 * dropped:.2g} % "
                        "of the patch embedding"
                    )
            trained = training.train(
                method, hooks, transform, learns_labels=config.model.class_conditional
            )
            if distributed.is_main():
                pictures = [layout.DENOISED]
                save_denoising(trained, sample_images(config.data, device), run / pictures[0])
                if isinstance(trained.tokenizer, PatchTokenizer):
                    pictures.append(layout.FILTERS)
                    save_filters(trained.tokenizer, run / pictures[1])
                print(f"{run}: done; pictures in {' and '.join(pictures)}")


def _facts(training: Pretraining, method: LDAE) -> dict[str, str]:
    denoiser = method.denoiser
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    return training.facts(
        f"{count:,} ({denoiser.encoder_size:,} in the encoder)",
        f"{denoiser.side**2}, each of {denoiser.in_dim} numbers",
    )
