"""Arithmetic holds inside of its context, whatever was set before, and is restored behind it."""

import pytest
import torch

from ldae.precision import (
    bf16_autocast,
    deterministic_algorithms,
    float32_products,
    seeded_generator,
)


@pytest.fixture(params=["highest", "high", "medium"])
def default(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("tf32", [False, True])
def test_products_of_float32_are_in_float32_or_tf32_whatever_the_default(default, tf32):
    cudnn = torch.backends.cudnn.allow_tf32
    with float32_products(tf32):
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
    assert torch.get_float32_matmul_precision() == default
    assert torch.backends.cudnn.allow_tf32 == cudnn


@pytest.mark.parametrize("enabled", [False, True])
def test_determinism_ends_with_its_context_also_after_an_error(enabled):
    with pytest.raises(KeyError), deterministic_algorithms(enabled):
        assert torch.are_deterministic_algorithms_enabled() == enabled
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_autocast_holds_for_networks_on_the_cpu_and_on_meta():
    layer = torch.nn.Linear(3, 4)
    for device in (torch.device("cpu"), torch.device("meta")):
        for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
            with bf16_autocast(device, enabled):
                assert torch.is_autocast_enabled("cpu") == enabled
                assert layer(torch.ones(1, 3)).dtype == dtype


def test_a_seed_decides_draws_and_leaves_the_generator_as_it_was():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded_generator(2):
        drawn = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(2)))
