"""What the hub and timm's users read of an exported network."""

import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from ldae.backbones.open import load_backbone
from ldae.commands.export import export
from ldae.commands.knn import knn
from ldae.deployment.model_card import model_card, with_facts, with_license
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.neighbours import KNNProtocol
from ldae.evals.scores import public_name
from ldae.files import write, write_json
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import settings_of, to_yaml
from ldae.tree import replace

WHITEN = {"whiten": "scattered-digits:64", "whiten_shrinkage": 0.01, "workers": 0}


def test_a_card_is_front_matter_a_table_and_code():
    card = model_card("name", ["a", "b"], "What it is.", {"one": 1, "two": "x"}, "model(1)")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "timm", "tags": ["a", "b"]}
    assert body.startswith("# name\n\nWhat it is.\n\n| | |\n|---|---|\n| one | 1 |\n| two | x |\n")
    assert body.endswith("\nmodel(1)\n```\n")


@pytest.mark.parametrize("card", ["# Mine\n", "# Mine\n---\na rule\n---\n", "---\nunfinished"])
def test_a_card_without_front_matter_gets_a_license(card):
    assert with_license(card, "mit") == f"---\nlicense: mit\n---\n{card}"


def test_the_code_of_a_card_runs(run, tmp_path):
    folder = export(run(), tmp_path / "exported")
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    names = {"image": Image.new("RGB", (40, 40))}
    exec(code.replace("PATH", str(folder)), names)
    wanted = re.search(r"# \(1, (\d+)\)", code)[1]
    assert names["features"].shape == (1, int(wanted))
    assert "arxiv.org/abs/2401.14404" in card and "pypi.org" not in card


def test_the_card_says_how_images_are_preprocessed(run, tmp_path):
    folder = export(run(), tmp_path / "exported")
    cfg = cfg_of(folder)
    row = re.search(r"\| preprocessing \| (.*) \|", (folder / "README.md").read_text())[1]
    assert f"RGB, upright by EXIF; {cfg['interpolation']}, crop_pct 1, crop_mode center" in row
    for name in ("mean", "std"):
        assert f"{name} {', '.join(f'{value:g}' for value in cfg[name])} " in row


@pytest.mark.parametrize("flip", [False, True])
def test_the_card_says_whether_images_were_flipped(flip, run, tmp_path):
    folder = export(run(data__flip=flip), tmp_path / "exported")
    assert ("and flips" in (folder / "README.md").read_text()) == flip


def test_facts_of_a_card_are_replaced_or_added():
    card = model_card("name", ["a"], "What.", {"one": 1, "two": r"\1"}, "1", scores="| one | 3 |")
    changed = with_facts(card, {"two": r"\2", "three": 3})
    assert changed == card.replace(r"| two | \1 |", "| two | \\2 |\n| three | 3 |")
    assert with_facts("# Of another author", {"one": 2}) == "# Of another author"


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def cfg_of(folder):
    return json.loads((folder / "config.json").read_text())["pretrained_cfg"]


def test_the_license_is_the_users_choice_and_none_is_claimed_without_it(run, tmp_path):
    folder = run()
    plain = export(folder, tmp_path / "plain")
    assert "license" not in front_matter(plain) and "license" not in cfg_of(plain)
    out = export(folder, tmp_path / "out", license="cc-by-nc-4.0")
    assert front_matter(out)["license"] == cfg_of(out)["license"] == "cc-by-nc-4.0"
    assert export(folder, out) == export(folder, out, license="cc-by-nc-4.0") == out
    with pytest.raises(InputError, match="out exists already"):
        export(folder, out, license="mit")


def scores(card):
    """Return the rows of the card's table of scores."""
    rows = [row.strip("| ").split(" | ") for row in card.splitlines() if row.startswith("| ")]
    return [row for row in rows if len(row) == 4][2:]


def test_the_card_shows_the_scores_beside_the_run(run, tmp_path):
    """Those of the control, of other images seen and of older versions are marked."""
    folder = run()
    assert not scores((export(folder, tmp_path / "none") / "README.md").read_text())
    setup = Setup(out=folder / "evals" / "knn-a", workers=0, device="cpu")
    record = knn(str(folder), "digits", protocol=KNNProtocol(k=(3,)), setup=setup)
    record["data"] |= {"spec": "/home/me/cifar.zip", "eval_spec": "/home/me/test.zip"}
    for name, random_init, seen in (
        ("b", True, None), ("c", False, 4), ("d", False, 8), ("e", False, None)
    ):  # fmt: skip
        record["backbone"] |= {"random_init": random_init, "images_seen": seen}
        write_json(folder / "evals" / f"knn-{name}" / "results.json", record)
    record["protocol"]["precision"] = "fp16"
    write_json(folder / "evals" / "knn-e" / "results.json", record)
    card = (export(folder, tmp_path / "out") / "README.md").read_text()
    assert "measured on the run at t = 10:" in card and "/home" not in card
    rows, count, results = scores(card), record["data"]["eval_images"], record["results"]
    assert [row[0] for row in rows] == ["knn, k=3"] * 4 + ["knn, k=3, fp16"]
    assert rows[0][1] == f"digits ({count} images)"
    assert rows[1][1] == f"cifar.zip, graded on test.zip ({count} images)"
    assert rows[0][2] == f"top1_k3 {results['top1_k3']:.2f}, top5_k3 {results['top5_k3']:.2f}"
    assert [row[3] for row in rows[1:]] == [
        "none: the untrained control", "4: another checkpoint", "8", "not recorded",
    ]  # fmt: skip


def test_broken_and_foreign_results_are_left_out(run, tmp_path):
    folder = run()
    params = sum(parameter.numel() for parameter in load_backbone(folder).parameters())
    good = {
        "task": "linear",
        "protocol": {"modified": []},
        "backbone": {"params": params, "random_init": False},
        "data": {"spec": "a", "eval_spec": "a", "eval_images": 9},
        "results": {"top1": 50.0, "learning_rate": 0.1},
    }
    files = {
        "good": good,
        "pixels": good | {"backbone": {"params": 0}},
        "grid": good | {"task": "grid"},  # of other blocks and noise levels
        "fid": {"task": "fid", "results": {"fid": 3.0}},
        "words": good | {"results": {"top1": "high"}},
        "none": good | {"data": None},
        "list": [1],
        "null": None,
    }
    for name, content in files.items():
        write_json(folder / "evals" / name / "results.json", content)
    write(folder / "evals" / "cut" / "results.json", b'{"task": "linear"')
    write(folder / "evals" / "bytes" / "results.json", b"\xff")
    (folder / "evals" / "folder" / "results.json").mkdir(parents=True)
    card = (export(folder, tmp_path / "out") / "README.md").read_text()
    assert scores(card) == [["linear", "a (9 images)", "top1 50.00", "not recorded"]]


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
