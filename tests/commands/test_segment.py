"""Token maps are graded in any batches, and wrong label maps are refused early."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldae.backbones.open import load_backbone
from ldae.backbones.preprocessing import preprocessing
from ldae.commands.segment import SegmentProtocol, segment, segmentation
from ldae.data.source import MapSource
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.features import Encoder
from ldae.evals.taps import TokenMapReader

CPU = torch.device("cpu")
SETUP = Setup(workers=0, device="cpu")
SHORT = SegmentProtocol(steps=60, total_batch=4, learning_rate=0.1)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


class Flags(MapSource):
    """Images whose colour is their label map's class; ``moved`` moves the label maps."""

    def __init__(self, count: int, split: str, moved: int = 0, labels=None):
        super().__init__("flags", split, None, None)
        rng = np.random.default_rng(len(split))
        self.maps = rng.integers(0, 3, (count, 8, 8)).astype(np.uint8) if labels is None else labels
        self.moved = moved

    def __len__(self) -> int:
        return len(self.maps)

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(COLOURS[self.maps[i] % 3])

    def label_map(self, i: int) -> np.ndarray:
        return np.roll(self.maps[i], self.moved, 1)


def encoder_of(spec: str, patch: int = 4, batch_size: int = 256, **options) -> Encoder:
    model = load_backbone(spec, **options)
    squash = replace(preprocessing(model), crop_pct=1.0, crop_mode="squash")
    reader = TokenMapReader(model, patch)
    encoder = Encoder(model, CPU, transform=squash, reader=reader, batch_size=batch_size)
    assert encoder.columns
    return encoder


def test_images_that_show_their_label_maps_are_segmented_perfectly():
    encoder, (train, evaluation) = encoder_of("pixels:8", 1), (Flags(20, "train"), Flags(9, "eval"))
    found = segmentation(encoder, train, evaluation, 3, SHORT)
    assert found["miou"] == found["pixel_accuracy"] == 100 and found["iou"] == [100] * 3
    moved = segmentation(encoder, Flags(20, "train", 1), Flags(9, "eval", 1), 3, SHORT)
    assert moved["miou"] < 40
    above = segmentation(encoder, train, evaluation, 200, SHORT)
    assert above["classes_counted"] == 3 and above["miou"] == 100


def test_a_diverged_head_is_reported():
    encoder, wild = encoder_of("pixels:8", 1), replace(SHORT, learning_rate=1e30)
    with pytest.raises(InputError, match="diverged at learning_rate 1e[+]30"):
        segmentation(encoder, Flags(20, "train"), Flags(9, "eval"), 3, wild)


@pytest.mark.parametrize(
    ("part", "setting"), [("map_logits", "--total-batch"), ("predict", "--batch-size")]
)
def test_too_little_memory_names_the_setting_to_lower(part, setting, monkeypatch):
    def small(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(f"ldae.evals.segmentation.{part}", small)
    encoder = encoder_of("pixels:8", 1)
    with pytest.raises(InputError, match=f"cpu has too little memory .* lower {setting}"):
        segmentation(encoder, Flags(20, "train"), Flags(9, "eval"), 3, replace(SHORT, steps=1))


def test_ignored_pixels_are_not_graded():
    encoder, train, evaluation = encoder_of("pixels:8", 1), Flags(20, "train"), Flags(9, "eval")
    half = Flags(9, "eval")
    half.maps[:, ::2] = 255  # an image has some colour there
    found = segmentation(encoder, train, half, 3, SHORT)
    assert found["miou"] == 100 and len(found["iou"]) == 3
    wrong = Flags(9, "eval", labels=(evaluation.maps + 1) % 3)
    wrong.image = evaluation.image
    assert segmentation(encoder, train, wrong, 3, SHORT)["miou"] == 0


@pytest.mark.parametrize(
    ("spec", "options", "exact"),
    [("pixels:8", {}, True), ("test_vit", {"random_init": True, "img_size": 32}, False)],
)
def test_batch_size_does_not_matter(spec, options, exact):
    found = [
        segmentation(
            encoder_of(spec, batch_size=size, **options),
            Flags(20, "train"),
            Flags(9, "eval"),
            3,
            SHORT,
        )["miou"]
        for size in (1, 7, 256)
    ]
    assert found == pytest.approx([found[0]] * 3, abs=0 if exact else 0.5) and 20 < found[0] < 99


def test_the_token_map_of_pixels_is_their_patches_in_place():
    encoder = encoder_of("pixels:8", 4)
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[0, :, :4, 4:] = 255
    assert encoder.reader.shape == (2, 2, 48)
    assert encoder(image).view(2, 2, 48)[..., 0].tolist() == [[-1, 1], [-1, -1]]


def test_the_token_map_is_the_models():
    encoder = encoder_of("test_vit", random_init=True, img_size=32)
    images = torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    tokens = encoder.model.forward_features(encoder.transform.normalize(images))[:, 1:]
    torch.testing.assert_close(encoder(images).view(2, -1, 64), tokens, rtol=1e-4, atol=1e-5)
    assert encoder.reader.shape[2] == 64


def test_the_command_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ("scattered-digits:40", few(tmp_path))
    more = SegmentProtocol(classes=20, steps=5)
    assert len(segment("pixels:32", *data, protocol=more, setup=SETUP)["results"]["iou"]) == 20
    (other,) = tmp_path.glob("evals/pixels-32/*")
    assert other.name == "segment-scattered-digits-40-on-few-classes=20-steps=5"
    other.rename(tmp_path / "other")
    capsys.readouterr()
    record = segment("pixels:32", *data, protocol=SegmentProtocol(steps=5), setup=SETUP)
    (written,) = tmp_path.glob("evals/pixels-32/*/results.json")
    assert written.parent.name == "segment-scattered-digits-40-on-few-steps=5"
    assert json.loads(written.read_text()) == record
    protocol = record["protocol"]
    assert (protocol["name"], protocol["version"], protocol["modified"]) == (
        "linear",
        1,
        ["steps=5"],
    )
    assert "top5_over" not in protocol and protocol["ignored"] == 255
    assert record["backbone"]["preprocessing"]["crop_mode"] == "squash"
    assert (record["backbone"]["dim"], record["data"]["classes"]) == (48, 11)
    assert "miou" in capsys.readouterr().out and len(record["results"]["iou"]) == 11


def few(folder, highest: int = 10, size: int = 20) -> str:
    """Two images of 20 x 30 pixels and their label maps."""
    rng = np.random.default_rng(0)
    for name in "ab":
        for part, pixels in (
            ("images", rng.integers(0, 256, (size, 30, 3), np.uint8)),
            ("labels", np.arange(600).reshape(20, 30).astype(np.uint8) % (highest + 1)),
        ):
            path = folder / "few" / part / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return str(folder / "few")


@pytest.mark.parametrize(
    ("highest", "size", "given", "message"),
    [
        (11, 20, {}, "few/images/a.png holds 11, and there are the classes 0 to 10"),
        (
            10,
            20,
            {"protocol": SegmentProtocol(classes=8)},
            "scattered-digits:40/train/0.* holds .*, .* classes 0 to 7",
        ),
        (10, 21, {}, "images/a.png is 30 x 21 pixels, but its label map labels/a.png is 30 x 20"),
        (10, 20, {"backbone": "pixels:30"}, "pixels:30 cannot be cut into patches of 4"),
    ],
)
def test_wrong_label_maps_are_refused_before_extraction(
    highest, size, given, message, tmp_path, monkeypatch
):
    monkeypatch.setattr("ldae.commands.segment.encode_share", None)
    with pytest.raises(InputError, match=message):
        segment(
            given.pop("backbone", "pixels:32"),
            "scattered-digits:40",
            eval_data=few(tmp_path, highest, size),
            **given,
            setup=SETUP,
        )


@pytest.mark.parametrize(
    ("value", "message"), [(0, "of one class only"), (255, "no labelled pixel")]
)
def test_label_maps_of_nothing_are_refused(value, message, tmp_path):
    blank = few(tmp_path)
    for path in (tmp_path / "few" / "labels").iterdir():
        Image.new("L", (30, 20), value).save(path)
    with pytest.raises(InputError, match=message):
        segment("pixels:32", blank, eval_data="scattered-digits:40", setup=SETUP)


def test_wrong_protocols_are_refused():
    with pytest.raises(InputError, match="steps must be at least 1"):
        SegmentProtocol(steps=0)
    with pytest.raises(InputError, match="classes must be 2 to 255, not 1"):
        SegmentProtocol(classes=1)
