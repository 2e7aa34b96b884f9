"""The processor: its name, its vector instructions, and whether they speed up bfloat16."""

import platform
from pathlib import Path

import torch


def processor_name() -> str:
    """Return the name of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def vector_instructions() -> list[str]:
    """Return the vector and matrix instructions of this processor, the narrowest first.

    They decide how fast products are, and whether bfloat16 is native.
    """
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if found.get(name)]


def multiplies_bf16_faster(name: str, instructions: list[str]) -> bool:
    """Return whether a processor multiplies matrices in bfloat16 faster than in float32.

    AMX does on all processors. The dot products of AVX-512 (VDPBF16PS) do on AMD's; on Intel's a
    large product takes nearly twice as long in bfloat16 as in float32 (``benchmarks/speed.py``).

    Args:
        name: as ``processor_name`` returns it.
        instructions: as ``vector_instructions`` returns them.
    """
    return "amx_bf16" in instructions or ("avx512_bf16" in instructions and "Intel" not in name)
