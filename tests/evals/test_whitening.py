"""A search in whitened features equals its definition, and finds what a nuisance hides."""

import numpy as np
import pytest
import torch

from ldae import distributed
from ldae.commands.knn import knn
from ldae.commands.retrieve import RetrievalProtocol, retrieval
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.features import Features
from ldae.evals.neighbours import KNNProtocol, knn_accuracy

CPU = torch.device("cpu")
WHITEN = {"whiten": True, "whiten_shrinkage": 0.1}


def slowly_whitened(searched: Features, shares: tuple[Features, ...]) -> list[Features]:
    """Whiten by numpy, one feature at a time."""
    rows = searched.features.double().numpy()
    covariance = np.cov(rows.T, bias=True)
    shrunk = 0.9 * covariance + 0.1 * np.trace(covariance) / len(covariance) * np.eye(rows.shape[1])
    values, vectors = np.linalg.eigh(shrunk)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    return [
        share._replace(
            features=torch.tensor(
                np.array([root @ (row - rows.mean(0)) for row in share.features.double().numpy()])
            ).float()
        )
        for share in shares
    ]


def hidden(count: int, seed: int) -> Features:
    """Classes in three directions, beside an offset and one direction of large spread."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    features = 0.1 * torch.randn(count, 5, generator=generator)
    features[:, 0] += 1000
    features[:, 1] = 300 * torch.randn(count, generator=generator)
    features[:, 2:] += torch.eye(4, 3)[labels]
    return Features(features, labels)


@pytest.mark.parametrize("others", [False, True])
def test_knn_whitens_as_a_slow_reference(cloud, others):
    train, test = cloud(150, 0), cloud(150, 0) if others else cloud(60, 1)
    ks = {"k": (1, 9), "leave_one_out": others}
    found = knn_accuracy(train, test, KNNProtocol(**ks, **WHITEN))
    assert found == knn_accuracy(*slowly_whitened(train, (train, test)), KNNProtocol(**ks))
    assert found != knn_accuracy(train, test, KNNProtocol(**ks))


@pytest.mark.parametrize("others", [False, True])
def test_retrieval_whitens_as_a_slow_reference(cloud, others):
    test = cloud(60, 1)
    train = test if others else cloud(90, 0)
    ks = {"k": (1, 3), "leave_one_out": others}
    found = retrieval(train, test, RetrievalProtocol(**ks, **WHITEN))
    wanted = retrieval(*slowly_whitened(train, (train, test)), RetrievalProtocol(**ks))
    assert found == pytest.approx(wanted)
    assert found != retrieval(train, test, RetrievalProtocol(**ks))


def test_whitening_finds_classes_behind_a_nuisance_direction():
    train, test = hidden(400, 0), hidden(200, 1)
    exactly = {"whiten": True, "whiten_shrinkage": 0.0}
    plain = knn_accuracy(train, test, KNNProtocol(k=(10,)))
    whitened = knn_accuracy(train, test, KNNProtocol(k=(10,), **exactly))
    assert plain["top1_k10"] < 60 and whitened["top1_k10"] > 95


def test_covariance_is_of_all_train_images_when_few_are_searched(cloud):
    train, test = cloud(150, 0), cloud(60, 1)
    chosen = torch.arange(150) % 5 == 0
    found = knn_accuracy(train, test, KNNProtocol(k=(3,), **WHITEN), chosen=chosen)
    whitened = slowly_whitened(train, (train, test))
    assert found == knn_accuracy(*whitened, KNNProtocol(k=(3,)), chosen=chosen)


def test_ranks_whiten_as_one_rank(cloud, on_ranks):
    train, test = cloud(151, 0), cloud(61, 1)
    protocol = KNNProtocol(k=(1, 9), **WHITEN)
    alone = knn_accuracy(train, test, protocol)

    def work():
        with distributed.process_group(CPU):
            mine = slice(distributed.rank(), None, 2)
            shares = [Features(*(part[mine] for part in share[:2])) for share in (train, test)]
            assert knn_accuracy(*shares, protocol) == alone

    assert on_ranks(work) == ["", ""]


def test_whitening_is_recorded_and_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup = Setup(in_chans=1, workers=0, device="cpu")
    protocol = KNNProtocol(k=(5,), shots=(2,), draws=1, **WHITEN)
    record = knn("pixels:8", "digits", protocol=protocol, setup=setup)
    assert record["protocol"]["whiten"] and record["protocol"]["whiten_shrinkage"] == 0.1
    name = "knn-digits-shots=2-draws=1-whiten=True-whiten_shrinkage=0.1-k=5-in_chans=1"
    assert [path.name for path in tmp_path.glob("evals/pixels-8/*")] == [name]


def test_wrong_shrinkage_is_refused():
    for kind in (KNNProtocol, RetrievalProtocol):
        with pytest.raises(InputError, match="--whiten-shrinkage needs --whiten"):
            kind(whiten_shrinkage=0.5)
        with pytest.raises(InputError, match="whiten_shrinkage must be .* at most 1, not 2"):
            kind(whiten=True, whiten_shrinkage=2.0)
