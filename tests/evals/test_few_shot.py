"""A draw depends on the names of images, and on nothing else."""

import pytest
import torch

from ldae.commands.knn import knn
from ldae.commands.logreg import LogregProtocol, logreg
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.neighbours import KNNProtocol
from ldae.evals.subsets import FewShotProtocol, check_draws, draw_images, fold_splits, grade_draws

NAMES = [f"{i}.jpg" for i in range(300)]
LABELS = torch.arange(300) % 4


def test_a_draw_has_the_shots_of_each_class_in_any_order():
    chosen = draw_images(NAMES, LABELS, 6, 0, 0)
    assert torch.bincount(LABELS[chosen]).tolist() == [6, 6, 6, 6]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    shuffled = draw_images([NAMES[i] for i in order], LABELS[order], 6, 0, 0)
    assert torch.equal(shuffled, chosen[order])


def test_draws_differ_and_contain_draws_of_fewer_shots():
    draws = [draw_images(NAMES, LABELS, 6, *key) for key in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(draw.tolist()) for draw in draws}) == 3
    assert not (draw_images(NAMES, LABELS, 2, 0, 0) & ~draws[0]).any()


def test_a_draw_never_changes():
    found = draw_images([*NAMES[:39], "\udcff.jpg"], LABELS[:40], 2, 1, 0)
    assert found.nonzero()[:, 0].tolist() == [5, 11, 18, 24, 29, 32, 35, 38]


@pytest.mark.parametrize(("shots", "folds"), [(1, 0), (2, 2), (5, 5), (13, 5)])
def test_folds_are_stratified_and_depend_on_names_only(shots, folds):
    chosen = draw_images(NAMES, LABELS, shots, 0, 0)
    splits = fold_splits(NAMES, LABELS, chosen, 5)
    assert len(splits) == folds
    for fitted, held in splits:
        assert torch.equal(fitted | held, chosen) and not (fitted & held).any()
        assert set(torch.bincount(LABELS[held]).tolist()) <= {shots // folds, -(-shots // folds)}
    if folds:
        assert torch.equal(sum(held.int() for _, held in splits), chosen.int())
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    shuffled = fold_splits([NAMES[i] for i in order], LABELS[order], chosen[order], 5)
    for (_, held), (_, moved) in zip(splits, shuffled, strict=True):
        assert torch.equal(held[order], moved)


def test_one_draw_has_no_spread():
    found = grade_draws(FewShotProtocol((2,), 1), NAMES, LABELS, lambda chosen: {"n": chosen.sum()})
    assert (found["n_2shot"], found["n_2shot_std"]) == (8, 0)


def test_class_with_too_few_images_is_named():
    with pytest.raises(InputError, match="class 'b' has 2 train images, fewer than 3 shots"):
        check_draws(FewShotProtocol((1, 3)), torch.tensor([0, 0, 0, 1, 1, 3, 3, 3]), [*"abcd"])


@pytest.mark.parametrize(
    ("grade", "protocol", "settings"),
    [(knn, KNNProtocol, {"k": (5,)}), (logreg, LogregProtocol, {"C": (1e-3, 1.0)})],
)
def test_draws_alone_are_those_beside_all_labels(grade, protocol, settings, tmp_path):
    settings |= {"shots": (5,), "draws": 2}
    both, alone = (
        grade(
            "pixels:4",
            "digits",
            protocol=protocol(only_shots=only_shots, **settings),
            setup=Setup(device="cpu", out=tmp_path),
        )["results"]
        for only_shots in (False, True)
    )
    assert alone == {name: value for name, value in both.items() if name in alone}
    assert alone["draws"] and all("_5shot" in name for name in alone.keys() - {"draws"})
    assert {name for name in both if name.startswith("top") and "shot" not in name}


def test_draws_alone_need_shots_and_have_no_predictions(monkeypatch):
    with pytest.raises(InputError, match="^--only-shots needs --shots$"):
        KNNProtocol(only_shots=True)
    monkeypatch.setattr("ldae.evals.evaluation.extract_share", None)
    protocol = LogregProtocol(only_shots=True, shots=(5,))
    with pytest.raises(InputError, match="leave out --predictions or --only-shots"):
        logreg("pixels:4", "digits", protocol=protocol, predictions=True)


@pytest.mark.parametrize(
    ("protocol", "headline"),
    [
        (KNNProtocol(), "top1_k20"),
        (KNNProtocol(k=(2, 20, 200)), "top1_k20"),
        (KNNProtocol(k=(200, 5)), "top1_k200"),
        (KNNProtocol(k=(2, 20), shots=(1, 5), only_shots=True), "top1_k20_1shot"),
        (KNNProtocol(k=(5,), shots=(5,)), "top1_k5"),
        (LogregProtocol(shots=(5,), only_shots=True), "top1_5shot"),
    ],
)
def test_a_table_shows_k_20_if_it_is_graded_and_draws_where_they_are_alone(protocol, headline):
    assert protocol.headline == headline and headline in protocol.headlines
