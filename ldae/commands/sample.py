"""``ldae sample``: generate images as a grid, a folder or a file for FID suites."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ldae import console, files
from ldae.backbones.run import load_method
from ldae.devices import device_for
from ldae.distributed import all_reduce_sum, barrier, is_main, process_group, share_of
from ldae.errors import InputError
from ldae.method import LDAE
from ldae.plots.pictures import save_grid
from ldae.runs import layout
from ldae.sampling.album import Album, check_same_record, pack_npz
from ldae.sampling.generation import ResolvedSettings, generate_batches, prepare_generation
from ldae.sampling.settings import SamplingSettings, check_settings
from ldae.tree import COUNT, NOT_NEGATIVE, AnyPath, difference

Draw = Callable[[Sequence[int]], Iterator[tuple[torch.Tensor, torch.Tensor]]]
"""Numbers of samples -> batches of numbers, int64 (B,), and images, uint8 (B, C, H, W)."""

_COLUMNS = 8
_NOT_FOLDERS = (".png", ".jpg", ".jpeg", ".npy", ".zip", ".tar")


def sample(
    run: Annotated[AnyPath, tyro.conf.arg(metavar="RUN")],
    /,
    images: int = 64,
    out: AnyPath | None = None,
    *,
    data: AnyPath | None = None,
    batch_size: int = 64,
    workers: int = 4,
    device: str = "auto",
    sampling: SamplingSettings = SamplingSettings(),
) -> Path:
    """Generate images from a run.

    Image n depends only on the run, the settings and n. It does not depend on the batch size, the
    number of ranks or interruptions. The same command again generates the missing images.

    Args:
        run: a run folder; its newest checkpoint is used.
        images: number of images.
        out: a folder for 000000.png and so on, or a file.npz in the format of the ADM suite (arr_0
            images, arr_1 labels); by default a grid below samples/ in the run folder.
        data: for rows that do not end in pure noise, the images to fit the Gaussian of latents to;
            by default the training images of the run. The fit is kept until other images are named.
        batch_size: images at a time on each device.
        workers: processes that decode images for that Gaussian.
        device: auto, cpu, cuda or cuda:N.
        sampling: the sampler and its settings.

    Returns: the file or folder that was written.

    Raises: InputError for settings that do not fit the run, and when the disk is full.

    Examples:
        >>> picture = ldae.sample("runs/l_dae", 16)
        >>> few = ldae.SamplingSettings(steps=100)
        >>> ldae.sample("runs/l_dae", 5000, "samples.npz", sampling=few)
    """
    run, out = Path(run).expanduser(), Path(out).expanduser() if out else None
    data = None if data is None else str(data)
    check_settings(sampling)
    _check_request(images, batch_size, workers, out)
    torch_device = device_for(device)
    with process_group(torch_device):
        method, state = load_method(run)
        seen = state["images_seen"]
        _check_channels(method, out)
        generate, chosen, record = prepare_generation(
            run, method, state, sampling, torch_device, data, workers
        )
        draw = partial(generate_batches, generate, batch_size=batch_size, device=torch_device)
        if out is None:
            out = run / layout.SAMPLES / _grid_name(sampling, len(chosen.levels), seen)
            chans, side = method.tokenizer.in_chans, method.tokenizer.img_size
            grid = torch.zeros(images, chans, side, side, device=torch_device)
            _write_grid(draw, chosen, grid, out)
        elif out.suffix == ".npz":
            _write_npz(draw, chosen, images, record, out)
        else:
            _fill(Album(out, record), draw, images)
        console.print_main(f"{images:,} samples of {run} at {seen:,} images seen: {out}")
    return out


def _fill(album: Album, draw: Draw, images: int) -> None:
    """Generate this rank's share of the first ``images`` images that the album lacks."""
    missing = [n for n in share_of(images) if not album.path(n).exists()]
    for batch, pictures in draw(missing):
        for number, picture in zip(batch.tolist(), pictures, strict=True):
            album.save(number, picture)
    barrier()


def _write_npz(draw: Draw, chosen: ResolvedSettings, images: int, record: dict, out: Path) -> None:
    """Collect the images in a folder beside ``out``, and pack them when all are there."""
    record = record | {"images": images}
    if out.exists():
        check_same_record(out, record)
        return
    album = Album(out.with_name(out.name + files.PARTS), record, ".npy")
    _fill(album, draw, images)
    if is_main():
        classes = _classes(chosen)
        labels = None if classes is None else chosen.choose(classes, torch.arange(images)).numpy()
        pack_npz(album, images, labels, record, out)
    barrier()


def _classes(chosen: ResolvedSettings) -> torch.Tensor | None:
    """Return the classes that the samples cycle through, int64 (L,)."""
    return chosen.targets if chosen.labels is None else chosen.labels


def _write_grid(draw: Draw, chosen: ResolvedSettings, grid: torch.Tensor, out: Path) -> None:
    """Fill the grid, zeros (N, C, H, W), and write it.

    It has a column for each of a few classes in turn, otherwise eight columns.
    """
    for batch, pictures in draw(share_of(len(grid))):
        grid[batch.to(grid.device)] = pictures.to(grid.device).float() / 255
    all_reduce_sum(grid)
    if is_main():
        classes = None if chosen.settings.random_labels else _classes(chosen)
        few = classes is not None and 1 < len(classes) <= 2 * _COLUMNS
        columns = min(len(classes) if few else _COLUMNS, len(grid))
        blank = torch.ones_like(grid[:1]).expand(-len(grid) % columns, -1, -1, -1)
        save_grid(list(torch.cat([grid, blank]).split(columns)), out)
    barrier()


def _check_request(images: int, batch_size: int, workers: int, out: Path | None) -> None:
    COUNT.check("images", images)
    COUNT.check("batch_size", batch_size)
    NOT_NEGATIVE.check("workers", workers)
    if out is not None and out.suffix in _NOT_FOLDERS:
        raise InputError(f"out {out} must be a folder, or a file that ends in .npz")


def _check_channels(method: LDAE, out: Path | None) -> None:
    chans = method.tokenizer.in_chans
    if out is not None and out.suffix != ".npz" and chans not in (1, 3):
        raise InputError(f"a .png has 1 or 3 channels, this run {chans}: name an --out .npz")


def _grid_name(sampling: SamplingSettings, steps: int, images_seen: int) -> str:
    """Return a file name that holds the settings of the sampling."""
    parts = [sampling.sampler, str(steps)]
    for key, (_, value) in difference(SamplingSettings(), sampling).items():
        if key not in ("sampler", "steps"):
            values = "-".join(value) if isinstance(value, tuple) else value
            parts.append(f"{key}={Path(values).name if key == 'classifier' else values}")
    name = re.sub(r"[^\w.=]+", "-", "-".join([*parts, f"at={images_seen}"]))
    if len(name) > 120:
        name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return f"{name}.png"
