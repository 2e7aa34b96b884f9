import pytest
import torch

import ldae
from ldae.auto import facts
from ldae.mae.network import MAE
from ldae.method import LDAE
from ldae.runs.kinds import kind_with
from ldae.tree import flatten

CPU = torch.device("cpu")


@pytest.mark.parametrize("row, kind", [("l_dae", LDAE), ("mae", MAE)])
def test_parameters_are_the_matrices_of_the_blocks(row, kind):
    config = ldae.config(row, scale="demo")
    method = kind_with(config).functions().build(config)
    assert isinstance(method, kind)
    counted = sum(
        part.numel()
        for name, part in method.named_parameters()
        if part.ndim == 2 and "t_embed" not in name and (".attn." in name or ".mlp." in name)
    )
    assert facts.parameters_of(config) == counted


def test_sides_and_seconds_are_those_of_the_images(tiny, pictures):
    source, config = pictures(40), tiny()
    assert facts.median_side(source, config) == 16
    assert 0 < facts.decode_seconds(source, config) < 1


def test_decoding_is_timed_on_images_that_were_not_read_before(tiny, pictures, monkeypatch):
    """The memory of the system would give images a second time that a slow drive gives once."""
    source, config, read = pictures(600), tiny(), []
    image = source.image
    monkeypatch.setattr(source, "image", lambda i: read.append(i) or image(i))
    facts.median_side(source, config)
    before = set(read)
    read.clear()
    facts.decode_seconds(source, config)
    assert len(before) == 256 == len(set(read) - before)


def test_the_spectrum_is_that_of_the_patches(tiny, pictures):
    config = tiny()
    variances = facts.patch_variances(pictures(40), config)
    assert len(variances) == 3 * config.model.patch_size**2
    assert variances == sorted(variances, reverse=True) and variances[0] > 0


def test_a_step_is_measured_and_leaves_the_settings(tiny):
    config = tiny()
    before = flatten(config)
    few, many = (facts.measure_step(config, CPU, size) for size in (2, 16))
    assert few.images_per_second > 0 and flatten(config) == before
    assert 0 < many.bytes_an_image < few.bytes_an_image  # the weights are shared by more images


def test_a_rank_has_its_share_of_the_machine(monkeypatch):
    alone = facts.machine_of_rank(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = facts.machine_of_rank(CPU)
    assert (alone.ranks, shared.ranks) == (1, 4) and not alone.gpu
    assert shared.memory == alone.memory // 2 and shared.cores == max(alone.cores // 2, 1)
