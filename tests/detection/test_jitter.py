"""Instances stay where their pixels are, whatever the scale, the crop and the flip."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldae.backbones.preprocessing import EvalTransform
from ldae.data.instances import Instances
from ldae.data.workers import Batch
from ldae.detection.jitter import OnDevice, ScaleJitter, canvas_of, fitted_size
from ldae.errors import InputError

BOXES = np.float32([[8, 4, 24, 20], [30, 2, 38, 22]])


def scene() -> tuple[Image.Image, Instances]:
    """A white rectangle for each instance, on a black image of 40 x 24 pixels."""
    masks = np.zeros((2, 24, 40), bool)
    for mask, (left, top, right, bottom) in zip(masks, BOXES.astype(int)):
        mask[top:bottom, left:right] = True
    image = Image.fromarray(masks.any(0) * np.uint8(255)).convert("RGB")
    return image, Instances((40, 24), BOXES, np.array([3, 7]), masks)


def placed(jitter: ScaleJitter, seed: int = 0) -> tuple[np.ndarray, dict]:
    """Return the first channel of the input, and its target with masks of one byte a pixel."""
    pixels, target = jitter.joint(*scene(), np.random.default_rng(seed))
    batch = Batch(pixels[None], [target], torch.tensor([0]), [])
    (target,) = OnDevice(torch.device("cpu"))(batch).targets
    return pixels[0].numpy(), {name: part.numpy() for name, part in target.items()}


def test_evaluation_fits_the_long_side_into_the_upper_left_corner():
    pixels, target = placed(ScaleJitter((3, 80, 80), (9, 9, 9)))
    assert (pixels[48:] == 9).all() and (pixels[:48] != 9).any()
    assert np.array_equal(target["boxes"], 2 * BOXES)
    assert target["labels"].tolist() == [4, 8]  # 0 is the background
    assert target["masks"].shape == (2, 80, 80) and target["masks"].dtype == np.uint8
    assert (target["masks"].sum((1, 2)) == [4 * 16 * 16, 4 * 8 * 20]).all()


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("scale", [(0.5, 0.5), (1.0, 1.0), (2.0, 2.0), (0.3, 2.5)])
def test_masks_lie_on_their_pixels_and_inside_of_their_boxes(scale, flip):
    kept = 0
    for seed in range(10):
        pixels, target = placed(ScaleJitter((3, 64, 64), (0, 0, 0), scale, flip), seed)
        agree = (pixels > 127) == target["masks"].any(0)
        assert agree.mean() > 0.95
        for mask, (left, top, right, bottom) in zip(target["masks"], target["boxes"]):
            rows, columns = np.nonzero(mask)
            kept += 1
            assert left - 1 <= columns.min() and columns.max() <= right
            assert top - 1 <= rows.min() and rows.max() <= bottom
    assert kept


def test_a_pixel_has_the_mask_at_its_middle_and_less_than_a_pixel_is_left_out():
    """The input is a third of the image."""
    masks = np.random.default_rng(0).random((3, 24, 24)) < 0.5
    boxes = np.float32([[3, 3, 24, 24], [3, 3, 6, 24], [3, 3, 5, 24]])
    found = Instances((24, 24), boxes, np.arange(3), masks)
    jitter, image = ScaleJitter((3, 8, 8), (0,) * 3), Image.new("RGB", (24, 24))
    _, target = jitter.joint(image, found, np.random.default_rng(0))
    assert target["labels"].tolist() == [0, 1]
    assert np.array_equal(np.unpackbits(target["masks"], axis=2), masks[:2, 1::3, 1::3])


def test_a_flip_mirrors_the_input():
    plain, mirrored = (placed(ScaleJitter((3, 64, 64), (0,) * 3, flip=flip)) for flip in (0.0, 1.0))
    assert np.array_equal(plain[0][:, ::-1], mirrored[0])
    assert np.array_equal(plain[1]["masks"][:, :, ::-1], mirrored[1]["masks"])
    assert np.array_equal(64 - plain[1]["boxes"][:, [2, 0]], mirrored[1]["boxes"][:, [0, 2]])


def test_the_border_has_the_mean_colour():
    mean, std = (0.1, 0.5, 0.9), (0.2,) * 3
    given = EvalTransform((3, 8, 8), "bicubic", 1.0, "center", mean, std)
    pixels = canvas_of(given, 16)(Image.new("RGB", (16, 4)), np.random.default_rng(0))
    assert pixels[:, 8, 8].tolist() == [26, 128, 230]


def test_instances_outside_of_the_crop_are_left_out():
    jitter = ScaleJitter((3, 16, 16), (0,) * 3, (6.0, 6.0))
    counts = {len(placed(jitter, seed)[1]["labels"]) for seed in range(30)}
    assert {0, 1} <= counts


def test_a_crop_leaves_the_box_of_what_is_seen_of_an_instance():
    """Of an L, whose box is that of the image, a crop may show one arm or nothing."""
    mask = np.zeros((1, 64, 64), bool)
    mask[:, :, :8] = mask[:, 56:] = True
    whole = np.float32([[0, 0, 64, 64]])
    found = Instances((64, 64), whole, np.array([0]), mask)
    jitter, counts = ScaleJitter((3, 64, 64), (0,) * 3, (2.0, 2.0)), set()
    for seed in range(20):
        _, target = jitter.joint(Image.new("RGB", (64, 64)), found, np.random.default_rng(seed))
        counts.add(len(target["boxes"]))
        for packed, box in zip(target["masks"], target["boxes"]):
            rows, columns = np.nonzero(np.unpackbits(packed, axis=1))
            assert box.tolist() == [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
    assert counts == {0, 1}


def test_boxes_alone_need_no_masks():
    image, found = scene()
    boxes_only = Instances(found.size, found.boxes, found.labels, None)
    jitter = ScaleJitter((3, 64, 64), (0,) * 3)
    _, target = jitter.joint(image, boxes_only, np.random.default_rng(0))
    assert target.keys() == {"boxes", "labels"}


def test_the_same_generator_gives_the_same_input():
    jitter = ScaleJitter((3, 64, 64), (0,) * 3, (0.1, 2.0), 0.5)
    for name, part in placed(jitter, 5)[1].items():
        assert np.array_equal(part, placed(jitter, 5)[1][name])
    assert not np.array_equal(placed(jitter, 5)[0], placed(jitter, 6)[0])


def test_extreme_images_keep_a_pixel():
    assert fitted_size((1000, 1), 64, 0.1) == (6, 1)


def test_an_image_of_other_channels_is_refused():
    with pytest.raises(InputError, match="in_chans is 3"):
        ScaleJitter((3, 8, 8), (0,) * 3)(np.zeros((4, 4, 5), np.uint8), np.random.default_rng(0))
