"""``ldae sample``: a grid to look at, a folder of pictures, or one file for the FID suites."""

import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ldae import console, files
from ldae.backbones.run import load_run
from ldae.distributed import (
    all_reduce_sum,
    barrier,
    device_for,
    is_main,
    process_group,
    rank,
    world_size,
)
from ldae.errors import InputError
from ldae.method import LDAE
from ldae.plots.pictures import save_grid
from ldae.runs import layout
from ldae.sampling.album import Album, check_same_record, pack_npz
from ldae.sampling.generation import Generate, ResolvedSettings, cycled, prepare_generation
from ldae.sampling.settings import SamplingSettings, check_settings

_COLUMNS = 8
_NOT_FOLDERS = (".png", ".jpg", ".jpeg", ".npy", ".zip", ".tar")


def sample(
    run: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    /,
    images: int = 64,
    out: Path | None = None,
    *,
    data: str | None = None,
    batch_size: int = 64,
    workers: int = 4,
    device: str = "auto",
    how: SamplingSettings = SamplingSettings(),
) -> Path:
    """Sample images from a run.

    Picture n depends on the run, the settings and n, not on the batch, the number of ranks or
    interruptions. The same command again goes on with what is missing.

    Args:
        run: a run folder; its newest checkpoint is sampled from.
        images: how many.
        out: a folder for 000000.png and so on, or a file.npz as the ADM suite has it (arr_0 images,
            arr_1 labels); by default a grid is drawn in the run folder, below samples/.
        data: where rows that do not end in pure noise get the Gaussian of their latents from, the
            first time; by default the source that the run was trained on.
        batch_size: pictures at a time on each device.
        workers: processes that decode images for that Gaussian.
        device: auto, cpu, cuda or cuda:N.
        how: the sampler and its settings.

    Returns: the file or folder that was written.

    Raises: InputError for settings that do not fit the run, and when the disk is full.
    """
    check_settings(how)
    _check_request(images, batch_size, workers, out)
    place = device_for(device)
    with process_group(place):
        run = Path(run)
        method, state = load_run(run)
        _check_channels(method, out)
        generate, resolved, record = prepare_generation(
            run, method, state, how, place, data, workers
        )
        if out is None:
            out = (
                run
                / layout.SAMPLES
                / (_name(how, len(resolved.levels), state["images_seen"]) + ".png")
            )
            _draw_grid(generate, resolved, images, batch_size, place, out)
        elif out.suffix == ".npz":
            _write_npz(generate, resolved, images, batch_size, place, record, out)
        else:
            _fill(Album(out, record), generate, images, batch_size, place)
        if is_main():
            print(f"{images:,} samples of {run} at {state['images_seen']:,} images seen: {out}")
    return out


def _fill(
    album: Album, generate: Generate, images: int, batch_size: int, device: torch.device
) -> None:
    """Put what is missing of the first pictures into the album, each rank its share."""
    own = [n for n in range(rank(), images, world_size()) if not album.path(n).exists()]
    with console.progress(len(own), "samples") as bar:
        for batch in torch.tensor(own, dtype=torch.int64).split(batch_size) if own else ():
            for number, picture in zip(batch.tolist(), generate(batch.to(device)), strict=True):
                album.save(number, picture)
            bar.update(len(batch))
    barrier()


def _write_npz(
    generate: Generate,
    resolved: ResolvedSettings,
    images: int,
    batch_size: int,
    device: torch.device,
    record: dict,
    out: Path,
) -> None:
    """Pictures wait in a folder beside ``out`` until all are there."""
    record = record | {"images": images}
    if out.exists():
        check_same_record(out, record)
        return
    album = Album(out.with_name(out.name + files.PARTS), record, ".npy")
    _fill(album, generate, images, batch_size, device)
    if is_main():
        asked = resolved.targets if resolved.labels is None else resolved.labels
        labels = None if asked is None else cycled(asked, torch.arange(images)).numpy()
        pack_npz(album, images, labels, record, out)
    barrier()


def _draw_grid(
    generate: Generate,
    resolved: ResolvedSettings,
    images: int,
    batch_size: int,
    device: torch.device,
    out: Path,
) -> None:
    """A column for each class that is asked for, if they are few."""
    own = torch.arange(rank(), images, world_size())
    found = []
    with console.progress(len(own), "samples") as bar:
        for batch in own.split(batch_size) if len(own) else ():
            found.append(generate(batch.to(device)))
            bar.update(len(batch))
    everything = _gather(found, own, images, device)
    if is_main():
        asked = resolved.targets if resolved.labels is None else resolved.labels
        columns = len(asked) if asked is not None and 1 < len(asked) <= 2 * _COLUMNS else _COLUMNS
        columns = min(columns, images)
        blank = torch.ones_like(everything[:1]).expand(-images % columns, -1, -1, -1)
        save_grid(list(torch.cat([everything, blank]).split(columns)), out)
    barrier()


def _gather(
    found: list[torch.Tensor], own: torch.Tensor, images: int, device: torch.device
) -> torch.Tensor:
    """The pictures of all ranks, (N, C, H, W) in [0, 1]."""
    shape = torch.zeros(3, dtype=torch.int64, device=device)
    if rank() == 0:  # which always has one
        shape += torch.tensor(found[0].shape[1:], device=device)
    everything = torch.zeros(images, *all_reduce_sum(shape).tolist(), device=device)
    if found:
        everything[own.to(device)] = torch.cat(found).to(device).float() / 255
    return all_reduce_sum(everything)


def _check_request(images: int, batch_size: int, workers: int, out: Path | None) -> None:
    for name, value, least in (
        ("images", images, 1),
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
    ):
        if value < least:
            raise InputError(f"{name} must be at least {least}, not {value}")
    if out is not None and out.suffix in _NOT_FOLDERS:
        raise InputError(f"out {out} must be a folder, or a file that ends in .npz")


def _check_channels(method: LDAE, out: Path | None) -> None:
    chans = method.tokenizer.in_chans
    if out is not None and out.suffix != ".npz" and chans not in (1, 3):
        raise InputError(f"a .png has 1 or 3 channels and this run {chans}: name an --out .npz")


def _name(how: SamplingSettings, steps: int, images_seen: int) -> str:
    """A file name that tells what decides the pictures."""
    parts = [how.sampler, str(steps)]
    for key, value in asdict(how).items():
        if value != getattr(SamplingSettings(), key) and key not in ("sampler", "steps"):
            values = "-".join(value) if isinstance(value, tuple) else value
            parts.append(f"{key}={Path(values).name if key == 'classifier' else values}")
    name = re.sub(r"[^\w.=]+", "-", "-".join([*parts, f"at={images_seen}"]))
    if len(name) > 120:
        name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name
