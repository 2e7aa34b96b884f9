"""The speed of a device: seconds of a call, the rate of a matrix product, and a training step."""

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldae.data.workers import Batch
from ldae.errors import InputError
from ldae.method import LDAE
from ldae.models.vit import fuse_attention
from ldae.precision import float32_products, runs_in_bf16, unchanged_compiler
from ldae.runs.kinds import kind_with
from ldae.train.compilation import compiles, fuses_attention
from ldae.train.memory import release_memory
from ldae.train.optim import adamw
from ldae.train.state import State
from ldae.train.update import Update

_FIT_IMAGES = 16  # enough patches for the axes of random images, which need no good fit


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, with all work of the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16, size: int = 0) -> float:
    """Return the FLOP/s of a large matrix product, the median of five.

    Args:
        size: side of the square matrices; by default 8192 on a GPU and 2048 on a CPU.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    times = [seconds(lambda: left @ right, device) for _ in range(6)]
    return 2 * size**3 / statistics.median(times[1:])


def training_flops(method: LDAE) -> int:
    """Return the FLOPs of the matrix products of the networks for one training image.

    The backward pass of the denoiser costs twice its forward pass. The averaged encoder of a second
    target has no backward pass. The tokenizer is left out.
    """
    method = copy.deepcopy(method).to("meta")
    denoiser, average = method.denoiser, method.feature_target
    tokens = torch.empty(1, denoiser.side**2, denoiser.in_dim, device="meta")
    position = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as trained:
        denoiser(tokens, position, kept=method.keep(position))
    with FlopCounterMode(display=False) as frozen:
        if average is not None:
            average(tokens, position)
    return 3 * trained.get_total_flops() + frozen.get_total_flops()


def kept_bytes(method: nn.Module, *inputs: Any) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, with the weights."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # While the result exists, no storage is freed, so no address counts for two tensors.
        _ = method(*inputs)
    return sum(storages.values())


def prepared_method(config: Any, device: torch.device, images: torch.Tensor) -> Any:
    """Return the method of a pre-training on the device, ready for the first step.

    Args:
        config: the settings of any kind of pre-training.
        images: (B, C, H, W), uint8, to which a patch-wise tokenizer is fitted.
    """
    bf16 = runs_in_bf16(config.system.precision, device)
    method = kind_with(config).functions().build(config, bf16=bf16)
    if isinstance(method, LDAE):
        method.tokenizer.fit([images])
    method.to(device).train()
    fuse_attention(method, fuses_attention(bf16, device))
    return method


class TrainingStep:
    """The step of ``ldae pretrain`` on a fixed batch of random images, without the loop around it.

    The settings are those of any kind of pre-training. A call copies the batch to the device,
    computes the loss and its gradients, and updates the weights. The first call is done.

    Raises: torch.OutOfMemoryError when the batch does not fit into the memory of the device.
    """

    def __init__(self, config: Any, device: torch.device, batch_size: int) -> None:
        self.config, self.device, self.batch_size = config, device, batch_size
        side = config.data.img_size
        images = torch.randint(
            256, (batch_size, config.data.in_chans, side, side), dtype=torch.uint8
        )
        self.method = prepared_method(config, device, images[:_FIT_IMAGES])
        self.batch = Batch(images, [], torch.arange(batch_size), [])
        compiled = compiles(config.system.compile, device)
        with unchanged_compiler(compiled):
            self.state = State(self.method, config.optim, config.system, device, compiled, adamw)
            self.update = Update(self.state, clip_grad=config.optim.clip_grad)
            self.first_seconds = seconds(self, device)
        """Seconds of the first step, which compiles."""

    def __call__(self) -> None:
        with float32_products(tf32=self.config.system.precision == "tf32"):
            self.update([self.batch], decay=0.0)

    def rate(self, steps: int = 3, at_most: float = float("inf")) -> float:
        """Return images a second, the median of ``steps`` steps after one of burn-in.

        Args:
            at_most: seconds after which no further step begins.
        """
        seconds(self, self.device)
        times: list[float] = []
        while len(times) < steps and sum(times) < at_most or not times:
            times.append(seconds(self, self.device))
        return self.batch_size / statistics.median(times)


def fitting_step(config: Any, device: torch.device, batch_size: int) -> TrainingStep:
    """Return a step with the batch halved until it fits into the memory of the device.

    Raises: InputError when one image does not fit.
    """
    while batch_size:
        with suppress(torch.OutOfMemoryError):
            return TrainingStep(config, device, batch_size)
        release_memory(device, compiles(config.system.compile, device))
        batch_size //= 2
    raise InputError(f"{device} has too little memory for a training step of one image")
