"""The model card of an exported network: the README.md that the hub shows."""

import re
from collections.abc import Mapping, Sequence

import yaml
from torch import nn

from ldae.backbones.preprocessing import preprocessing

_TABLE = "| | |\n|---|---|\n"  # the head of the table of facts


def model_card(
    title: str,
    tags: Sequence[str],
    description: str,
    facts: Mapping[str, object],
    usage: str,
    *,
    license: str = "",
    scores: str = "",
) -> str:
    """Return a model card as Markdown.

    Args:
        title: the heading.
        tags: the hub's tags.
        description: one paragraph.
        facts: the rows of a table of two columns.
        usage: lines of Python about ``model`` and ``transform``, which the card defines.
        license: of the weights, as the hub spells it; empty: the card names none.
        scores: Markdown to show below the facts, if any.
    """
    claimed = {"license": license} if license else {}
    head = yaml.safe_dump({"library_name": "timm", **claimed, "tags": list(tags)}, sort_keys=False)
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    below = f"\n{scores}\n" if scores else ""
    return f"""---
{head}---
# {title}

{description}

{_TABLE}{rows}
{below}
```python
import timm

model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # or hf-hub:USER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{usage}
```
"""


def input_facts(model: nn.Module) -> dict[str, str]:
    """Return the rows of a card about the images that a timm model takes."""
    how = preprocessing(model)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    chans, *_ = how.input_size
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (how.mean, how.std))
    return {
        "input": " x ".join(map(str, how.input_size)) + (f", patch {patch[0]}" if patch else ""),
        "preprocessing": f"{'RGB' if chans == 3 else f'{chans} channels'}, upright by EXIF; "
        f"{how.interpolation}, crop_pct {how.crop_pct:g}, crop_mode {how.crop_mode}; "
        f"mean {mean} and std {std} of pixels from 0 to 1",
    }


def with_facts(card: str, facts: Mapping[str, object]) -> str:
    """Return a model card whose table has these rows, in place of those of the same names."""
    head, table, body = card.partition(_TABLE)
    rows, end, rest = body.partition("\n\n")
    if not table:  # of another author
        return card
    for name, value in facts.items():
        row = f"| {name} | {value} |"
        rows, found = re.subn(rf"^\| {re.escape(name)} \|.*$", lambda _: row, rows, flags=re.M)
        rows += "" if found else f"\n{row}"
    return f"{head}{table}{rows}{end}{rest}"


_GRAPHS = "\n## Graphs\n\n"


def with_graphs(card: str, table: str) -> str:
    """Return a model card with a section that shows this table of graphs; empty: without one."""
    body = card.partition(_GRAPHS)[0]
    return f"{body}{_GRAPHS}{table}\n" if table else body


def with_license(card: str, license: str) -> str:
    """Return a model card whose front matter claims this license."""
    parts = card.split("---\n", 2)
    has_front_matter = len(parts) == 3 and not parts[0]
    head, body = parts[1:] if has_front_matter else ("{}", card)
    claimed = yaml.safe_load(head) | {"license": license}
    return f"---\n{yaml.safe_dump(claimed, sort_keys=False)}---\n{body}"
