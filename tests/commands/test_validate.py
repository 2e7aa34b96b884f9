"""A classifier that is always right has 100 % on the folder layout of every data set."""

import json
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

from ldae.commands.evaluate import evaluate
from ldae.commands.validate import ValidationProtocol, validate
from ldae.data.corruptions import NAMES
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.files import file_hash

SYNSETS = ImageNetInfo().label_names()
SETUP = Setup(workers=0, device="cpu")
CFG = {
    "architecture": "oracle", "input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 1.0,
    "mean": (0.0,) * 3, "std": (1.0,) * 3,
}  # fmt: skip
# Of each set: the folders' names and ImageNet's classes, chosen so that sorting the names as text
# gives another order than that of the classes.
LAYOUTS = {
    "imagenet-a": {SYNSETS[n]: n for n in (6, 11, 13, 988)},
    "imagenet-r": {SYNSETS[n]: n for n in (1, 2, 4, 988)},
    "imagenet-sketch": {SYNSETS[n]: n for n in (0, 5, 10, 999)},
    "imagenet-v2": {str(n): n for n in (2, 10, 100, 999)},
}


class Oracle(nn.Module):
    """1000 logits that name the class written in the colour of an image: 10 at the class, and less
    at two wrong ones beside it."""

    num_classes, num_features, pretrained_cfg = 1000, 4, CFG

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red, green, _ = (images.mean((2, 3)) * 255).round().long().T
        logits = torch.zeros(len(images), 1000)
        for shift, value in ((0, 10.0), (1, 5.0), (3, 7.0)):
            logits[range(len(images)), (256 * red + green + shift) % 1000] = value
        return logits


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (number // 256, number % 256, 0))


@pytest.fixture
def layout(tmp_path):
    """layout(folders): a folder of class folders, whose images show the class."""

    def make(folders: dict[str, int], count: int = 2) -> str:
        root = tmp_path / "set"
        for name, number in folders.items():
            (root / name).mkdir(parents=True)
            for i in range(count):
                picture(number).save(root / name / f"{i}.png")
        return str(root)

    return make


@pytest.fixture(autouse=True)
def oracle(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = Oracle()
    load = "ldae.evals.open.load_classifier"
    monkeypatch.setattr(load, lambda spec, in_chans, img_size: model)
    return model


def top1(data: str, setup: Setup = SETUP, **how) -> float:
    record = validate("oracle", data, protocol=ValidationProtocol(**how), setup=setup)
    return record["results"]["top1"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_perfect_classifier_has_100_percent_on_every_layout(name, layout, tmp_path):
    folders = LAYOUTS[name]
    data = layout(folders)
    assert top1(data, class_map=name) == 100
    assert top1(data) == 100
    rolled = dict(zip(folders, np.roll(list(folders.values()), 1).tolist()))
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("".join(f"{folder} {number}\n" for folder, number in rolled.items()))
    assert top1(data, class_map=str(wrong)) == 0


def test_a_corrected_class_map_is_graded_again(layout, tmp_path):
    """Its content is in the record, and in the key of a cell."""
    data, mapped = layout({"a": 3, "b": 5}), tmp_path / "map.txt"
    suite = f"[data.d]\ntrain = {data!r}\n[protocols.validate]\nclass_map = {str(mapped)!r}\n"
    (tmp_path / "suite.toml").write_text(suite)
    setup = Setup(workers=0, device="cpu", out=tmp_path / "out")
    hashes = []
    for text, accuracy in (("a 5\nb 3\n", 0), ("a 3\nb 5\n", 100)):
        mapped.write_text(text)
        (cell,) = evaluate(("oracle",), suite="suite.toml", setup=setup)["cells"]
        assert cell["results"]["top1"] == accuracy
        record = json.loads((setup.out / cell["file"]).read_text())
        hashes.append(record["protocol"]["class_map_sha256"])
        assert hashes[-1] == record["suite"]["class_map_sha256"] == file_hash(mapped)
    assert hashes[0] != hashes[1]


def test_any_of_the_real_labels_is_right(tmp_path):
    """Labels of images 1 to 5: none, {970, 795}, {230, 231}, {809}, {516, 850}."""
    (tmp_path / "val").mkdir()
    for number, written in ((1, 0), (2, 795), (3, 230), (4, 806), (5, 8)):
        picture(written).save(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.png")
    real = ValidationProtocol(real_labels=True)
    found = validate("oracle", str(tmp_path / "val"), protocol=real, setup=SETUP)
    # 4 is right at second place only (806 + 3), 5 not at all, 1 does not count.
    assert found["results"] == {"top1": 50.0, "top5": 75.0, "counted_images": 4}


def test_restricted_logits_equal_a_slow_reference(layout, oracle, monkeypatch):
    """The classes of a map compete among themselves only; without a map all classes compete."""
    weight = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))

    def forward(images: torch.Tensor) -> torch.Tensor:
        red, green, _ = (images.mean((2, 3)) * 255).round().long().T
        numbers = 256 * red + green
        logits = weight[numbers].clone()
        logits[range(len(numbers)), numbers] += 2.5
        return logits

    monkeypatch.setattr(oracle, "forward", forward)
    text = (files("timm.data") / "_info/imagenet_r_indices.txt").read_text()
    allowed = [int(line) for line in text.split()]
    data = layout({SYNSETS[n]: n for n in allowed[:60]}, count=1)
    right, anywhere = 0, 0
    for number in allowed[:60]:
        logits = {n: float(weight[number, n]) + 2.5 * (n == number) for n in range(1000)}
        right += max(allowed, key=logits.get) == number
        anywhere += max(range(1000), key=logits.get) == number
    assert 0 < anywhere < right < 60  # so that the restriction shows
    assert top1(data, class_map="imagenet-r") == pytest.approx(100 * right / 60)
    assert top1(data) == pytest.approx(100 * anywhere / 60)


def test_every_image_counts_once_in_any_batch(layout):
    data = layout({"0": 0, "1": 4, "2": 2, "7": 4}, count=3)
    found = {
        top1(data, Setup(workers=0, device="cpu", batch_size=size), corruption=("contrast",))
        for size in (1, 7, 256)
    }
    assert found == {50.0}


def test_corruptions_are_recorded_with_table_and_pictures(layout, tmp_path, capsys):
    data = layout({"0": 0, "255": 255})
    all_of_them = ValidationProtocol(corruption=("all",), severity=(1, 5))
    record = validate("oracle", data, protocol=all_of_them, setup=SETUP)
    folder = tmp_path / "evals/oracle/validate-set-corruption=all-severity=1-5"
    assert json.loads((folder / "results.json").read_text()) == record
    results, protocol = record["results"], record["protocol"]
    assert list(results["cells"]) == list(protocol["constants"]) == list(NAMES)
    assert protocol["constants"]["motion_blur"]["5"] == {"radius": 2.25, "sigma": 0.625}
    assert protocol["matched_by"] == "numbers" and protocol["compared_classes"] == 1000
    cells = [cell["top1"] for row in results["cells"].values() for cell in row.values()]
    assert len(cells) == 30 and results["top1"] == 100
    assert results["cells"]["contrast"]["5"]["top1"] == 100  # flat images stay flat
    assert results["cells"]["fog"]["5"]["top1"] < 100
    mean = results["mean_corruption_error_unnormalised"]
    assert mean == pytest.approx(100 - np.mean(cells)) and 0 < mean < 100
    written = (folder / "corruptions.md").read_text()
    assert written in capsys.readouterr().out and len(written.splitlines()) == 2 + 1 + 15 + 1
    assert Image.open(folder / "corruptions.png").size == (3 * 66, 15 * 66)
    assert ValidationProtocol(corruption=NAMES, severity=(5, 1)) == all_of_them


def test_wrong_settings_are_refused_before_anything_is_opened():
    with pytest.raises(InputError, match="random weights"):
        validate("no-such-classifier", "no-such-set", setup=Setup(random_init=True))
    for how, message in (
        ({"corruption": ("fogg",)}, "nearest is 'fog'"),
        ({"corruption": ("fog",), "severity": (0,)}, "severity must be 1, 2, 3, 4 or 5, not 0"),
        ({"corruption": ("fog",), "severity": ()}, "severity must name at least one"),
        ({"severity": (1,)}, "name them with --corruption"),
        ({"real_labels": True, "class_map": "imagenet-a"}, "leave --class-map out"),
    ):
        with pytest.raises(InputError, match=message):
            ValidationProtocol(**how)
