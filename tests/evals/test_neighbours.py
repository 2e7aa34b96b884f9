"""The search is exact, and finds the same in any blocks."""

import sys

import pytest
import torch

from ldae import distributed
from ldae.evals.features import Features
from ldae.evals.neighbours import Bank, Nearest

CPU = torch.device("cpu")


def share(features: torch.Tensor) -> Features:
    return Features(features, torch.zeros(len(features), dtype=torch.int64))


def directions(count: int, seed: int, dim: int = 5) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def corners(count: int, seed: int) -> torch.Tensor:
    """Vectors of four entries +-1, whose cosines are exact and often equal."""
    return directions(count, seed, 4).sign()


def nearest(train: torch.Tensor, queries: torch.Tensor, k: int, **how) -> Nearest:
    blocks = list(Bank(share(train), CPU).nearest(share(queries), k, **how))
    return Nearest(*(torch.cat(parts) for parts in zip(*blocks)))


@pytest.mark.parametrize("k", [1, 7, 100])
def test_neighbours_are_exact_in_any_chunk(search, k):
    train, queries = directions(100, 0), directions(23, 1)
    unit = [rows / rows.norm(dim=1, keepdim=True) for rows in (train, queries)]
    wanted = (unit[1] @ unit[0].T).sort(dim=1, descending=True)
    for chunk in (1, 10, 1000):
        found = nearest(train, queries, k, chunk=chunk)
        assert torch.equal(found.queries, torch.arange(23))
        assert torch.equal(found.indices, wanted.indices[:, :k])
        torch.testing.assert_close(found.similarities, wanted.values[:, :k])


@pytest.mark.parametrize("k", [1, 5, 24, 150])
def test_the_first_of_equally_similar_images_are_found(search, k):
    train, queries = corners(200, 0), corners(16, 1)
    for others in (False, True):
        found = nearest(train, train if others else queries, k, others=others)
        cosines = ((train if others else queries) @ train.T / 4).tolist()
        for row, numbers in enumerate(found.indices.tolist()):
            order = sorted(range(200), key=lambda i: -cosines[row][i])
            assert numbers == [i for i in order if not others or i != row][:k]


def test_a_bank_in_a_file_finds_the_same(search, monkeypatch):
    train, queries = directions(100, 0), directions(23, 1)
    wanted = nearest(train, queries, 7)
    monkeypatch.setattr("ldae.evals.features.MAX_BYTES_IN_MEMORY", 0)
    found = nearest(train, queries, 7)
    assert torch.equal(found.indices, wanted.indices)
    assert torch.equal(found.similarities, wanted.similarities)


def test_macos_searches_without_faiss(monkeypatch):
    train, queries = directions(100, 0), directions(23, 1)
    wanted = nearest(train, queries, 7)
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setitem(sys.modules, "faiss", None)  # to import it raises ImportError
    assert torch.equal(nearest(train, queries, 7).indices, wanted.indices)


def test_only_chosen_images_are_found(search):
    train, queries = directions(100, 0), directions(23, 1)
    chosen = torch.arange(100) % 3 == 1
    blocks = Bank(share(train), CPU, chosen).nearest(share(queries), 5)
    found = torch.cat([block.indices for block in blocks])
    assert torch.equal(found, nearest(train[chosen], queries, 5).indices * 3 + 1)


def test_ranks_with_unequal_shares_find_the_same_as_one_rank(on_ranks):
    """One rank has 2 images for 10 neighbours. Cosines are negative: padding would come first."""
    train, queries = directions(40, 0).abs(), -directions(9, 1).abs()
    chosen = (torch.arange(40) % 2 == 0) | (torch.arange(40) < 4)  # 20 even numbers, and 1 and 3
    blocks = Bank(share(train), CPU, chosen).nearest(share(queries), 10)
    wanted = Nearest(*(torch.cat(parts) for parts in zip(*blocks)))

    def work():
        with distributed.process_group(CPU):
            mine = slice(distributed.rank(), None, 2)
            bank = Bank(share(train[mine]), CPU, chosen)
            for chunk in (2, 100):
                found = list(bank.nearest(share(queries[mine]), 10, chunk=chunk))
                indices, similarities = (
                    torch.cat([getattr(block, name) for block in found])
                    for name in ("indices", "similarities")
                )
                assert torch.equal(indices, wanted.indices[mine])
                torch.testing.assert_close(similarities, wanted.similarities[mine])

    assert on_ranks(work) == ["", ""]
