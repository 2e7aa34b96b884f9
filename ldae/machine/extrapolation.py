"""The hours that the paper's run on ImageNet takes at measured rates."""

import torch

from ldae import trajectory
from ldae.machine.timing import training_flops
from ldae.method import build

IMAGENET_IMAGES = 1_281_167
_BYTES_A_PARAMETER = 12  # of a checkpoint: the weight and two moments in float32


def extrapolate(rates: dict, gpus: int) -> dict:
    """Return the hours that each part of the paper's run on ImageNet takes at the measured rates.

    The parts overlap, so the slowest of them bounds the run. On a CPU they share the cores, and
    their hours add up. Saving takes place every ``system.save_minutes`` of the run. The step scales
    with its FLOPs, and several GPUs are taken to be as many times as fast.

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
    together = max if gpus else sum
    saves = 60 * together(hours.values()) / config.system.save_minutes
    hours["save"] = saves * _BYTES_A_PARAMETER * parameters / rates["save"] / 3600
    return {
        "images": images,
        "flops_an_image": flops,
        "measured_at_this_size": flops == rates["step_flops"],
        "hours": hours,
        "bound": max(hours, key=lambda name: hours[name]),
        "total_hours": together(hours.values()),
    }
