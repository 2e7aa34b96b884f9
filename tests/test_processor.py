"""bfloat16 is chosen on a processor only where it multiplies faster than float32."""

import pytest

from ldae.processor import multiplies_bf16_faster

AVX = ["avx2", "avx512_f", "avx512_bf16"]


@pytest.mark.parametrize(
    "name, instructions, faster",
    [
        ("AMD EPYC", AVX, True),
        ("AMD EPYC", AVX[:2], False),
        ("Intel(R) Xeon(R) Processor", AVX, False),
        ("Intel(R) Xeon(R) Processor", [*AVX, "amx_bf16"], True),
        ("Apple M2", [], False),
    ],
)
def test_instructions_that_multiply_bf16_faster(name, instructions, faster):
    assert multiplies_bf16_faster(name, instructions) == faster
