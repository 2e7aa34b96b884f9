"""Mean IoU is its definition, pixel by pixel."""

import pytest
import torch

from ldae.evals.segmentation import confusion_matrix, iou_metrics


def slow_rates(labels, predicted, classes: int) -> tuple[float, float, list]:
    """Compute IoU from sets of pixels."""
    pairs = zip(labels.ravel().tolist(), predicted.ravel().tolist())
    known = [(label, guess) for label, guess in pairs if label != 255]
    each = []
    for c in range(classes):
        true = {i for i, (label, _) in enumerate(known) if label == c}
        said = {i for i, (_, guess) in enumerate(known) if guess == c}
        each.append(100 * len(true & said) / len(true | said) if true | said else None)
    there = [value for value in each if value is not None]
    right = sum(label == guess for label, guess in known)
    return sum(there) / len(there), 100 * right / len(known), each


def maps(seed: int, labelled=(0, 1, 3, 255), said=(0, 1, 2, 3)):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(labelled), (2, 9, 7), generator=generator)
    guesses = torch.randint(len(said), (2, 9, 7), generator=generator)
    labels = torch.tensor(labelled, dtype=torch.uint8)[chosen]
    return labels, torch.where(guesses > 1, labels.long().clamp(max=5), torch.tensor(said)[guesses])


@pytest.mark.parametrize("classes", [6, 9])
def test_metrics_follow_their_definition(classes):
    labels, predicted = maps(0)
    found = iou_metrics(confusion_matrix(labels, predicted, classes))
    miou, accuracy, each = slow_rates(labels, predicted, classes)
    assert found["miou"] == pytest.approx(miou) and 20 < miou < 80
    assert found["pixel_accuracy"] == pytest.approx(accuracy)
    assert found["iou"] == [None if one is None else pytest.approx(one) for one in each]
    assert found["classes_counted"] == sum(one is not None for one in each) < classes


def test_confusion_matrices_of_parts_add_up():
    labels, predicted = maps(1)
    parts = sum(confusion_matrix(*pair, 6) for pair in zip(labels, predicted))
    assert torch.equal(parts, confusion_matrix(labels, predicted, 6)) and parts.dtype == torch.int64


def test_a_perfect_prediction_has_100_and_ignored_pixels_never_count():
    labels, _ = maps(2)
    wrong = torch.where(labels == 255, 1, labels.long())
    found = iou_metrics(confusion_matrix(labels, wrong, 4))
    assert (found["miou"], found["pixel_accuracy"], found["classes_counted"]) == (100, 100, 3)
    for filled in (0, 2, 3):  # 2 is in no label
        changed = torch.where(labels == 255, filled, labels.long())
        assert torch.equal(confusion_matrix(labels, changed, 4), confusion_matrix(labels, wrong, 4))
