"""The arithmetic of a run: bfloat16, float32 with or without TF32, gradients, generators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ldae.processor import multiplies_bf16_faster, processor_name, vector_instructions


def runs_in_bf16(precision: str, device: torch.device) -> bool:
    """Return whether the network runs in bfloat16; ``auto``: if that is faster on the device."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return multiplies_bf16_faster(processor_name(), vector_instructions())


def bf16_autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Return the context in which networks run in bfloat16, if ``enabled``."""
    kind = device.type.replace("meta", "cpu")  # meta tensors have no autocast
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


@contextmanager
def float32_products(tf32: bool = False) -> Iterator[None]:
    """Compute products of float32 numbers in float32, or in TF32 where a GPU has it.

    This holds for matrices and convolutions, whatever torch's defaults and the environment say.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Let torch use only algorithms that give the same bits each time, if ``enabled``.

    An operation that has none raises RuntimeError. cuBLAS also needs the variable
    CUBLAS_WORKSPACE_CONFIG, which ``distributed.device_for`` sets.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def unchanged_generators() -> Iterator[None]:
    """Restore torch's global random generators at the end, for a caller who draws from them too."""
    # The generator of a GPU that is not in use yet has no state to lose.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def seeded_generator(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU, which new weights are drawn from, and restore it."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # GPU states are not restored
        yield


@contextmanager
def recorded_gradients() -> Iterator[None]:
    """Let torch record gradients, also for a caller who has switched them off.

    A network that is built in torch's inference mode could never be trained.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield
