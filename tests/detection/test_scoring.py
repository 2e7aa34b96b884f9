"""Average precision of detections that are right, wrong, missing and doubled."""

import json
import sys

import numpy as np
import pytest

from ldae.data.instances import encode
from ldae.data.scenes import DigitScenes
from ldae.detection.scoring import average_precision, check_installed
from ldae.errors import InputError

SCENES = DigitScenes("s", "eval", 20, seed=0)
DATASET = SCENES.dataset()


def perfect() -> list[dict]:
    kept = ("image_id", "category_id", "bbox", "segmentation")
    return [{name: part[name] for name in kept} | {"score": 1.0} for part in DATASET["annotations"]]


def test_perfect_detections_score_one(capsys):
    before = json.dumps(DATASET)
    scores = average_precision(DATASET, perfect(), masks=True)
    for kind in ("box", "mask"):
        for name in ("ap", "ap50", "ap75", "ap_small"):
            assert scores[f"{kind}_{name}"] == pytest.approx(100), (kind, name)
        assert scores[f"{kind}_ap_medium"] is scores[f"{kind}_ap_large"] is None  # there are none
    assert capsys.readouterr().out == "" and json.dumps(DATASET) == before


def test_no_detection_scores_zero():
    scores = average_precision(DATASET, [], masks=True)
    assert scores["box_ap"] == scores["mask_ap50"] == 0 and scores["box_ap_large"] is None


def test_boxes_alone_are_graded_without_masks():
    found = [{k: v for k, v in part.items() if k != "segmentation"} for part in perfect()]
    scores = average_precision(DATASET, found, masks=False)
    assert scores["box_ap"] == pytest.approx(100) and not any("mask" in name for name in scores)


def test_boxes_and_masks_are_graded_apart():
    found = perfect()
    for part in found:
        part["segmentation"] = encode(np.zeros((64, 64), bool))
    scores = average_precision(DATASET, found, masks=True)
    assert scores["box_ap"] == pytest.approx(100) and scores["mask_ap"] == 0


def test_the_size_of_a_wrong_mask_is_its_own_and_not_that_of_its_box():
    """Wrong detections of another size do not count."""
    wrong = {name: perfect()[0][name] for name in ("image_id", "category_id")}
    pixel = encode(np.eye(1, 64 * 64, dtype=bool).reshape(64, 64))
    wrong |= {"bbox": [0, 0, 60, 60], "segmentation": pixel, "score": 2.0}
    scores = average_precision(DATASET, [*perfect(), wrong], masks=True)
    assert scores["box_ap_small"] == pytest.approx(100) and scores["mask_ap_small"] < 99


def test_a_shift_costs_the_strict_thresholds_only():
    found = perfect()
    for part in found:
        part["bbox"] = [part["bbox"][0] + 0.15 * part["bbox"][2], *part["bbox"][1:]]  # IoU 0.74
    scores = average_precision(DATASET, found, masks=True)
    assert scores["box_ap50"] == pytest.approx(100) and scores["box_ap75"] == 0
    assert scores["box_ap"] == pytest.approx(50)  # 0.5 to 0.7 of the ten thresholds
    assert scores["mask_ap"] == pytest.approx(100)


def test_a_wrong_class_is_wrong():
    found = perfect()
    for part in found:
        part["category_id"] = part["category_id"] % 10 + 1
    assert average_precision(DATASET, found, masks=False)["box_ap50"] < 20


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(InputError, match=r"needs pycocotools: pip install 'ldae\[detection\]'$"):
        check_installed()
