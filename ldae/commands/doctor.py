"""``ldae doctor``: measure what bounds a pre-training on this machine."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ldae import trajectory
from ldae.data.open import open_source
from ldae.data.photos import HEIGHT, WIDTH, write_photos
from ldae.data.source import Source
from ldae.data.workers import SHARED_BYTES
from ldae.devices import device_for
from ldae.files import as_json, check_writable, format_size, write_json
from ldae.machine.extrapolation import extrapolate
from ldae.machine.hardware import describe_machine, find_problems
from ldae.machine.packages import check_packages
from ldae.machine.rates import copying_rate, decoding_rates, training_rates
from ldae.precision import unchanged_generators
from ldae.runs.environment import environment, installed_version
from ldae.settings import Config
from ldae.tree import COUNT, AnyPath, replace

_PHOTOS = 64
_CURES = {
    "decode": "decode the images once with `ldae cache SOURCE FILE.safetensors`, or use a machine "
    "with more cores for each GPU",
    "save": "set a larger --system.save-minutes, or a --run on a faster disk",
}


@unchanged_generators()
def doctor(
    *,
    data: Annotated[AnyPath, tyro.conf.arg(metavar="SOURCE")] = "",
    in_chans: Annotated[int, COUNT] = 3,
    run: AnyPath = Path(),
    device: str = "auto",
    scale: str = "",
    json: AnyPath | None = None,
) -> dict:
    """Measure each part of a pre-training on this machine, and show which of them bounds a run.

    One table shows versions, device, cores and shared memory; the rates of decoding, of copies to
    the GPU, of a training step of l_dae and of saving; and the time that these rates give for the
    paper's 400 epochs of ImageNet, which is extrapolated. Problems are listed with the setting or
    the command that mends them. Nothing is left behind.

    Args:
        data: the images to decode; by default drawn JPEGs of the size of ImageNet's. Those that
            cannot be decoded are left out.
        in_chans: channels of these images.
        run: a checkpoint is saved in this folder, or in its closest parent that exists.
        device: auto, cpu, cuda or cuda:N.
        scale: the scale of the step (paper, small or demo); by default the paper's, with one block
            in the encoder and one in the decoder on a CPU.
        json: a file to write the measurements to.

    Returns: the content of the file: ``environment``, ``machine``, ``data``, ``rates`` (images,
        bytes or FLOPs a second), ``imagenet`` (hours), ``problems``, and missing ``optional``
        packages.

    Raises: InputError for images that cannot be read, and for a folder that cannot be written to.

    Examples:
        >>> ldae.doctor(data="/data/imagenet")["imagenet"]["total_hours"]
    """
    data, run, json = str(data), Path(run).expanduser(), Path(json).expanduser() if json else None
    found = device_for(device)
    COUNT.check("in_chans", in_chans)
    config, batch_size = _size(scale, found)
    check_writable(run)
    if json:
        check_writable(json.parent)
    machine = describe_machine(found)  # before this process keeps the cores busy itself
    with _images(data) as source:
        of_images = {"data.in_chans": in_chans, "data.bad_images": "skip"}
        rates = decoding_rates(source, replace(config, of_images))
    rates |= copying_rate(config, found) | training_rates(config, found, batch_size, run)
    imagenet = extrapolate(rates, machine["gpus"])
    # A checkout that is only on the path has no metadata.
    requirements = metadata.requires("ldae") if installed_version("ldae") else []
    problems, optional = check_packages(requirements or [], installed_version)
    problems += find_problems(machine)
    if imagenet["bound"] in _CURES:
        problems.append(f"{imagenet['bound']} bounds a run: {_CURES[imagenet['bound']]}")
    record = {
        "environment": environment(found),
        "machine": machine,
        "data": data or f"{_PHOTOS} drawn JPEGs of {WIDTH} x {HEIGHT}",
        "rates": rates,
        "imagenet": imagenet,
        "problems": problems,
        "optional": optional,
    }
    lines = [*table(record).items()]
    lines += [("problem", line) for line in problems] + [("optional", line) for line in optional]
    for name, line in lines:
        print(f"{name:<16}{line}")
    if json:
        write_json(json, record)
    return as_json(record)


def _size(scale: str, device: torch.device) -> tuple[Config, int]:
    """Return the configuration of the measured step, and its batch size.

    Raises: InputError for a scale that does not exist.
    """
    config = replace(trajectory.config("l_dae", scale or "paper"), {"system.device": str(device)})
    if device.type == "cuda":
        return config, 128
    return (config if scale else replace(config, {"model.depth": 1})), 8


@contextmanager
def _images(data: str) -> Iterator[Source]:
    """Open the source ``data``, or drawn photographs, which are deleted at the end."""
    if data:
        yield open_source(data, "train")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), _PHOTOS)
        yield open_source(folder, "train")


def table(record: dict) -> dict[str, str]:
    """Return the lines of the table by name."""
    rates, machine, imagenet = record["rates"], record["machine"], record["imagenet"]
    known, cores, gpus = record["environment"], machine["cores"], machine["gpus"]
    packages = known["packages"]
    shared = "no folder of its own"
    if machine["shared"] is not None:
        shared = (
            f"{format_size(machine['shared'])}, {format_size(machine['shared_free'])} of it free"
        )
    share = rates["step"] * rates["step_flops"] / rates["product"]
    hours = ", ".join(f"{part} {count:,.0f}" for part, count in imagenet["hours"].items())
    method = "the step at its measured rate"
    if not imagenet["measured_at_this_size"]:
        method = (
            f"the step at the FLOP/s above, {imagenet['flops_an_image'] / 1e9:.1f} GFLOP an image"
        )
    return {
        "versions": f"ldae {packages['ldae']}, torch {packages['torch']}, timm {packages['timm']}, "
        f"Python {known['python']}",
        "device": f"{known['device']}, {known.get('gpu') or known['cpu']}, "
        f"{format_size(machine['memory'])} of memory"
        + (f", one of {gpus} GPUs" if gpus > 1 else ""),
        "cores": f"{cores} available",
        "shared memory": f"{shared}; the data workers use up to {format_size(SHARED_BYTES)}",
        "decode": f"{rates['decode_one_worker']:,.0f} images/s with 1 worker, "
        f"{rates['decode']:,.0f} with {cores} ({record['data']})",
        "copy": f"{rates['copy']:,.0f} images/s" if gpus else "none, the step runs on the CPU",
        "matrix product": f"{rates['product'] / 1e12:.3g} TFLOP/s in "
        f"{'bfloat16' if rates['bf16'] else 'float32'}",
        "step": f"{rates['step']:,.3g} images/s, {share:.0%} of the rate of the matrix product "
        f"({rates['step_size']})",
        "save": f"{rates['save'] / 1e6:,.0f} MB/s, "
        f"a checkpoint of {format_size(rates['save_bytes'])}",
        "bound": f"{imagenet['bound']}, in a run of the paper's size",
        "ImageNet": f"{imagenet['total_hours']:,.0f} hours for 400 epochs on this machine; this is "
        f"extrapolated, not measured (hours: {hours}; {method})",
    }
