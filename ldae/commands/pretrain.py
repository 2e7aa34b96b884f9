"""``ldae pretrain``: pre-train a row of the paper."""

from pathlib import Path

import torch

from ldae import distributed, tree
from ldae.backbones.fold import init_from, open_exported
from ldae.console import describe
from ldae.data.cached import copy_latents
from ldae.data.open import open_source
from ldae.data.source import Source
from ldae.errors import InputError
from ldae.method import LDAE, build
from ldae.plots.pictures import save_denoising, save_filters
from ldae.precision import runs_in_bf16
from ldae.pretraining.latents import open_latents
from ldae.pretraining.online_knn import online_knn
from ldae.pretraining.tokenizer import prepare, sample_images, tokenizer_of_run
from ldae.runs import layout
from ldae.runs.folder import open_run
from ldae.settings import Config
from ldae.tokenizers import PatchTokenizer
from ldae.train.plan import Plan, plan_run
from ldae.train.run import (
    check_warmup,
    compiles,
    describe_training,
    fuses_attention,
    train_in,
    transform_of,
)


def pretrain(config: Config, run: Path, row: str, dry_run: bool = False) -> None:
    """Pre-train the method of ``config`` in the folder ``run``, or resume the run there.

    The folder gets config.yaml, environment.json, tokenizer.safetensors with reconstruction.json
    and reconstructed.png, metrics.jsonl, checkpoints/, denoised.png and, for a patch-wise
    tokenizer, filters.png. A tokenizer that is trained has a run of its own, in the sub-folder
    tokenizer. A finished run stays as it is. A dry run prints the settings and the plan, and writes
    nothing. ``row`` is the name of the row in the records.

    Raises: InputError for wrong settings or data; Interrupted after a stop signal.
    """
    run = Path(run)
    device = distributed.device_for(config.system.device)
    with distributed.process_group(device, config.system.rank_timeout):
        tree.check(config)
        check_warmup(run, config.optim)
        source = open_source(config.data.source, "train")
        if config.model.class_conditional and source.labels is None:
            raise InputError(f"model.class_conditional needs labels; {source.spec} has none")
        plan = plan_run(len(source), config.optim, config.system, device)
        bf16 = runs_in_bf16(config.system.precision, device)
        method = build(config, num_classes=len(source.classes or ()), bf16=bf16)
        # Everything is checked before anything is written.
        hooks = online_knn(config, plan, device)
        fit = prepare(config, source, device, run)
        config = fit.config
        transform = transform_of(config)
        if config.data.latents:
            source, transform = open_latents(config, fit.tokenizer, source), copy_latents
        exported = open_exported(config.init_from, method) if config.init_from else None
        if dry_run:
            print(describe(config, _facts(config, method, plan, source, device)))
            return
        with open_run(run, "pretraining", config, source, device):
            method.tokenizer.load_state_dict(tokenizer_of_run(fit, run, row).state_dict())
            if exported:
                init_from(method, exported)
            method.to(device)
            method.denoiser.fuse_attention(fuses_attention(bf16, device))

            trained = train_in(
                run,
                method,
                config,
                config.optim,
                plan,
                source,
                row=row,
                transform=transform,
                device=device,
                compiled=compiles(config.system.compile, device),
                hooks=hooks,
            )
            if distributed.is_main():
                pictures = [layout.DENOISED]
                images = sample_images(config, device)
                save_denoising(trained.eval(), images, run / pictures[0])
                if isinstance(trained.tokenizer, PatchTokenizer):
                    pictures.append(layout.FILTERS)
                    save_filters(trained.tokenizer, run / pictures[1])
                print(f"{run}: done; pictures in {' and '.join(pictures)}")


def _facts(
    config: Config, method: LDAE, plan: Plan, source: Source, device: torch.device
) -> dict[str, str]:
    denoiser = method.denoiser
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    return {
        "parameters": f"{count:,} ({denoiser.encoder_size:,} in the encoder)",
        "tokens per image": f"{denoiser.side**2}, each of {denoiser.in_dim} numbers",
        "images": f"{len(source):,} in {source.spec}",
    } | describe_training(plan, config.optim, method.bf16, device)
