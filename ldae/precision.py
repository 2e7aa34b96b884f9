"""The arithmetic of a run: bfloat16, float32 with or without TF32, gradients, generators."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from ldae.processor import multiplies_bf16_faster, processor_name, vector_instructions

# Whose products of float32 numbers may be in another type, by torch's newer names.
_PARTS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
    torch.backends.mkldnn.rnn,
)


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

    This holds for matrices and convolutions, whatever torch's settings and the environment say.
    """
    before = [part.fp32_precision for part in _PARTS]
    # Libraries read the older names too. Once a caller has used the newer ones, torch may refuse to
    # read the older: then they have these values, torch's defaults.
    matmul, cudnn = "highest", True
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        cudnn = torch.backends.cudnn.allow_tf32
    inside = ["tf32" if tf32 else "ieee"] * len(_PARTS)
    _set_float32_products("high" if tf32 else "highest", tf32, inside)
    try:
        yield
    finally:
        _set_float32_products(matmul, cudnn, before)


def _set_float32_products(matmul: str, cudnn: bool, parts: list[str]) -> None:
    """Set torch's older names and then the newer ones, which the older change too."""
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    for part, precision in zip(_PARTS, parts, strict=True):
        part.fp32_precision = precision


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Let torch use only algorithms that give the same bits each time, if ``enabled``.

    An operation that has none raises RuntimeError. cuBLAS also needs the variable
    CUBLAS_WORKSPACE_CONFIG, which ``devices.device_for`` sets.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def unchanged_compiler(compiled: bool) -> Iterator[None]:
    """Restore the settings of torch's compiler at the end, which ``compile_parts`` changes.

    They must hold for long: torch compiles a part when it is first called with a shape.
    """
    if not compiled:  # importing the compiler takes seconds
        yield
        return
    dynamo, functorch = torch._dynamo.config, torch._functorch.config
    with (
        dynamo.patch(optimize_ddp=dynamo.optimize_ddp, recompile_limit=dynamo.recompile_limit),
        functorch.patch(activation_memory_budget=functorch.activation_memory_budget),
    ):
        yield


@contextmanager
def unchanged_generators() -> Iterator[None]:
    """Restore torch's global random generators at the end, for a caller who draws from them too."""
    # The generator of a GPU that is not in use yet has no state to lose.
    in_use = torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if in_use else []):
            yield
    finally:
        if torch.cuda.is_initialized() and not in_use:  # the caller's seed has waited for this
            torch.cuda.manual_seed_all(torch.initial_seed())


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
