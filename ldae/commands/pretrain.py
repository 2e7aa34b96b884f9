"""``ldae pretrain``: a run folder, a tokenizer, the loop, and pictures of the result."""

from pathlib import Path

import torch

from ldae import distributed, tree
from ldae.backbones.fold import init_from, open_exported
from ldae.console import describe
from ldae.data.open import open_source
from ldae.data.source import Source
from ldae.errors import InputError
from ldae.method import LDAE, build
from ldae.plots.pictures import save_denoising, save_filters
from ldae.pretraining.online_knn import online_knn
from ldae.pretraining.pictures import samples
from ldae.pretraining.tokenizer import prepare, tokenizer_of_run
from ldae.runs import layout
from ldae.runs.folder import open_run
from ldae.settings import Config
from ldae.tokenizers import PatchTokenizer
from ldae.train.loop import Plan, plan_run
from ldae.train.optim import peak_lr
from ldae.train.run import compiles, runs_in_bf16, train_in, transform_of


def pretrain(config: Config, run: Path, row: str, dry_run: bool = False) -> None:
    """Pre-train the method of ``config`` in the folder ``run``, or go on with what is there.

    The folder gets config.yaml, environment.json, tokenizer.safetensors, metrics.jsonl,
    checkpoints/, denoised.png and, of a patch-wise tokenizer, filters.png; beside the tokenizer its
    reconstruction.json and reconstructed.png. A tokenizer that gradients train is a run of its own,
    which comes first, in the sub-folder tokenizer. The same call again resumes; a finished run is
    left as it is. ``row`` names the row of the paper in the records. A dry run prints what would be
    done and touches nothing.

    Raises: InputError for settings or data that do not fit; Interrupted by Ctrl-C or SIGTERM.
    """
    run = Path(run)
    device = distributed.device_for(config.system.device)
    with distributed.process_group(device, config.system.rank_timeout):
        tree.check(config)
        if not config.data.source:
            raise InputError("no images: say where they are with --data SOURCE")
        source = open_source(config.data.source, "train")
        if config.model.class_conditional and source.labels is None:
            raise InputError(f"model.class_conditional needs labels; {source.spec} has none")
        plan = plan_run(len(source), config.optim, config.system)
        bf16 = runs_in_bf16(config.system.precision, device)
        method = build(config, num_classes=len(source.classes or ()), bf16=bf16)
        # All that can be refused is refused before anything is written.
        hooks = online_knn(config, plan, device)
        fit = prepare(config, source, device, run)
        path = config.tokenizer.path
        if path and not Path(path).exists():
            raise InputError(f"tokenizer.path: there is no {path}")
        exported = open_exported(config.init_from, method) if config.init_from else None
        if dry_run:
            print(describe(config, _facts(config, method, plan, source, device)))
            return
        with open_run(run, "pretraining", config, source, device):
            method.tokenizer.load_state_dict(tokenizer_of_run(fit, run, row).state_dict())
            if exported:
                init_from(method, exported)
            method.to(device)
            # In bf16 on CPUs, the backward of torch's fused attention is slower than plain products:
            # by a quarter of the whole step at 64 tokens (benchmarks/results/step.json).
            method.denoiser.fuse_attention(not (bf16 and device.type == "cpu"))

            trained = train_in(
                run,
                method,
                config,
                config.optim,
                plan,
                source,
                row=row,
                transform=transform_of(config),
                device=device,
                compiled=compiles(config.system.compile, device),
                hooks=hooks,
            )
            if distributed.is_main():
                pictures = [layout.DENOISED]
                save_denoising(trained.eval(), samples(config, device), run / pictures[0])
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
        "steps": f"{plan.steps:,} of {plan.batch_size} images, {plan.total:,} images seen",
        "learning rate": f"{peak_lr(config.optim):.3g} at its peak",
        "computed in": f"{'bfloat16' if method.bf16 else 'float32'} on {device}",
    }
