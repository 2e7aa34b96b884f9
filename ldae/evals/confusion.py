"""The confusion matrix of label maps, and what is read off it."""

import torch

from ldae.data.label_maps import IGNORED


def confusion(labels: torch.Tensor, predicted: torch.Tensor, classes: int) -> torch.Tensor:
    """How many pixels of each class (row) were taken for each (column), int64 (classes, classes).

    Both are maps of classes of one shape; pixels that ``labels`` ignores are not counted.
    """
    known = labels != IGNORED
    pairs = labels[known].long() * classes + predicted[known]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def rates(matrix: torch.Tensor) -> dict:
    """Mean IoU, pixel accuracy and the IoU of each class, in percent, of a confusion matrix.

    The mean is over the classes of the labels or the predictions; of the others the IoU is None.
    """
    matrix = matrix.cpu().double()
    right = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - right
    there = union > 0
    each = 100 * right / union
    return {
        "miou": each[there].mean().item(),
        "pixel_accuracy": (100 * right.sum() / matrix.sum()).item(),
        "classes_counted": int(there.sum()),
        "iou": [
            value if counted else None for value, counted in zip(each.tolist(), there.tolist())
        ],
    }
