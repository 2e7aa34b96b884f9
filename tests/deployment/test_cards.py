"""The card of an export says what is true of the exported network, and no paths."""

import numpy as np
import pytest
from PIL import Image

from ldae.commands.export import export
from ldae.evals.scores import public_name
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import settings_of, to_yaml
from ldae.tree import replace

WHITEN = {"whiten": "scattered-digits:64", "whiten_shrinkage": 0.01, "workers": 0}


def test_the_card_of_an_export_of_an_export_is_of_this_network(run, network, tmp_path):
    """The facts that an export changes are those of the new network; the others stay."""
    folder = run()

    def card(spec, name: str, **how) -> str:
        return (export(spec, tmp_path / name, **how) / "README.md").read_text()

    first, plain = card(folder, "plain"), tmp_path / "plain"
    assert "| input | 3 x 32 x 32, patch 8 |" in first
    assert first == card(plain, "again")
    larger = card(plain, "larger", img_size=64)
    assert first.replace("3 x 32 x 32", "3 x 64 x 64") == larger == card(folder, "run", img_size=64)
    whitened = card(plain, "white", **WHITEN)
    assert first != whitened == card(folder, "white-run", **WHITEN)
    probe = network("test_vit2", 7, list("abcdefg"))
    assert "image classifier" in card(probe, "whole")
    cut = card(tmp_path / "whole", "cut", classifier=False)
    assert "image encoder" in cut and "classif" not in cut


def test_an_export_does_not_publish_paths(run, tmp_path):
    """Not even of the images that whiten."""
    images = tmp_path / "private" / "images"
    images.mkdir(parents=True)
    for number, level in enumerate(np.random.default_rng(0).integers(0, 256, (40, 9, 9, 3))):
        Image.fromarray(level.astype(np.uint8)).save(images / f"{number}.png")
    out = export(run(), tmp_path / "out", **WHITEN | {"whiten": images})
    for name in ("README.md", "config.json"):
        text = (out / name).read_text()
        assert "images" in text and "private" not in text


def test_a_row_of_a_file_is_published_by_its_name(run, tmp_path):
    folder = run()
    state = Checkpoints(folder).load()
    state["describe"]["row"] = "/private/of-mine.yaml"
    Checkpoints(folder).save(state | {"images_seen": 16})
    card = (export(folder, tmp_path / "out") / "README.md").read_text()
    assert "| row | of-mine.yaml |" in card and "private" not in card


@pytest.mark.parametrize(
    "spec, name",
    [
        ("/private/runs/first", "first"),
        ("vit_base_patch16_224.mae@/private/mae.pth", "vit_base_patch16_224.mae@mae.pth"),
    ],
)
def test_the_start_of_a_run_is_named_since_its_license_may_bind(spec, name, run, tmp_path):
    folder = run()
    config = settings_of(folder, "pretraining")
    begun = to_yaml(replace(config, {"init_from": spec}), "pretraining")
    (folder / "config.yaml").write_text(begun)
    card = (export(folder, tmp_path / "out") / "README.md").read_text()
    assert f"| begun from | {name} |" in card and "private" not in card


def test_the_public_name_of_a_source_has_no_folders():
    assert public_name("torch/cifar10@/private/tv") == "cifar10"
    assert public_name("/private/images.zip") == "images.zip"
    assert public_name("scattered-digits:64") == "scattered-digits:64"
