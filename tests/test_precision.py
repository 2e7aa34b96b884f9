"""Arithmetic holds inside of its context, whatever was set before, and is restored behind it."""

import contextlib

import pytest
import torch

from ldae import precision
from ldae.precision import bf16_autocast, deterministic_algorithms, seeded_generator

CHANGES = {
    "torch's defaults": lambda: None,
    "older, high": lambda: torch.set_float32_matmul_precision("high"),
    "older, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older, convolutions": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "newer, all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "newer, GPU": lambda: setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
    "newer, products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "newer, convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "newer, CPU": lambda: setattr(torch.backends.mkldnn, "fp32_precision", "bf16"),
    "newer, products of the CPU": lambda: setattr(
        torch.backends.mkldnn.matmul, "fp32_precision", "bf16"
    ),
}
OLDER = (
    torch.get_float32_matmul_precision,
    lambda: torch.backends.cuda.matmul.allow_tf32,
    lambda: torch.backends.cudnn.allow_tf32,
)


NEWER = (torch.backends, torch.backends.cudnn, torch.backends.mkldnn, *precision._PARTS)


def older_names() -> list[object]:
    """Return what the older names say; None where torch refuses to read one."""
    values: list[object] = [None] * len(OLDER)
    for n, read in enumerate(OLDER):
        with contextlib.suppress(RuntimeError):
            values[n] = read()
    return values


@pytest.fixture(params=CHANGES)
def changed(request):
    before, older = [part.fp32_precision for part in NEWER], older_names()
    CHANGES[request.param]()
    yield
    torch.set_float32_matmul_precision(older[0])
    torch.backends.cudnn.allow_tf32 = older[2]
    for part, value in zip(NEWER, before, strict=True):
        part.fp32_precision = value
    assert [part.fp32_precision for part in NEWER] == before and older_names() == older


@pytest.mark.parametrize("tf32", [False, True])
def test_products_of_float32_are_in_float32_or_tf32_whatever_the_caller_has_set(changed, tf32):
    before, older = [part.fp32_precision for part in NEWER], older_names()
    with precision.float32_products(tf32):
        inside = {part.fp32_precision for part in precision._PARTS}
        assert inside == {"tf32" if tf32 else "ieee"}
        assert older_names() == ["high" if tf32 else "highest", tf32, tf32]
    assert [part.fp32_precision for part in NEWER] == before
    for value, known in zip(older_names(), older, strict=True):
        assert known in (None, value)


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


def test_a_gpu_that_is_used_first_inside_begins_with_the_seed_of_the_caller(monkeypatch):
    seeds, in_use = [], iter((False, True))
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: next(in_use))
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeds.append)
    torch.random.default_generator.manual_seed(5)
    with precision.unchanged_generators():
        torch.random.default_generator.manual_seed(6)
    assert seeds == [5]
