"""The model card of an exported network: the README.md that the hub shows."""

from collections.abc import Mapping, Sequence

import yaml


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

| | |
|---|---|
{rows}
{below}
```python
import timm

model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # or hf-hub:USER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{usage}
```
"""


_GRAPHS = "\n## Graphs\n\n"


def with_graphs(card: str, table: str) -> str:
    """Return a model card with a section that shows this table of graphs; empty: without one."""
    body = card.partition(_GRAPHS)[0]
    return f"{body}{_GRAPHS}{table}\n" if table else body


def with_license(card: str, license: str) -> str:
    """Return a model card whose front matter claims this license."""
    _, head, body = card.split("---\n", 2)
    claimed = yaml.safe_load(head) | {"license": license}
    return f"---\n{yaml.safe_dump(claimed, sort_keys=False)}---\n{body}"
