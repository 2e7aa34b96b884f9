"""The fits are scikit-learn's: the same loss, subset by subset, whatever the blocks."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as ScikitLearn

from ldae.evals import logistic
from ldae.evals.features import Features
from ldae.evals.logistic import LogisticRegression

CPU = torch.device("cpu")
GRID = (1e-6, 1e-2, 1.0, 30.0)


def compare_with_scikit_learn(train: Features, subsets: list[torch.Tensor]) -> None:
    fits = LogisticRegression(train, sum(subsets) > 0, CPU).fit(subsets, GRID, 1000, 1e-12)
    for subset, fitted in zip(subsets, fits, strict=True):
        assert fitted.converged.all()
        scores = fitted.classifiers(train.features)
        for C, found in zip(GRID, scores.unbind(1), strict=True):
            model = ScikitLearn(C=C, solver="newton-cholesky", tol=1e-12)
            model.fit(np.float64(train.features[subset]), train.labels[subset].numpy())
            wanted = torch.from_numpy(model.predict_proba(np.float64(train.features)))
            known = torch.from_numpy(model.classes_)
            others = [c for c in range(found.shape[1]) if c not in known]
            assert found[:, others].isnan().all()
            torch.testing.assert_close(found[:, known].softmax(1), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("classes", [2, 5])
def test_scores_are_scikit_learns_for_every_subset_and_c(blocks, classes, cloud, monkeypatch):
    """A subset misses a class, two classes have a single vector, and 60 images are one subset."""
    if blocks:
        monkeypatch.setattr(logistic, "_ROWS_AT_ONCE", {"cpu": 7})
        monkeypatch.setattr(logistic, "_LOGITS_AT_ONCE", {"cpu": 7 * 3 * classes})
    train = cloud(90, 0, classes)
    every = torch.arange(90)
    compare_with_scikit_learn(
        train, [every < 60, (every > 20) & (train.labels != 3), every % 3 == 0]
    )


def test_fewer_images_than_features_and_features_far_from_zero(cloud):
    """Axes in which the images do not vary are left out."""
    train = cloud(40, 0, dim=30)
    train = train._replace(features=100 + train.features)
    few = torch.arange(40) < 20
    found = LogisticRegression(train, few, CPU)
    assert found.rows.shape == (20, 20)  # 19 axes and the intercept
    compare_with_scikit_learn(train, [few])


def test_a_feature_that_never_varies_changes_nothing(cloud):
    train = cloud(60, 0)
    more = torch.cat([train.features, torch.full((60, 2), 7.0)], 1)
    compare_with_scikit_learn(train._replace(features=more), [torch.ones(60, dtype=torch.bool)])
