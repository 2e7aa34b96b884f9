"""The model card of an exported network: the README.md that the hub shows."""

from collections.abc import Mapping, Sequence


def model_card(
    title: str, tags: Sequence[str], description: str, facts: Mapping[str, object], usage: str
) -> str:
    """Return a model card as Markdown.

    Args:
        title: the heading.
        tags: the hub's tags.
        description: one paragraph.
        facts: the rows of a table of two columns.
        usage: lines of Python about ``model`` and ``transform``, which the card defines.
    """
    tag_lines = "\n".join(f"- {tag}" for tag in tags)
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: timm
tags:
{tag_lines}
---
# {title}

{description}

| | |
|---|---|
{rows}

```python
import timm

model = timm.create_model("local-dir:PATH", pretrained=True).eval()  # or hf-hub:USER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{usage}
```
"""
