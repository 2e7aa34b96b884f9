"""Whether a training is compiled, and by which kernels it computes attention."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch


def compiles(mode: str, device: torch.device) -> bool:
    """Return whether the network is compiled; ``auto``: on GPUs, if kernels can be built."""
    return device.type == "cuda" and builds_kernels() if mode == "auto" else mode == "on"


def builds_kernels() -> bool:
    """Return whether Triton, which torch.compile needs on GPUs, finds a C compiler and headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and Path(sysconfig.get_path("include"), "Python.h").exists()


def fuses_attention(bf16: bool, device: torch.device) -> bool:
    """Return whether training uses torch's fused attention.

    In bf16 on CPUs, its backward is slower than that of plain products, by a quarter of the step at
    64 tokens (benchmarks/step.py).
    """
    return not (bf16 and device.type == "cpu")
