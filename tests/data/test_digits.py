import os
from pathlib import Path

import numpy as np
import pytest
from doors import png

from ldae.data.coco import instance_splits
from ldae.data.digits import BUILT_IN, Digits, ScatteredDigits
from ldae.data.open import open_source, open_splits, source_splits
from ldae.data.scenes import SCENES


def pixels(source, i: int) -> np.ndarray:
    return np.asarray(source.image(i))


def test_scattered_digits_depend_on_seed_split_and_index_only():
    few, many = (ScatteredDigits("s", "train", count, seed=3) for count in (20, 500))
    assert all(np.array_equal(pixels(few, i), pixels(many, i)) for i in range(20))
    assert np.array_equal(few.labels, many.labels[:20])
    others = [ScatteredDigits("s", "train", 20, seed=4), ScatteredDigits("s", "eval", 20, seed=3)]
    for other in others:
        assert not any(np.array_equal(pixels(few, i), pixels(other, i)) for i in range(20))


def test_the_spec_of_scattered_digits_has_count_and_seed():
    assert len(open_source("scattered-digits", "train")) == 20_000
    assert len(open_source("scattered-digits:30", "eval")) == 5_000
    one, same, other = (open_source(f"scattered-digits:30{s}", "train") for s in ("", ":0", ":1"))
    assert len(one) == 30
    assert np.array_equal(one.labels, same.labels) and not np.array_equal(one.labels, other.labels)


@pytest.mark.parametrize(
    ("name", "opened"),
    [*((name, source_splits) for name in (*BUILT_IN, SCENES)), (SCENES, instance_splits)],
)
def test_a_folder_named_like_a_built_in_set_is_announced(
    name, opened, tmp_path, monkeypatch, caplog
):
    """The built-in set is opened all the same, and the folder by the name in the warning."""
    monkeypatch.chdir(tmp_path)
    opened(name)
    assert not caplog.messages
    Path(name).mkdir()
    (tmp_path / name / "1.png").write_bytes(png(0))
    assert opened(name).keys() == {"train", "eval"}
    (said,) = caplog.messages
    folder = said.split()[-1]
    assert said.startswith(f"{name} is the built-in data set") and os.path.samefile(folder, name)
    assert len(open_source(folder, "train")) == 1 and len(caplog.messages) == 1


def test_a_digit_of_varying_place_lies_on_a_black_canvas():
    source = ScatteredDigits("s", "train", 200, seed=0)
    boxes = [source.image(i).getbbox() for i in range(200)]
    assert {source.image(i).size for i in range(200)} == {(32, 32)}
    assert max(bottom - top for _, top, _, bottom in boxes) <= 24
    assert min(left for left, *_ in boxes) <= 1 and max(right for _, _, right, _ in boxes) >= 31


def test_no_digit_is_in_both_splits():
    train, evaluation = Digits("digits", "train"), Digits("digits", "eval")
    assert (len(train), len(evaluation)) == (1348, 449)
    seen = {pixels(train, i).tobytes() for i in range(len(train))}
    assert not any(pixels(evaluation, i).tobytes() in seen for i in range(len(evaluation)))


def test_every_class_is_in_both_splits():
    for spec in ("digits", "scattered-digits:1000"):
        train, evaluation = open_splits(spec, None)
        assert set(train.labels) == set(evaluation.labels) == set(range(10))
        assert train.classes == evaluation.classes == list("0123456789")


def test_labels_match_the_nearest_plain_digit():
    def cropped(image) -> np.ndarray:
        grey = image.convert("L")
        return np.asarray(grey.crop(grey.getbbox()).resize((8, 8)), float).ravel()

    train, digits = ScatteredDigits("s", "train", 300, seed=0), Digits("digits", "train")
    scattered = np.array([cropped(train.image(i)) for i in range(300)])
    plain = np.array([cropped(digits.image(i)) for i in range(len(digits))])
    distance = ((scattered[:, None] - plain[None]) ** 2).sum(-1)
    assert (digits.labels[distance.argmin(1)] == train.labels).mean() > 0.9


def test_label_maps_are_the_digit_where_the_canvas_is_not_black():
    source = ScatteredDigits("s", "train", 50, seed=0)
    for i in range(50):
        ink = pixels(source, i).any(2)
        assert np.array_equal(source.label_map(i), np.where(ink, 1 + source.labels[i], 0))
        assert source.label_map(i).dtype == np.uint8 and 30 < ink.sum() < 600
