"""Average precision and recall are their definitions, over the whole order."""

import json

import pytest

from ldae.commands.retrieve import RetrievalProtocol, retrieval, retrieve
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.features import Features

SETUP = Setup(in_chans=1, workers=0, device="cpu")


def slow_retrieval(train: Features, queries: Features, ks: tuple, others: bool) -> dict:
    """Rank for one query and one image at a time."""
    precisions, found = [], {k: 0 for k in ks}
    for number in range(len(queries.labels)):
        query = queries.features[number].double()
        cosine = [float(query @ row / query.norm() / row.norm()) for row in train.features.double()]
        order = sorted(range(len(cosine)), key=lambda i: -cosine[i])
        right = [
            train.labels[i] == queries.labels[number] for i in order if not others or i != number
        ]
        hits, total = 0, 0.0
        for position, hit in enumerate(right, 1):
            if hit:
                hits += 1
                total += hits / position
        precisions.append(total / hits)
        for k in ks:
            found[k] += any(right[:k])
    count = len(precisions)
    recalls = {f"recall_at_{k}": 100 * found[k] / count for k in ks}
    return {"mean_average_precision": 100 * sum(precisions) / count} | recalls


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("pairs", [1, 1000, 2**21])
def test_retrieval_follows_its_definition(cloud, others, pairs, monkeypatch):
    monkeypatch.setattr("ldae.commands.retrieve.PAIRS_AT_ONCE", pairs)
    monkeypatch.setattr("ldae.evals.neighbours.PAIRS_AT_ONCE", pairs)
    evaluation = cloud(40, 1)
    train = evaluation if others else cloud(90, 0)
    found = retrieval(train, evaluation, RetrievalProtocol(k=(1, 3), leave_one_out=others))
    wanted = slow_retrieval(train, evaluation, (1, 3), others)
    assert found == pytest.approx(wanted)
    assert found["recall_at_1"] < found["recall_at_3"] < 100  # so that the test can fail


def test_the_command_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record = retrieve("pixels:8", "digits", setup=SETUP)
    written = tmp_path / "evals" / "pixels-8" / "retrieve-digits-in_chans=1" / "results.json"
    assert json.loads(written.read_text()) == json.loads(json.dumps(record))
    printed = capsys.readouterr().out
    assert "mean_average_precision" in printed and "recall_at_10" in printed
    assert 50 < record["results"]["mean_average_precision"] < record["results"]["recall_at_1"]
    protocol = RetrievalProtocol(k=(1,), leave_one_out=True)
    within = retrieve("pixels:8", "digits", protocol=protocol, setup=SETUP)
    assert within["data"]["train_images"] == within["data"]["eval_images"] == 449


def test_queries_with_nothing_to_find_are_refused_before_extraction(pictures, monkeypatch):
    monkeypatch.setattr("ldae.evals.evaluation.extract_share", None)
    train, evaluation = pictures(6, classes=2), pictures(4, "eval", classes=3)
    monkeypatch.setattr("ldae.evals.open.open_splits", lambda *given: (train, evaluation))
    with pytest.raises(InputError, match=r"class 'class-2' of pictures has no image .* \(train\)"):
        retrieve("pixels:8", "pictures", protocol=RetrievalProtocol(k=(1,)), setup=SETUP)
    with pytest.raises(InputError, match="class 'class-1' of pictures has no image"):
        protocol = RetrievalProtocol(k=(1,), leave_one_out=True)
        retrieve("pixels:8", "pictures", protocol=protocol, setup=SETUP)
    with pytest.raises(InputError, match="k = 7 is more neighbours than images: there are 6"):
        retrieve("pixels:8", "pictures", protocol=RetrievalProtocol(k=(7,)), setup=SETUP)


def test_wrong_protocols_are_refused():
    for wrong in ({"k": ()}, {"k": (0,)}):
        with pytest.raises(InputError, match="k must"):
            RetrievalProtocol(**wrong)
