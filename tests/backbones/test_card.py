"""What the hub and timm's users read of an exported network."""

import re

import yaml
from PIL import Image

from ldae.backbones.card import model_card
from ldae.commands.export import export


def test_a_card_is_front_matter_a_table_and_code():
    card = model_card("name", ["a", "b"], "What it is.", {"one": 1, "two": "x"}, "model(1)")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "timm", "tags": ["a", "b"]}
    assert body.startswith("# name\n\nWhat it is.\n\n| | |\n|---|---|\n| one | 1 |\n| two | x |\n")
    assert body.endswith("\nmodel(1)\n```\n")


def test_the_code_of_a_card_runs(run, tmp_path):
    folder = export(run(), tmp_path / "exported")
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    names = {"image": Image.new("RGB", (40, 40))}
    exec(code.replace("PATH", str(folder)), names)
    wanted = re.search(r"# \(1, (\d+)\)", code)[1]
    assert names["features"].shape == (1, int(wanted))
    assert "arxiv.org/abs/2401.14404" in card and "pypi.org" not in card
