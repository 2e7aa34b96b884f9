"""``ldae doctor``: measure what bounds a pre-training on this machine."""

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ldae import trajectory
from ldae.data.loader import train_batches
from ldae.data.open import open_source
from ldae.data.photos import HEIGHT, WIDTH, write_photos
from ldae.data.source import Source
from ldae.data.workers import SHARED_BYTES, available_cpus
from ldae.distributed import device_for
from ldae.files import check_writable, write_json
from ldae.method import build
from ldae.precision import runs_in_bf16
from ldae.pretraining.timing import TrainingStep, fitting_step, matmul_rate, seconds, training_flops
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.environment import environment
from ldae.settings import Config
from ldae.train.run import transform_of
from ldae.tree import replace

IMAGENET_IMAGES = 1_281_167
_SECONDS = 3.0  # of a measurement
_PHOTOS = 64
_BYTES_A_PARAMETER = 12  # of a checkpoint: the weight and two moments in float32
_SHARED_FOLDER = Path("/dev/shm")
_FOR_DEVELOPERS = ("test", "lint")  # extras that no run needs
_CURES = {
    "decode": "decode the images once with `ldae cache SOURCE FILE.safetensors`, or use a machine "
    "with more cores for each GPU",
    "save": "set a larger --system.save-minutes, or a --run on a faster disk",
}


def doctor(
    *,
    data: Annotated[str, tyro.conf.arg(metavar="SOURCE")] = "",
    run: Path = Path(),
    device: str = "auto",
    scale: str = "",
    json: Path | None = None,
) -> dict:
    """Measure each part of a pre-training on this machine, and show which of them bounds a run.

    One table shows versions, device, cores and shared memory; the rates of decoding, of copies to
    the GPU, of a training step of l_dae and of saving; and the time that these rates give for the
    paper's 400 epochs of ImageNet, which is extrapolated. Problems are listed with the setting or
    the command that mends them. Nothing is left behind.

    Args:
        data: the images to decode; by default drawn JPEGs of the size of ImageNet's.
        run: a checkpoint is saved in this folder, or in its closest parent that exists.
        device: auto, cpu, cuda or cuda:N.
        scale: the scale of the step (paper, small or demo); by default the paper's, with one block
            in the encoder and one in the decoder on a CPU.
        json: a file to write the measurements to.

    Returns: the content of the file: ``environment``, ``machine``, ``data``, ``rates`` (images,
        bytes or FLOPs a second), ``imagenet`` (hours), ``problems``, and missing ``optional``
        packages.

    Raises: InputError for images that cannot be read, and for a folder that cannot be written to.
    """
    found = device_for(device)
    config, batch_size = _size(scale, found)
    check_writable(run)
    if json:
        check_writable(json.parent)
    with _images(data) as source:
        rates = decoding_rates(source, config)
    rates |= copying_rate(config, found) | training_rates(config, found, batch_size, run)
    machine = describe_machine(found)
    imagenet = extrapolate(rates, machine["gpus"])
    problems, optional = check_packages(metadata.requires("ldae") or [], _installed_version)
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
    return record


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


def decoding_rates(source: Source, config: Config) -> dict:
    """Return the images a second that one worker decodes and crops, and a worker on each core."""
    rates = {}
    for name, workers in (("decode_one_worker", 1), ("decode", available_cpus())):
        batches = train_batches(
            source, transform_of(config), seed=0, start=0, batch_size=16, workers=workers
        )
        with closing(batches):
            for _ in range(2 * workers):  # the workers start
                next(batches)
            begun, images = time.perf_counter(), 0
            while time.perf_counter() - begun < _SECONDS:
                images += len(next(batches).images)
            rates[name] = images / (time.perf_counter() - begun)
    return rates


def copying_rate(config: Config, device: torch.device) -> dict:
    """Return the images a second that are copied from pinned memory to a GPU; {} on a CPU."""
    if device.type == "cpu":
        return {}
    side, chans = config.data.img_size, config.data.in_chans
    images = torch.empty(256, chans, side, side, dtype=torch.uint8, pin_memory=True)
    taken = [seconds(lambda: images.to(device, non_blocking=True), device) for _ in range(5)]
    return {"copy": len(images) / min(taken)}


def training_rates(config: Config, device: torch.device, batch_size: int, run: Path) -> dict:
    """Return the rates of a training step and of saving its state below the folder ``run``.

    A step that does not fit into the memory of a GPU is measured with half of the batch.
    """
    step = fitting_step(config, device, batch_size)
    rate = step.rate(at_most=2 * _SECONDS)
    flops = training_flops(step.method)
    product = matmul_rate(device, torch.bfloat16 if step.method.bf16 else torch.float32)
    denoiser = step.method.denoiser
    return {
        "step": rate,
        "step_size": f"{config.model.name}, {denoiser.encoder_size:,} parameters in the encoder, "
        f"{denoiser.side**2} tokens, batch {step.batch_size}",
        "step_flops": flops,  # of an image
        "bf16": step.method.bf16,
        "product": product,  # FLOP/s
        **_saving_rate(step, run),
    }


def _saving_rate(step: TrainingStep, run: Path) -> dict:
    """Return the bytes a second with which a checkpoint is written, and its size."""
    while not run.exists():
        run = run.parent
    with tempfile.TemporaryDirectory(dir=run, prefix=".doctor-") as folder:
        state, copied = step.state.capture()
        if copied:
            copied.synchronize()
        begun = time.perf_counter()
        path = Checkpoints(Path(folder)).save(
            state | {"images_seen": 0, "describe": {}, "watchdog": None}
        )
        taken = time.perf_counter() - begun
        size = path.stat().st_size
    return {"save": size / taken, "save_bytes": size}


def extrapolate(rates: dict, gpus: int) -> dict:
    """Return the hours that each part of the paper's run on ImageNet takes at the measured rates.

    The parts overlap, so the slowest of them bounds the run. On a CPU, decoding and training share
    the cores, and their hours add up. Saving takes place every ``system.save_minutes``. The step
    scales with its FLOPs, and several GPUs are taken to be as many times as fast.

    Args:
        rates: images a second of ``decode``, ``copy`` (on GPUs) and ``step``; ``step_flops``, the
            FLOPs of a measured image; the bytes a second of ``save``.
        gpus: number of GPUs; 0: the step ran on a CPU.
    """
    config = trajectory.config("l_dae")
    with torch.device("meta"):
        method = build(config)
    flops = training_flops(method)
    images = config.optim.epochs * IMAGENET_IMAGES
    devices = max(gpus, 1)
    per_second = {"decode": rates["decode"]}
    if gpus:
        per_second["copy"] = rates["copy"] * devices
    per_second["step"] = rates["step"] * devices * rates["step_flops"] / flops
    hours = {name: images / rate / 3600 for name, rate in per_second.items()}
    parameters = sum(parameter.numel() for parameter in method.denoiser.parameters())
    saves = 60 * hours["step"] / config.system.save_minutes
    hours["save"] = saves * _BYTES_A_PARAMETER * parameters / rates["save"] / 3600
    together = max(hours.values())
    if not gpus:
        together = max(hours["decode"] + hours["step"], hours["save"])
    return {
        "images": images,
        "flops_an_image": flops,
        "measured_at_this_size": flops == rates["step_flops"],
        "hours": hours,
        "bound": max(hours, key=lambda name: hours[name]),
        "total_hours": together,
    }


def describe_machine(device: torch.device) -> dict:
    """Return the cores, the shared memory and the memory of the device, in bytes."""
    gpu = device.type == "cuda"
    machine = {
        "cores": available_cpus(),
        "gpus": torch.cuda.device_count() if gpu else 0,
        "native_bf16": runs_in_bf16("auto", device),
        "memory": torch.cuda.get_device_properties(device).total_memory
        if gpu
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shared": None,
        "shared_free": None,
    }
    if _SHARED_FOLDER.is_dir():
        disk = os.statvfs(_SHARED_FOLDER)
        machine["shared"] = disk.f_frsize * disk.f_blocks
        machine["shared_free"] = disk.f_frsize * disk.f_bavail
    return machine


def find_problems(machine: dict) -> list[str]:
    """Return a sentence for each problem of a machine, with the setting or command that mends it.

    Args:
        machine: as ``describe_machine`` returns it.
    """
    problems = []
    if machine["shared"] is not None and machine["shared_free"] < SHARED_BYTES:
        problems.append(
            f"{_SHARED_FOLDER} has {_size_of(machine['shared_free'])} left, and the data workers "
            f"use up to {_size_of(SHARED_BYTES)}: start the container with --shm-size 256m, or set "
            "--system.workers 0"
        )
    if not machine["native_bf16"]:
        problems.append(
            "this device has no bfloat16 arithmetic, so --system.precision auto computes in "
            "float32: use a GPU of compute capability 8 or newer, or a CPU with AVX-512 BF16 or AMX"
        )
    cores = max(machine["cores"] // max(machine["gpus"], 1), 1)  # of a process
    workers = trajectory.config("l_dae").system.workers
    if workers > cores:
        problems.append(
            f"the paper's recipe has {workers} data workers a process, and there are {cores} cores "
            f"for them: set --system.workers {cores}"
        )
    return problems


def check_packages(
    requirements: list[str], version: Callable[[str], str | None]
) -> tuple[list[str], list[str]]:
    """Return a sentence for each package that is missing or too old, and for each optional extra.

    Args:
        requirements: in the form ``name>=version; extra == 'extra'``.
        version: returns the version of an installed package, or None.
    """
    problems: list[str] = []
    missing: dict[str, list[str]] = {}  # extra -> packages
    for requirement in requirements:
        found = re.match(r"([\w.-]+)(?:>=([\d.]+))?.*?(?:extra == ['\"]([\w-]+)|$)", requirement)
        name, least, extra = found.groups()
        present = version(name)
        if extra in _FOR_DEVELOPERS or not (least or extra):
            continue
        if present is None and extra:
            missing.setdefault(extra, []).append(name)
        elif present is None:
            problems.append(f"{name} is not installed: pip install '{name}>={least}'")
        elif least and _numbers(present) < _numbers(least):
            problems.append(f"{name} {present} is too old: pip install '{name}>={least}'")
    optional = [
        f"{', '.join(names)}, for what needs the extra {extra}: pip install 'ldae[{extra}]'"
        for extra, names in missing.items()
    ]
    return problems, optional


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, such as (2, 5, 1) for 2.5.1+cu121."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def table(record: dict) -> dict[str, str]:
    """Return the lines of the table by name."""
    rates, machine, imagenet = record["rates"], record["machine"], record["imagenet"]
    known, cores, gpus = record["environment"], machine["cores"], machine["gpus"]
    packages = known["packages"]
    shared = "no folder of its own"
    if machine["shared"] is not None:
        shared = f"{_size_of(machine['shared'])}, {_size_of(machine['shared_free'])} of it free"
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
        f"{_size_of(machine['memory'])} of memory" + (f", one of {gpus} GPUs" if gpus > 1 else ""),
        "cores": f"{cores} available",
        "shared memory": f"{shared}; the data workers use up to {_size_of(SHARED_BYTES)}",
        "decode": f"{rates['decode_one_worker']:,.0f} images/s with 1 worker, "
        f"{rates['decode']:,.0f} with {cores} ({record['data']})",
        "copy": f"{rates['copy']:,.0f} images/s" if gpus else "none, the step runs on the CPU",
        "matrix product": f"{rates['product'] / 1e12:.3g} TFLOP/s in "
        f"{'bfloat16' if rates['bf16'] else 'float32'}",
        "step": f"{rates['step']:,.3g} images/s, {share:.0%} of the rate of the matrix product "
        f"({rates['step_size']})",
        "save": f"{rates['save'] / 1e6:,.0f} MB/s, a checkpoint of {_size_of(rates['save_bytes'])}",
        "bound": f"{imagenet['bound']}, in a run of the paper's size",
        "ImageNet": f"{imagenet['total_hours']:,.0f} hours for 400 epochs on this machine; this is "
        f"extrapolated, not measured (hours: {hours}; {method})",
    }


def _size_of(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
