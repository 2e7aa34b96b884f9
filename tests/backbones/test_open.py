"""Every backbone is a plain timm model, and tensors that do not load are reported."""

import json
import re
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from ldae.backbones.open import backbone_folder, load_backbone, load_classifier
from ldae.backbones.preprocessing import preprocessing
from ldae.commands.export import export
from ldae.errors import InputError

VIT = "test_vit"  # timm's smallest: 6 blocks of width 64
SIZE = 32
RNG = np.random.default_rng(0)


def images(chans: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.randn(2, chans, size, size, generator=torch.Generator().manual_seed(1))


def features(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(x)


def trained(seed: int = 7, **args) -> torch.nn.Module:
    """Return a stand-in for a pre-trained network: random weights of another seed."""
    return load_backbone(VIT, random_init=True, img_size=SIZE, seed=seed, **args)


# Names


@pytest.mark.parametrize("name", [VIT, "test_resnet", "test_convnext"])
def test_timm_name_gives_one_vector_for_an_image(name):
    model = load_backbone(name, random_init=True, img_size=SIZE)
    assert features(model, images()).shape == (2, model.num_features)
    assert not model.training


def test_a_network_that_is_registered_with_timm_opens_by_its_name(tmp_path, monkeypatch):
    """From a checkpoint, and with random weights; without a file there are none."""
    (tmp_path / "own_networks.py").write_text(
        "import torch\n"
        "from timm.models import register_model\n"
        "@register_model\n"
        "def own_network(pretrained=False, num_classes=0, in_chans=3, **others):\n"
        "    flat = (torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())\n"
        "    network = torch.nn.Sequential(*flat, torch.nn.Linear(4 * in_chans, 5))\n"
        "    statistics = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}\n"
        "    network.pretrained_cfg = {'input_size': (3, 32, 32), **statistics}\n"
        "    return network\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import_module("own_networks")
    control = load_backbone("own_network", random_init=True, seed=7)
    save_file(control.state_dict(), tmp_path / "own.safetensors")
    backbone = load_backbone(f"own_network@{tmp_path / 'own.safetensors'}")
    assert torch.equal(features(backbone, images()), features(control, images()))
    assert preprocessing(backbone).input_size == (3, 32, 32)
    with pytest.raises(InputError, match="no weights for own_network: name a checkpoint"):
        load_backbone("own_network")


def test_random_init_depends_only_on_its_seed():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    same, again, other = (trained(seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(features(same, images()), features(again, images()))
    assert not torch.equal(features(same, images()), features(other, images()))


@pytest.mark.parametrize("name", [VIT, "test_resnet"])
@pytest.mark.parametrize("chans", [1, 3, 5])
def test_preprocessing_describes_the_model_that_was_built(name, chans):
    model = load_backbone(name, random_init=True, in_chans=chans, img_size=48)
    transform = preprocessing(model)
    assert transform.input_size == (chans, 48, 48)
    assert len(transform.mean) == len(transform.std) == chans
    assert features(model, images(chans, 48)).shape == (2, model.num_features)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("test_vitt", "the nearest is 'test_vit"),
        (f"{VIT}.nonsense", f"no weights 'nonsense' of {VIT}; those it has: "),
        ("coatnet_0_224.any", "no weights 'any' of coatnet_0_224; those it has: none"),
        ("runs/none", "no folder runs/none"),
        ("pixels:small", "pixels:SIZE"),
        ("x" * 300, f"'{'x' * 80}...' cannot be read: File name too long"),
        ("coatnet_0_224", "timm has no weights for coatnet_0_224"),
    ],
)
def test_wrong_specs_are_refused(spec, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        load_backbone(spec)


@pytest.mark.parametrize("spec", ["runs/nix", "nowhere", "exported"])
def test_a_folder_has_no_nearest_architecture(spec):
    with pytest.raises(InputError, match="no timm model of that name$"):
        load_backbone(spec)


@pytest.mark.parametrize("opened", [load_backbone, load_classifier])
def test_a_fine_tuning_that_has_not_ended_is_no_backbone(opened, tmp_path):
    (tmp_path / "config.yaml").write_text("kind: fine-tuning\n")
    with pytest.raises(InputError, match="has not ended: the same `ldae finetune` command resumes"):
        opened(tmp_path)


def test_the_control_of_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="the nearest is 'test_vit"):
        load_backbone("test_vitt", random_init=True)


def test_a_failed_download_is_reported(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be downloaded"):
        load_backbone("resnet18")


def test_folders_and_files_without_architecture_are_refused(tmp_path):
    with pytest.raises(InputError, match="neither a run nor the config.json of a timm model"):
        load_backbone(tmp_path)
    file = tmp_path / "weights.pth"
    torch.save({}, file)
    with pytest.raises(InputError, match=re.escape(f"write NAME@{file}")):
        load_backbone(file)


@pytest.mark.parametrize("opened", [load_backbone, load_classifier])
@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "OTHER.ONNX"])
def test_an_exported_graph_is_no_backbone(name, opened, tmp_path):
    """Neither by itself nor as the checkpoint of an architecture."""
    file = tmp_path / name
    with pytest.raises(InputError, match="there is no folder"):
        opened(file)
    file.write_bytes(b"a graph")
    for spec in (file, f"{VIT}@{file}"):
        with pytest.raises(InputError, match="name the exported folder around it, or the") as said:
            opened(spec)
        assert str(said.value).startswith(f"{file} is an exported graph")


def test_pixels_are_flattened():
    model = load_backbone("pixels:8", in_chans=2)
    x = images(2, 8)
    assert torch.equal(features(model, x), x.flatten(1))
    assert preprocessing(load_backbone("pixels")).input_size == (3, 32, 32)
    with pytest.raises(InputError, match="no weights"):
        load_backbone("pixels", random_init=True)


# Folders


@pytest.fixture
def folder(tmp_path):
    model = trained(in_chans=1)
    timm.models.save_for_hf(model, tmp_path / "vit", safe_serialization=True)
    return model, tmp_path / "vit"


def test_timm_folder_opens_with_its_weights_or_as_its_control(folder):
    model, path = folder
    x = images(1)
    opened, control = load_backbone(path), load_backbone(path, random_init=True, seed=1)
    assert torch.equal(features(opened, x), features(model, x))
    assert [p.shape for p in control.parameters()] == [p.shape for p in model.parameters()]
    assert not torch.allclose(features(control, x), features(model, x))
    assert preprocessing(opened) == preprocessing(model)
    assert backbone_folder(path) == path


@pytest.mark.parametrize("chans", [1, 2, 3, 5])
def test_a_folder_opens_with_its_weights_for_any_number_of_channels(chans, tmp_path):
    """timm before 1.0.31 leaves the patch embedding random for 2, 4 and more channels."""
    model = trained(in_chans=chans)
    how = {"safe_serialization": True, "model_args": model.model_args}
    timm.models.save_for_hf(model, tmp_path / "vit", **how)
    opened = load_backbone(tmp_path / "vit")
    assert torch.equal(features(opened, images(chans)), features(model, images(chans)))


@pytest.mark.parametrize("size", [SIZE, [SIZE, SIZE]])
def test_a_folder_with_the_preprocessing_of_timms_own_weights_is_adapted(size, tmp_path):
    """timm before 1.0.31 wrote such folders."""
    args = {"img_size": size, "in_chans": 1}
    model = timm.create_model(VIT, num_classes=0, **args).eval()
    path = tmp_path / "vit"
    timm.models.save_for_hf(model, path, safe_serialization=True, model_args=args)
    config = json.loads((path / "config.json").read_text())
    rgb = {"input_size": [3, 160, 160], "mean": [0.2, 0.4, 0.6], "std": [0.5, 0.5, 0.5]}
    config["pretrained_cfg"] |= rgb
    (path / "config.json").write_text(json.dumps(config))
    opened = load_backbone(path)
    transform = preprocessing(opened)
    assert transform.input_size == (1, SIZE, SIZE)
    assert transform.mean == pytest.approx((0.4,)) and transform.std == (0.5,)
    assert torch.equal(features(opened, images(1)), features(model, images(1)))


def test_the_crop_of_timms_test_size_is_that_of_timms_tables():
    for side, crop in ((None, 0.95), (288, 1.0), (128, 0.95)):
        model = load_backbone("resnet18.a1_in1k", random_init=True, img_size=side)
        assert preprocessing(model).crop_pct == crop


def test_a_folder_keeps_its_own_size_and_channels(folder):
    _, path = folder
    load_backbone(path, in_chans=1)
    with pytest.raises(InputError, match="img_size is for timm names"):
        load_backbone(path, img_size=64)
    with pytest.raises(InputError, match="takes 1 channels"):
        load_backbone(path, in_chans=4)


def test_a_broken_timm_folder_is_refused(folder):
    _, path = folder
    (path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=re.escape(f"{path} cannot be opened by timm")):
        load_backbone(path)


def test_a_timm_folder_with_another_programs_config_opens(folder):
    model, path = folder
    (path / "config.yaml").write_text("trainer: {gpus: 8}\n")
    assert backbone_folder(path) == path
    assert load_backbone(path).num_features == model.num_features


def test_run_folder_gives_the_exported_backbone_or_its_control(run, tmp_path):
    folder = run()
    assert backbone_folder(folder) == folder
    exported, x = export(folder, tmp_path / "exported"), images()
    for how in ({}, {"random_init": True, "seed": 1}):
        expected = features(load_backbone(exported, **how), x)
        assert torch.equal(features(load_backbone(folder, **how), x), expected)
    other = load_backbone(folder, random_init=True, seed=2)
    assert not torch.allclose(features(other, x), expected)


WITHOUT_UNIX = """
import os, signal, sys

sys.modules["fcntl"] = sys.modules["resource"] = None
del os.pread, os.pwrite, os.sched_getaffinity, signal.SIGUSR1, signal.SIGUSR2
import ldae

for spec in sys.argv[1:]:
    print(ldae.load_backbone(spec, random_init=spec == "test_vit").num_features)
"""


def test_backbones_open_where_python_has_nothing_of_unix(run, tmp_path):
    """As on Windows."""
    specs = [VIT, run(), export(run("patch_pca"), tmp_path / "exported")]
    command = [sys.executable, "-c", WITHOUT_UNIX, *map(str, specs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["64", "32", "32"], done.stderr


# Classifiers


def test_a_folder_opens_with_its_classifier(tmp_path):
    model = timm.create_model(VIT, img_size=SIZE, num_classes=4).eval()
    how = {"model_config": {"label_names": list("abcd")}, "model_args": {"img_size": SIZE}}
    timm.models.save_for_hf(model, tmp_path / "vit", safe_serialization=True, **how)
    opened = load_classifier(tmp_path / "vit")
    assert torch.equal(features(opened, images()), features(model, images()))
    assert opened.num_classes == 4 and list(opened.pretrained_cfg["label_names"]) == list("abcd")
    assert not opened.training and not any(p.requires_grad for p in opened.parameters())


def test_backbones_without_classifier_are_refused(folder, tmp_path):
    model, path = folder
    model.reset_classifier(0)
    timm.models.save_for_hf(model, path, safe_serialization=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("kind: pretraining\n")
    for spec in (path, tmp_path / "run", "pixels:16"):
        with pytest.raises(InputError, match=f"{re.escape(str(spec))} has no classifier"):
            load_classifier(spec)


def test_a_file_opens_with_its_classifier_and_as_many_classes(tmp_path):
    file = tmp_path / "weights@7.pth"
    for classes in (7, 1000):
        model = timm.create_model(VIT, img_size=SIZE, num_classes=classes).eval()
        torch.save({"model": model.state_dict()}, file)
        opened = load_classifier(f"{VIT}@{file}", img_size=SIZE)
        assert opened.num_classes == classes and not opened.training
        assert torch.equal(features(opened, images()), features(model, images()))
    model.reset_classifier(0)
    torch.save(model.state_dict(), file)
    with pytest.raises(InputError, match=f"{re.escape(str(file))} has no classifier"):
        load_classifier(f"{VIT}@{file}", img_size=SIZE)
    with pytest.raises(InputError, match="there is no checkpoint file"):
        load_classifier(f"{VIT}@{tmp_path / 'none.pth'}")


# Checkpoint files


def prefixed(prefix: str, weights: dict) -> dict:
    return {prefix + name: value for name, value in weights.items()}


LAYOUTS = {
    "flat": lambda own, other: own,
    "ddp": lambda own, other: {"state_dict": prefixed("module.", own), "epoch": 3},
    "ijepa": lambda own, other: {"encoder": prefixed("module.", own), "predictor": other},
    "average": lambda own, other: {"model": other, "model_ema": own},
    "classifier": lambda own, other: own | {"head.weight": torch.zeros(5, 64)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoint_layouts_load_completely(layout, tmp_path, capsys):
    model = trained()
    own, other = model.state_dict(), trained(seed=8).state_dict()
    torch.save(LAYOUTS[layout](own, other), tmp_path / "file.pth")
    loaded = load_backbone(f"{VIT}@{tmp_path / 'file.pth'}", img_size=SIZE)
    assert torch.equal(features(loaded, images()), features(model, images()))
    report = capsys.readouterr().out
    assert f"{len(own)} of the {len(own)} tensors" in report
    assert "not in" not in report


def test_safetensors_file_loads(tmp_path):
    model = trained()
    save_file(model.state_dict(), tmp_path / "file.safetensors")
    loaded = load_backbone(f"{VIT}@{tmp_path / 'file.safetensors'}", img_size=SIZE)
    assert torch.equal(features(loaded, images()), features(model, images()))


def test_surplus_tensors_are_listed_and_incomplete_files_are_refused(tmp_path, capsys):
    """A part with random weights would be graded as if it were trained."""
    weights, file = trained().state_dict(), tmp_path / "file.pth"
    torch.save(weights | {"surprise": torch.zeros(2)}, file)
    load_backbone(f"{VIT}@{file}", img_size=SIZE)
    assert "not in the model, left out (1): surprise" in capsys.readouterr().out
    del weights["norm.bias"]
    weights["norm.weight"] = torch.zeros(3)
    torch.save(weights, file)
    with pytest.raises(InputError) as raised:
        load_backbone(f"{VIT}@{file}", img_size=SIZE)
    assert str(raised.value) == (
        f"{file} does not fit {VIT}: not in the file (1): norm.bias; "
        "of another shape (1): norm.weight (3,) for (64,)"
    )


def test_files_of_another_image_size_and_other_channels_are_adapted(tmp_path, capsys):
    model = trained()
    torch.save(model.state_dict(), tmp_path / "file.pth")
    grey = load_backbone(f"{VIT}@{tmp_path / 'file.pth'}", img_size=48, in_chans=1)
    assert "another shape" not in capsys.readouterr().out
    assert torch.allclose(
        grey.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True)
    )


def test_control_of_a_file_does_not_read_it(tmp_path):
    control = load_backbone(f"{VIT}@{tmp_path / 'none'}", random_init=True, img_size=SIZE, seed=7)
    assert torch.equal(features(control, images()), features(trained(), images()))


class Code:
    """A class that exists only in the code that wrote the checkpoint."""


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"model": {"conv1.weight": torch.zeros(3)}}, "nothing in FILE fits"),
        ({"epoch": 3}, "FILE holds no weights"),
        ({"model": {}, "config": Code()}, "FILE holds pickled code"),
        (b"PK\x03\x04 cut off", "FILE is not a readable checkpoint"),
        (None, "there is no checkpoint file FILE"),
    ],
)
def test_useless_files_are_refused(content, sentence, tmp_path):
    file = tmp_path / "file.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(InputError, match=re.escape(sentence.replace("FILE", str(file)))):
        load_backbone(f"{VIT}@{file}", img_size=SIZE)


# Preprocessing


def picture(mode: str, width: int, height: int) -> Image.Image:
    pixels = RNG.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if mode == "L" else pixels)


@pytest.mark.parametrize("size", [(40, 40), (57, 31), (20, 90)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("mode", "chans"), [("RGB", 3), ("L", 1)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_transform_then_normalise_is_timms_transform(size, crop_mode, mode, chans, crop_pct):
    model = load_backbone(VIT, random_init=True, in_chans=chans, img_size=SIZE)
    model.pretrained_cfg |= {"crop_mode": crop_mode, "crop_pct": crop_pct}
    image = picture(mode, *size)
    transform = preprocessing(model)
    expected = create_transform(**resolve_model_data_config(model), is_training=False)(image)
    pixels = transform(image, RNG)
    assert pixels.dtype == torch.uint8
    assert torch.equal(transform.normalize(pixels[None])[0], expected)


def test_channels_of_an_array_are_transformed_one_by_one():
    array = RNG.integers(0, 256, (50, 37, 5), dtype=np.uint8)
    five = preprocessing(load_backbone("test_resnet", random_init=True, in_chans=5, img_size=SIZE))
    one = preprocessing(load_backbone("test_resnet", random_init=True, in_chans=1, img_size=SIZE))
    pixels = five(array, RNG)
    for channel in range(5):
        assert torch.equal(pixels[channel], one(Image.fromarray(array[..., channel]), RNG)[0])


def test_image_of_the_right_size_is_not_resampled():
    image = picture("RGB", 32, 32)
    pixels = preprocessing(load_backbone("pixels:32"))(image, RNG)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))
