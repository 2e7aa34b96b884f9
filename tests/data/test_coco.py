"""Folders in COCO's layout are read as they were written; wrong ones are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldae.data.coco import open_instance_splits
from ldae.data.image import BadImage
from ldae.data.scenes import DigitScenes
from ldae.errors import InputError

SCENES = DigitScenes("s", "train", 6, seed=0)
LAYOUTS = ["{split}2017", "images/{split}2017", "images", ""]


@pytest.fixture
def write(tmp_path):
    """write(places, change): a folder of scenes; ``change`` edits the content of its files."""

    def make(places: str = LAYOUTS[0], change=lambda content: None) -> Path:
        root = tmp_path / "coco"
        for split in ("train", "val"):
            folder = root / places.format(split=split)
            folder.mkdir(parents=True, exist_ok=True)
            content = json.loads(json.dumps(SCENES.dataset()))
            for i, image in enumerate(content["images"]):
                image["file_name"] = f"{split}-{i}.png"
                SCENES.image(i).save(folder / image["file_name"])
            change(content)
            file = root / "annotations" / f"instances_{split}2017.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content))
        return root

    return make


@pytest.mark.parametrize("places", LAYOUTS)
def test_images_boxes_classes_and_masks_come_back(places, write):
    train, evaluation = open_instance_splits(str(write(places)), None)
    assert (train.name(2), evaluation.name(2)) == ("train-2.png", "val-2.png")
    for source in (train, evaluation):
        assert source.classes == SCENES.classes and source.has_masks
        assert len(source) == len(SCENES)
        for i in range(len(SCENES)):
            found, written = source.target(i), SCENES.target(i)
            assert np.array_equal(np.asarray(source.image(i)), np.asarray(SCENES.image(i)))
            assert found.size == written.size == (64, 64)
            for name in ("boxes", "labels", "masks"):
                assert np.array_equal(getattr(found, name), getattr(written, name)), name
        assert source.dataset()["annotations"] == SCENES.dataset()["annotations"]


def only(annotation: dict):
    """Return a change that leaves one annotation, changed by ``annotation``."""

    def change(content: dict) -> None:
        content["annotations"] = [content["annotations"][0] | annotation]

    return change


RECTANGLE = {"bbox": [2, 3, 4, 5], "segmentation": [[2, 3, 6, 3, 6, 8, 2, 8]]}
RUNS = [64 * 2 + 3, 5, *[59, 5] * 3]  # columns of five pixels


@pytest.mark.parametrize(
    "segmentation",
    [
        RECTANGLE["segmentation"],
        [[2, 3, 6, 3, 6, 5, 2, 5], [2, 5, 6, 5, 6, 8, 2, 8]],
        {"size": [64, 64], "counts": [*RUNS, 64 * 64 - sum(RUNS)]},
    ],
)
def test_polygons_and_run_lengths_are_filled(segmentation, write):
    source, _ = open_instance_splits(
        str(write(change=only(RECTANGLE | {"segmentation": segmentation}))), None
    )
    (mask,) = source.target(0).masks
    wanted = np.zeros((64, 64), bool)
    wanted[3:8, 2:6] = True
    assert np.array_equal(mask, wanted)


def test_images_without_an_instance_are_evaluated_and_not_trained_on(write):
    train, evaluation = open_instance_splits(str(write(change=only(RECTANGLE))), None)
    assert (len(train), len(evaluation)) == (1, 6)
    assert evaluation.target(3).boxes.shape == (0, 4)


def test_crowds_are_graded_and_not_trained_on(write):
    def change(content: dict) -> None:
        content["annotations"][0]["iscrowd"] = 1

    source, _ = open_instance_splits(str(write(change=change)), None)
    assert len(source.target(0).labels) == len(SCENES.target(0).labels) - 1
    assert [part["iscrowd"] for part in source.dataset()["annotations"]][:2] == [1, 0]


def test_classes_are_matched_by_name(write, tmp_path):
    def change(content: dict) -> None:
        for part in (*content["categories"], *content["annotations"]):
            key = "id" if "name" in part else "category_id"
            part[key] = 100 - part[key]

    second = write(change=change).rename(tmp_path / "other")
    train, evaluation = open_instance_splits(str(write()), str(second))
    assert evaluation.classes == train.classes
    assert evaluation.categories["0"] == 99
    assert np.array_equal(train.target(0).labels, evaluation.target(0).labels)


def test_a_changed_annotation_changes_the_fingerprint(write):
    file = write(change=only(RECTANGLE)) / "annotations" / "instances_val2017.json"
    text = file.read_text()
    prints = []
    for content in (text, text.replace('"bbox": [2', '"bbox": [1'), text):
        file.write_text(content)
        prints.append(open_instance_splits(str(file.parent.parent), None)[1].fingerprint())
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda c: c.pop("images"), "is not in COCO's format: there is no 'images'"),
        (lambda c: c["images"][0].update(width="x"), "'x' is no whole number"),
        (lambda c: c["images"][0].update(height=0), "has 64 x 0 pixels"),
        (lambda c: c["images"][0].update(file_name="../x.png"), "leads outside"),
        (lambda c: c["images"][0].update(file_name="x.png"), "image x.png of .* is in none of"),
        (lambda c: c["images"][0].update(file_name="x" * 300), "the image x* of .* is in none of"),
        (lambda c: c["images"][0].update(id=1), "two images have one id"),
        (lambda c: c["categories"][0].update(name="1"), "two categories one name"),
        (only({"bbox": [1, 2, 3]}), "the bbox of annotation 1 is .*, not four numbers"),
        (only({"bbox": [1, 2, 3, float("nan")]}), "not four numbers"),
        (only({"category_id": 77}), "annotation 1 is of no category"),
        (only({"image_id": 77}), "annotation 1 is of no image"),
        (lambda c: c["annotations"].clear(), r"\(train\) has no instance"),
        (only({"iscrowd": 1}), r"\(train\) has no instance"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(change, sentence, write):
    with pytest.raises(InputError, match=sentence) as caught:
        open_instance_splits(str(write(change=change)), None)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, 1e9]],
        [["a", "b", "c", "d", "e", "f"]],
        {"size": [64, 64], "counts": [5, 5]},
        {"size": [32, 64], "counts": "x"},
        {"size": [64, 64]},
        "polygon",
    ],
)
def test_a_wrong_segmentation_names_its_image(segmentation, write):
    root = write(change=only({"segmentation": segmentation}))
    source, evaluation = open_instance_splits(str(root), None)
    for read in (lambda: source.target(0), evaluation.dataset):
        with pytest.raises(BadImage, match=r"-0.png: the segmentation of annotation 1 is wrong"):
            read()


def test_an_image_of_another_size_than_annotated_is_refused(write):
    root = write()
    Image.new("RGB", (32, 64)).save(root / "train2017" / "train-0.png")
    with pytest.raises(BadImage, match="train-0.png is 32 x 64 pixels, and 64 x 64 in its annot"):
        open_instance_splits(str(root), None)[0].image(0)


def test_wrong_folders_are_refused_in_one_sentence(write, tmp_path):
    root = write()
    (tmp_path / "empty").mkdir()
    for spec, sentence in (
        ("", "no images: name their source with --data"),
        (str(tmp_path / "no"), "is neither a folder in COCO's layout nor digit-scenes"),
        (str(tmp_path / ("x" * 300)), "is neither a folder in COCO's layout nor digit-scenes"),
        (str(tmp_path / "empty"), "has no annotations/instances_train.json"),
    ):
        with pytest.raises(InputError, match=sentence):
            open_instance_splits(spec, None)
    file = root / "annotations" / "instances_train2017.json"
    (root / "annotations" / "instances_train2014.json").write_text(file.read_text())
    with pytest.raises(InputError, match="several annotation files for train: .*2014.*2017.json"):
        open_instance_splits(str(root), None)
    (root / "annotations" / "instances_train2014.json").unlink()
    file.write_text("{")
    with pytest.raises(InputError, match="instances_train2017.json cannot be read as JSON"):
        open_instance_splits(str(root), None)
