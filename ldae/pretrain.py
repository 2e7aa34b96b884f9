"""The verb that pre-trains: a run folder, a tokenizer, the loop, and pictures of the result."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ldae import distributed, log, plots, settings, tokenizers
from ldae.data.loader import train_batches
from ldae.data.sources import Source, open_source, open_splits
from ldae.data.transforms import CropTransform
from ldae.errors import InputError
from ldae.export import fold, init_from
from ldae.method import LDAE, build
from ldae.settings import Config
from ldae.tokenizers import PatchTokenizer
from ldae.train.checkpoint import Checkpoints
from ldae.train.loop import Hook, Plan, plan, train
from ldae.train.metrics import Metrics
from ldae.train.optim import peak_lr

# ImageNet's, of the RGB channels (torchvision's and timm's constants).
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_FIT_BATCH = 256
_ONLINE_K = 20
_MAY_CHANGE = ("system.", "data.bad_images", "data.eval_source")  # between the parts of a run


def pretrain(config: Config, run: Path, row: str, dry_run: bool = False) -> None:
    """Pre-train the method of ``config`` in the folder ``run``, or go on with what is there.

    The folder gets config.yaml, environment.json, tokenizer.safetensors, metrics.jsonl,
    checkpoints/, filters.png and denoised.png. The same call again resumes; a finished run is left
    as it is. ``row`` names the row of the paper in the records. A dry run prints what would be done
    and touches nothing.

    Raises: InputError for settings or data that do not fit; Interrupted by Ctrl-C or SIGTERM.
    """
    run = Path(run)
    device = distributed.device_for(config.system.device)
    with distributed.process_group(device):
        settings.check(config)
        if not config.data.source:
            raise InputError("no images: say where they are with --data SOURCE")
        source = open_source(config.data.source, "train")
        if config.model.class_conditional and source.labels is None:
            raise InputError(f"model.class_conditional needs labels; {source.spec} has none")
        schedule = plan(len(source), config.optim, config.system)
        bf16 = runs_in_bf16(config.system.precision, device)
        method = build(config, num_classes=len(source.classes or ()), bf16=bf16)
        # All that can be refused is refused before anything is written.
        stats, hooks = _pixel_stats(config), _hooks(config, method, schedule, device)
        for name, path in (
            ("tokenizer.path", config.tokenizer.path),
            ("init_from", config.init_from),
        ):
            if path and not Path(path).exists():
                raise InputError(f"{name}: there is no {path}")
        if dry_run:
            print(_describe(config, method, schedule, source, device))
            return
        _open_run(run, config, device)
        _fit_tokenizer(method.tokenizer, run, config, source, stats, device)
        if config.init_from:
            init_from(method, config.init_from)
        method.to(device)
        # In bf16 on CPUs, the backward of torch's fused attention is slower than plain products:
        # by a quarter of the whole step at 64 tokens (benchmarks/results/step.json).
        method.denoiser.fuse_attention(not (bf16 and device.type == "cpu"))

        def batches_from(start: int) -> Iterator:
            return train_batches(
                source,
                transform_of(config),
                seed=config.seed,
                start=start,
                stop=schedule.total,
                batch_size=schedule.batch_size,
                micro_batches=schedule.micro_batches,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                workers=config.system.workers,
                bad_images=config.data.bad_images,
                pin_memory=device.type == "cuda",
            )

        def open_metrics(seen: int) -> Metrics:
            _say(
                f"{run}: {row}, {schedule.total:,} images in {schedule.steps:,} steps, from {seen:,}"
            )
            return Metrics(run, seen, config.system.tensorboard, config.system.wandb)

        trained = train(
            method,
            batches_from,
            schedule,
            config.optim,
            config.system,
            device=device,
            checkpoints=Checkpoints(run, config.system.keep),
            open_metrics=open_metrics,
            describe={"row": row, "images": len(source), "classes": list(source.classes or ())},
            compiled=compiles(config.system.compile, device),
            hooks=hooks,
        )
        if distributed.is_main():
            with log.told(run):
                plots.save_filters(trained.tokenizer, run / "filters.png")
                plots.save_denoising(trained.eval(), _samples(config, device), run / "denoised.png")
            print(f"{run}: done; pictures in denoised.png and filters.png")


def _say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


def transform_of(config: Config) -> CropTransform:
    data = config.data
    return CropTransform(data.img_size, data.in_chans, data.crop, data.flip)


def runs_in_bf16(precision: str, device: torch.device) -> bool:
    """Whether the network runs in bfloat16; ``auto`` asks whether the device has it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))


def compiles(mode: str, device: torch.device) -> bool:
    return device.type == "cuda" if mode == "auto" else mode == "on"


def _describe(
    config: Config, method: LDAE, schedule: Plan, source: Source, device: torch.device
) -> str:
    count = sum(p.numel() for p in method.denoiser.parameters())
    encoder = sum(p.numel() for p in method.denoiser.encoder.parameters())
    tokens = len(method.denoiser.pos_embed)
    return (
        f"{settings.to_yaml(config)}\n"
        f"parameters        {count:,} ({encoder:,} in the encoder's blocks)\n"
        f"tokens per image  {tokens}, each of {method.denoiser.embed.in_features} numbers\n"
        f"images            {len(source):,} in {source.spec}\n"
        f"steps             {schedule.steps:,} of {schedule.batch_size} images, "
        f"{schedule.total:,} images seen\n"
        f"learning rate     {peak_lr(config.optim):.3g} at its peak\n"
        f"computed in       {'bfloat16' if method.bf16 else 'float32'} on {device}"
    )


def _open_run(run: Path, config: Config, device: torch.device) -> None:
    """Make the run folder, or check that it is this run's.

    Until there is a checkpoint there is nothing to lose, and other settings begin anew.

    Raises: InputError when it holds a run of other settings, naming them.
    """
    record = run / "config.yaml"
    begun = bool(Checkpoints(run).paths())
    changed = settings.difference(settings.load(record), config) if record.exists() else {}
    changed = {name: pair for name, pair in changed.items() if not name.startswith(_MAY_CHANGE)}
    if begun and changed:
        told = ", ".join(
            f"{name} is {old!r} there, {new!r} here" for name, (old, new) in changed.items()
        )
        raise InputError(f"run folder {run} holds another run: {told}; name another --run")
    if not record.exists() and run.is_dir() and any(run.iterdir()):
        raise InputError(f"run folder {run} is not empty and holds no run")
    distributed.barrier()  # every rank has looked before one of them writes
    if distributed.is_main():
        if changed:
            (run / "tokenizer.safetensors").unlink(missing_ok=True)
        log.write(record, settings.to_yaml(config).encode())
        environment = log.environment(device) | {"ranks": distributed.world_size()}
        log.write_json(run / "environment.json", environment)
    distributed.barrier()


def _fit_tokenizer(
    tokenizer: PatchTokenizer,
    run: Path,
    config: Config,
    source: Source,
    stats: tuple[tuple[float, ...], tuple[float, ...]],
    device: torch.device,
) -> None:
    """Load the run's tokenizer or the one that is given, or fit one on the run's first images."""
    path = run / "tokenizer.safetensors"
    if path.exists() or config.tokenizer.path:
        tokenizers.load(tokenizer, path if path.exists() else Path(config.tokenizer.path))
    else:
        world = distributed.world_size()
        wanted = min(config.tokenizer.fit_images or len(source), len(source))
        batch = min(_FIT_BATCH, max(1, wanted // world)) * world
        stop = max(batch, wanted // batch * batch)
        _say(f"fitting the tokenizer on {stop:,} images")
        batches = train_batches(
            source,
            transform_of(config),
            seed=config.seed,
            start=0,
            stop=stop,
            batch_size=batch,
            rank=distributed.rank(),
            world_size=world,
            workers=config.system.workers,
            bad_images=config.data.bad_images,
        )

        def images() -> Iterator[torch.Tensor]:
            with log.progress(stop, "tokenizer") as bar:
                for found in batches:
                    yield found.images
                    bar.update(batch)

        tokenizer.to(device)
        tokenizer.fit(images(), *stats)
        tokenizer.cpu()
        kept = tokenizer.variances[: tokenizer.dim].sum() / tokenizer.variances.sum()
        _say(
            f"tokenizer: {tokenizer.dim} of {tokenizer.patch_dim} axes keep {kept:.1%} of the variance"
        )
    if distributed.is_main() and not path.exists():
        tokenizers.save(tokenizer, path)
    distributed.barrier()


def _pixel_stats(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that are given, or empty for the data's own."""
    mean, std, chans = config.data.mean, config.data.std, config.data.in_chans
    if not mean and not std and config.data.stats == "imagenet":
        mean, std = _IMAGENET["mean"], _IMAGENET["std"]
    if mean or std:
        for name, values in (("data.mean", mean), ("data.std", std)):
            if len(values) != chans:
                raise InputError(
                    f"{name} needs one number for each of {chans} channels, not {values}"
                )
    return mean, std


def _hooks(config: Config, method: LDAE, schedule: Plan, device: torch.device) -> tuple[Hook, ...]:
    if not config.system.knn_every:
        return ()
    from ldae.evals.features import extract, known_labels
    from ldae.evals.knn import KNNProtocol, check_enough, knn_accuracy

    splits = open_splits(config.data.source, config.data.eval_source or None)
    for split in splits:
        known_labels(split)
    check_enough(_ONLINE_K, len(splits[0]))

    def online_knn() -> dict[str, float]:
        backbone = fold(method).to(device)
        train_set, test_set = (
            extract(backbone, split, device=device, workers=config.system.workers)
            for split in splits
        )
        return knn_accuracy(train_set, test_set, KNNProtocol(k=(_ONLINE_K,)), device)

    return (Hook(config.system.knn_every * schedule.epoch, online_knn),)


def _samples(config: Config, device: torch.device, count: int = 12) -> torch.Tensor:
    """A few images for the pictures, of the evaluation split where there is one."""
    source = open_source(config.data.source, "eval")
    center = CropTransform(config.data.img_size, config.data.in_chans)
    count = min(count, len(source))
    batches = train_batches(
        source, center, seed=0, start=0, stop=count, batch_size=count, bad_images="skip"
    )
    return next(batches).images.to(device)
