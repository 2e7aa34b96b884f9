"""ONNX and programs compute what timm does, on batches of any size."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import ExifTags, Image

from ldae.backbones.preprocessing import preprocessing
from ldae.commands.export import export
from ldae.data.image import decode
from ldae.deployment import graphs
from ldae.errors import InputError
from ldae.evals.taps import TokenMapReader

KINDS = ("ours", "whitened", "classifier", "convolutions", "registers")
BOTH = {"onnx": True, "torch_export": True}
PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def run_onnx(path, images) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(part) for part in session.run(None, {"images": images.numpy()})]


def run_program(path, images) -> list[torch.Tensor]:
    return list(torch.export.load(path).module()(images))


RUN = {"model.onnx": run_onnx, "model.pt2": run_program}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_compute_what_timm_does(kind, kinds, tmp_path):
    spec, how = kinds(kind)
    out = export(spec, tmp_path / "out", **BOTH, **how)
    opened = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    size = opened.pretrained_cfg["input_size"]
    for name, run in RUN.items():
        for count in (1, 7, 3):
            images = torch.randn(count, *size)
            with torch.no_grad():
                wanted = opened(images)
            (found,) = run(out / name, images)
            assert relative(found, wanted) < 1e-5, (name, count)
    records = json.loads((out / "graphs.json").read_text())
    output = "logits" if kind == "classifier" else "features"
    assert records.keys() == RUN.keys()
    for record in records.values():
        assert record["outputs"] == {output: ["batch", wanted.shape[1]]}
        assert record["input"]["shape"] == ["batch", *size]
        assert 0 <= record["largest_relative_error"] < 1e-5
    card = (out / "README.md").read_text()
    assert f"| model.onnx | float32 (batch, {', '.join(map(str, size))}) | {output}" in card


@pytest.mark.parametrize("way", ("create_transform", "onnxruntime"))
def test_the_page_of_exports_reads_photos_as_ldae_does(way, kinds, tmp_path, monkeypatch):
    """Its code for timm and for onnxruntime alone, on a photo that was taken upright, in grey."""
    monkeypatch.chdir(tmp_path)
    spec, how = kinds("ours")
    export(spec, Path("exported"), onnx=True, **how)
    levels = np.random.default_rng(0).integers(0, 256, (41, 60), dtype=np.uint8)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.fromarray(levels).save("photo.png", exif=turned)
    codes = re.findall(r"```(?:python|text)\n(.*?)```", PAGE.read_text(), re.S)
    (code,) = (code for code in codes if way in code)
    code, count = re.subn(r"Image\.new\(.*\)(?=  #)", 'Image.open("photo.png")', code)
    assert count == 1
    names: dict = {}
    exec(code, names)
    opened = timm.create_model("local-dir:exported", pretrained=True).eval()
    transform = preprocessing(opened)
    pixels = transform(decode("photo.png", "photo.png"), np.random.default_rng(0))
    with torch.no_grad():
        wanted = opened(transform.normalize(pixels[None]))
    assert relative(torch.as_tensor(names["features"]), wanted) < 1e-5


@pytest.mark.parametrize("kind", ("ours", "classifier", "convolutions", "registers"))
def test_pixels_go_in_and_token_maps_come_out(kind, kinds, tmp_path):
    spec, how = kinds(kind)
    out = export(spec, tmp_path / "out", **BOTH, uint8=True, tokens=True, **how)
    opened = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    cfg = opened.pretrained_cfg
    pixels = torch.randint(256, (3, *cfg["input_size"]), dtype=torch.uint8)
    mean, std = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        images = (pixels / 255 - mean) / std
        wanted = opened(images), TokenMapReader(opened, 1).tokens(images)
    for name, run in RUN.items():
        for found, expected in zip(run(out / name, pixels), wanted, strict=True):
            assert relative(found, expected) < 1e-5, name
    graph = onnx.load(out / "model.onnx").graph
    names = [output.name for output in graph.output]
    assert names == ["logits" if kind == "classifier" else "features", "tokens"]
    sizes = [part.type.tensor_type.shape.dim[0].dim_param for part in (*graph.input, *graph.output)]
    assert sizes == ["batch"] * 3
    assert "uint8 (batch, 3" in (out / "README.md").read_text()


def test_another_image_size(kinds, tmp_path):
    spec, _ = kinds("ours")
    out = export(spec, tmp_path / "out", img_size=48, **BOTH)
    wanted = timm.create_model(
        f"local-dir:{export(spec, tmp_path / 'own')}", pretrained=True, img_size=48
    ).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        for name, run in RUN.items():
            assert relative(run(out / name, images)[0], wanted(images)) < 1e-5
    assert export(spec, out, img_size=48) == out
    with pytest.raises(InputError, match="out exists already"):
        export(spec, out)
    with pytest.raises(InputError, match=r"img_size 30 does not fit .*: its patches have 8 x 8"):
        export(spec, tmp_path / "other", img_size=30)


def test_a_graph_can_be_added_and_stays(kinds, tmp_path):
    """Also to the exported folder itself."""
    spec, _ = kinds("ours")
    out = export(spec, tmp_path / "out")
    before = (out / "README.md").read_text()
    assert export(spec, out, onnx=True) == out
    made = (out / "model.onnx").stat()
    assert export(out, out, **BOTH) == export(out, out, **BOTH) == out
    assert (out / "model.onnx").stat() == made and (out / "model.pt2").is_file()
    card = (out / "README.md").read_text()
    assert card.startswith(before) and card.count("## Graphs") == 1
    for other in ({"uint8": True}, {"tokens": True}):
        with pytest.raises(InputError, match="model.onnx has (input|outputs) .*another folder"):
            export(spec, out, onnx=True, **other)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "graphs.json", "model.onnx", "model.pt2", "model.safetensors",
    ]  # fmt: skip


def test_what_differs_is_refused_and_nothing_is_left(kinds, tmp_path, monkeypatch):
    spec, _ = kinds("ours")
    done = export(spec, tmp_path / "done")
    before = {path.name for path in done.iterdir()}
    forward = graphs.Deployed.forward

    def wrong(self, images):
        return tuple(1.0001 * part for part in forward(self, images))

    monkeypatch.setattr(graphs.Deployed, "forward", wrong)
    for name, how in (("model.onnx", {"onnx": True}), ("model.pt2", {"torch_export": True})):
        for out in (tmp_path / "new", done):
            with pytest.raises(InputError, match=f"{name} differs from timm by 1.0e-04"):
                export(spec, out, **how)
    assert not list(tmp_path.glob("new*"))
    assert {path.name for path in done.iterdir()} == before


def test_what_a_killed_export_leaves_is_gone_after_the_same_command(kinds, tmp_path, monkeypatch):
    """A kill may leave the folder as it is at the comparison, when the graph is written."""
    spec, _ = kinds("ours")
    out, killed = export(spec, tmp_path / "out"), tmp_path / "killed"
    compare = graphs._relative_error

    def copy_first(*args) -> float:
        shutil.copytree(out, killed)
        return compare(*args)

    monkeypatch.setattr(graphs, "_relative_error", copy_first)
    before = {path.name for path in out.iterdir()}
    export(spec, out, onnx=True)
    assert {path.name for path in killed.iterdir()} == before | {"model.onnx.partial"}
    monkeypatch.undo()
    export(spec, killed, onnx=True)
    assert {path.name for path in killed.iterdir()} == {path.name for path in out.iterdir()}


def test_wrong_requests_are_sentences(kinds, network, tmp_path, monkeypatch):
    spec, _ = kinds("ours")
    for how, message in (
        ({"uint8": True}, "--uint8 is of a graph: ask for --onnx or --torch-export"),
        ({"tokens": True}, "--tokens is of a graph"),
        ({"private": True}, "--private is of a repository"),
        ({"push": "name"}, "--push name must be USER/NAME"),
        ({"push": "a/b/c"}, "--push a/b/c is no repository"),
        ({"classifier": True}, "is a run, which has no classifier"),
    ):
        with pytest.raises(InputError, match=message):
            export(spec, tmp_path / "out", **how)
    with pytest.raises(InputError, match="timestep 3 is for a run"):
        export(network("test_resnet"), tmp_path / "out", timestep=3)
    with pytest.raises(InputError, match="pixels is no timm model"):
        export("pixels", tmp_path / "out")

    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr("ldae.errors.import_module", missing)
    with pytest.raises(InputError, match=r"--onnx needs the package onnx: pip install 'ldae\[onnx"):
        export(spec, tmp_path / "out", onnx=True)
    assert not list(tmp_path.glob("out*"))
