import math

import pytest
import torch

from ldae import draws


@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = draws.philox_rounds(tuple(torch.tensor([word]) for word in counter), tuple(key))
    assert [int(word) for word in words] == answer


def test_noise_is_normal():
    normals = draws.normal(3, torch.arange(2000), (10, 10)).double()
    n = normals.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((normals**power).mean() - expected) < 5 * math.sqrt(variance / n)
    flat = normals.flatten(1)
    assert abs((flat[:, :-1] * flat[:, 1:]).mean()) < 5 / math.sqrt(n)
    assert abs((flat[:-1] * flat[1:]).mean()) < 5 / math.sqrt(n)


def test_noise_depends_only_on_the_seed_and_the_position():
    batch = draws.normal(0, torch.arange(100), (7, 3))
    other_batch = draws.normal(0, torch.tensor([42, 7]), (7, 3))
    assert torch.equal(batch[[42, 7]], other_batch)
    assert not torch.equal(draws.normal(1, torch.tensor([42, 7]), (7, 3)), other_batch)
    far = torch.tensor([42 + 2**32])  # the high word counts: ImageNet x 1600 epochs is 2 billion
    assert not torch.equal(draws.normal(0, far, (7, 3))[0], other_batch[0])


def test_timesteps_are_uniform_and_labels_are_dropped_at_the_given_rate():
    positions = torch.arange(200_000)
    t = draws.timesteps(0, positions, 10)
    counts = torch.bincount(t, minlength=10).double()
    assert ((counts - 20_000).abs() < 5 * math.sqrt(20_000)).all() and len(counts) == 10
    share = draws.dropped_labels(0, positions, 0.1).double().mean()
    assert abs(share - 0.1) < 5 * math.sqrt(0.09 / 200_000)
    assert (draws.timesteps(0, positions[:9], 1) == 0).all()


def test_a_share_of_the_images_is_at_the_lowest_level_and_the_others_stay_where_they_were():
    positions = torch.arange(200_000)
    t, uniform = draws.timesteps(0, positions, 10, 0.3), draws.timesteps(0, positions, 10)
    moved = t != uniform
    assert (t[moved] == 0).all()
    assert abs(moved.double().mean() - 0.27) < 5 * math.sqrt(0.2 / 200_000)
    counts = torch.bincount(uniform[moved], minlength=10).double()[1:]
    assert ((counts - 6_000).abs() < 5 * math.sqrt(6_000)).all()  # whatever the level was
    assert (draws.timesteps(0, positions[:9], 10, 1.0) == 0).all()


def test_random_labels_are_uniform_independent_of_timesteps_and_differ_by_seed():
    positions = torch.arange(200_000)
    labels, t = draws.labels(0, positions, 10), draws.timesteps(0, positions, 10)
    counts = torch.bincount(10 * labels + t, minlength=100).double()
    assert ((counts - 2_000).abs() < 5 * math.sqrt(2_000)).all() and len(counts) == 100
    assert (draws.labels(1, positions, 10) == labels).double().mean() < 0.11


def test_the_words_of_an_image_are_philox_of_block_position_and_stream():
    """A run that goes on with another version of ldae draws the noise that it would have drawn."""
    low, high, stream, key = 5, 7, 4, (3, 9)
    seed, position = key[0] + key[1] * 2**32, torch.tensor([low + high * 2**32])
    blocks = [
        draws.philox_rounds(tuple(map(torch.tensor, (block, low, high, stream))), key)
        for block in range(2)
    ]
    words = draws.random_words(seed, position, 7, stream)
    assert words[0].tolist() == [int(word) for block in blocks for word in block][:7]


def test_noise_is_finite_whatever_the_random_words(monkeypatch):
    for word in (0, 2**32 - 1):
        words = torch.full((1, 1, 4), word)
        monkeypatch.setattr(draws, "_philox", lambda *_, words=words: words)
        assert draws.normal(0, torch.tensor([0]), (4,)).isfinite().all()
