"""What every training run shares: the run folder, and the loop over its data."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ldae import distributed, log, tree
from ldae.data.loader import Batch, Transform, train_batches
from ldae.data.sources import Source, open_source
from ldae.data.transforms import CropTransform
from ldae.errors import InputError
from ldae.settings import Config, Execution, Optim
from ldae.train.checkpoint import Checkpoints
from ldae.train.lock import LOCK, locked
from ldae.train.loop import Hook, Plan, train
from ldae.train.metrics import Metrics

TOKENIZER = "tokenizer.safetensors"
RECONSTRUCTION = "reconstruction.json"
CLASSIFIER = "classifier"  # folder of a fine-tuning
_NAMES = "the hash of the images' names"  # in what a checkpoint says about its run
_MAY_CHANGE = ("system.", "data.bad_images", "data.eval_source")  # between the parts of a run


class Settings(Protocol):
    """What a tree of settings holds, of whichever kind of run."""

    data: Any  # with bad_images
    system: Execution
    seed: int


@contextmanager
def open_run(
    run: Path,
    config: Settings,
    source: Source,
    device: torch.device,
    unread: tuple[str, ...] = (),
    begun: bool = False,
) -> Iterator[None]:
    """Make the run folder, or check that it is this run's, and hold it against other processes.

    Until there is a checkpoint, or ``begun`` says that there is something else to lose, other settings
    begin anew. ``unread`` are the beginnings of settings that do not matter to this run. The images
    of a run that has a checkpoint may lie elsewhere than they did.

    Raises: InputError when it holds a run of other settings, naming them, or another process has it.
    """
    with locked(run):
        changed = _check_settings(run, config, source, unread, begun)
        distributed.barrier()  # every rank has looked before one of them writes
        if distributed.is_main():
            if changed:
                for name in (TOKENIZER, RECONSTRUCTION):
                    (run / name).unlink(missing_ok=True)
            log.write(run / "config.yaml", tree.to_yaml(config).encode())
            environment = log.environment(device) | {"ranks": distributed.world_size()}
            log.write_json(run / "environment.json", environment)
        distributed.barrier()
        yield


def _check_settings(
    run: Path, config: Settings, source: Source, unread: tuple[str, ...], begun: bool
) -> bool:
    """Whether the folder holds a run of other settings, which nobody will miss.

    Raises: InputError when it holds another run, or no run but something else.
    """
    record, before = run / "config.yaml", config
    if record.exists():
        before = _settings_of(run, type(config))
    elif run.is_dir() and any(path.name not in (LOCK, log.JOBS) for path in run.iterdir()):
        raise InputError(f"run folder {run} is not empty and holds no run")
    free = (*_MAY_CHANGE, *unread)
    checkpoints = Checkpoints(run)
    known = (checkpoints.describe() or {}).get(_NAMES)
    if known and known == names_hash(source):
        free += ("data.source",)
    changed = tree.difference(before, config)
    changed = {name: pair for name, pair in changed.items() if not name.startswith(free)}
    if changed and (begun or checkpoints.paths()):
        told = ", ".join(
            f"{name} is {old!r} there, {new!r} here" for name, (old, new) in changed.items()
        )
        raise InputError(f"run folder {run} holds another run: {told}; name another --run")
    return bool(changed)


def names_hash(source: Source) -> str:
    """Of the names of the images, in order: the same wherever they lie."""
    digest = hashlib.sha256()
    for number in range(len(source)):
        digest.update(source.name(number).encode() + b"\0")
    return digest.hexdigest()[:16]


def _settings_of(run: Path, kind: type) -> Settings:
    """Raises: InputError when the run folder is not of this kind of run."""
    try:
        if not (run / "config.yaml").read_bytes().strip():
            raise InputError("its config.yaml is empty")
        return tree.load(run / "config.yaml", kind())
    except InputError as error:
        raise InputError(f"run folder {run} holds another kind of run: {error}") from None


def train_in(
    run: Path,
    model: nn.Module,
    config: Settings,
    optim: Optim,
    schedule: Plan,
    source: Source,
    *,
    row: str,
    transform: Transform,
    mixing: Callable[[Batch], Batch] | None = None,
    device: torch.device,
    compiled: bool = False,
    hooks: tuple[Hook, ...] = (),
) -> nn.Module:
    """Train ``model`` in the run folder on the images of ``source``, see ``train``.

    ``transform`` makes an image what the loader yields, and ``mixing`` a batch of that what the model
    sees. ``row`` says in the records what is trained.
    """

    def batches_from(start: int) -> Iterator[Batch]:
        batches = train_batches(
            source,
            transform,
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
        return _mixed(batches, mixing) if mixing else batches

    def open_metrics(seen: int) -> Metrics:
        say(f"{run}: {row}, {schedule.total:,} images in {schedule.steps:,} steps, from {seen:,}")
        return Metrics(run, seen, config.system.tensorboard, config.system.wandb)

    return train(
        model,
        batches_from,
        schedule,
        optim,
        config.system,
        device=device,
        checkpoints=Checkpoints(run, config.system.keep),
        open_metrics=open_metrics,
        describe={
            "row": row,
            "images": len(source),
            "classes": list(source.classes or ()),
            _NAMES: names_hash(source),
        },
        compiled=compiled,
        hooks=hooks,
        seed=config.seed,
    )


def _mixed(batches: Iterator[Batch], mixing: Callable[[Batch], Batch]) -> Iterator[Batch]:
    with closing(batches):
        for batch in batches:
            yield mixing(batch)


def say(line: str) -> None:
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


def samples(config: Config, device: torch.device, count: int = 12) -> torch.Tensor:
    """A few images for the pictures, of the evaluation split where there is one."""
    source = open_source(config.data.source, "eval")
    center = CropTransform(config.data.img_size, config.data.in_chans)
    count = min(count, len(source))
    batches = train_batches(
        source, center, seed=0, start=0, stop=count, batch_size=count, bad_images="skip"
    )
    return next(batches).images.to(device)
