"""Scenes of digits are functions of seed, split and index, and annotated by what is visible."""

import numpy as np
import pytest

from ldae.data.open import open_source
from ldae.data.scenes import DigitScenes, scene_splits
from ldae.errors import InputError


def pixels(source, i: int) -> np.ndarray:
    return np.asarray(source.image(i))


def test_scenes_depend_on_seed_split_and_index_only():
    few, many = (DigitScenes("s", "train", count, seed=3) for count in (5, 50))
    for i in range(5):
        assert np.array_equal(pixels(few, i), pixels(many, i))
        assert few.annotations(i) == many.annotations(i)
    for other in (DigitScenes("s", "train", 5, seed=4), DigitScenes("s", "eval", 5, seed=3)):
        assert not any(np.array_equal(pixels(few, i), pixels(other, i)) for i in range(5))


def test_the_spec_has_count_and_seed():
    splits = scene_splits("digit-scenes:7:2")
    assert [len(splits[split]()) for split in ("train", "eval")] == [7, 500]
    for wrong in ("digit-scenes:0", "digit-scenes:", "digit-scenes:1:2:3"):
        with pytest.raises(InputError, match=r"is not digit-scenes\[:N\[:SEED\]\] with N >= 1"):
            scene_splits(wrong)


def test_masks_part_the_ink_and_boxes_lie_close_around_them():
    source = DigitScenes("s", "train", 40, seed=0)
    counts = set()
    for i in range(len(source)):
        found = source.target(i)
        assert np.array_equal(found.masks.sum(0), pixels(source, i).any(2))  # each pixel is of one
        counts.add(len(found.labels))
        for mask, (left, top, right, bottom) in zip(found.masks, found.boxes.astype(int)):
            inside = mask[top:bottom, left:right]
            assert inside.sum() == mask.sum() > 20
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any()
            assert inside[:, -1].any()
    assert {1, 2, 3, 4} <= counts <= {1, 2, 3, 4, 5, 6}


def test_every_class_is_in_both_splits():
    for opener in scene_splits("digit-scenes:100").values():
        source = opener()
        assert {label for i in range(100) for label in source.target(i).labels} == {*range(10)}


def test_a_pretraining_sees_the_images_alone():
    source, scenes = open_source("digit-scenes:9", "train"), scene_splits("digit-scenes:9")
    assert len(source) == 9 and source.classes is source.labels is None
    assert source.target(3) == -1
    assert np.array_equal(pixels(source, 3), pixels(scenes["train"](), 3))
