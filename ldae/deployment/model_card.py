"""The model cards of exported networks: the README.md that the hub shows."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ldae.backbones.open import has_classifier
from ldae.backbones.preprocessing import preprocessing
from ldae.backbones.timm_folder import README
from ldae.backbones.whitening import is_whitened
from ldae.evals.scores import public_name, score_table
from ldae.runs.kinds import Exported

_TABLE = "| | |\n|---|---|\n"  # the head of the table of facts
_GRAPHS = "\n## Graphs\n\n"
_LICENSE = "license of the weights"
_WHITENED_BY = (
    "`head`, from {images:,} images of {data} ({split}), shrinkage {shrinkage:g}; "
    "`num_classes=0` leaves it out"
)


def card_of_run(
    run: Path, exported: Exported, state: dict, config: Any, license: str, whitened: dict | None
) -> str:
    """Return the model card of a run's encoder.

    Args:
        state: the checkpoint.
        config: the settings of the run.
        whitened: the record of a whitening, if any.
    """
    vit, describe = exported.vit, state["describe"]
    params = sum(parameter.numel() for parameter in vit.parameters())
    table = score_table(run, params, state["images_seen"])
    name, heads = vit.pretrained_cfg["architecture"], vit.blocks[0].attn.num_heads
    side = vit.pretrained_cfg["input_size"][1]
    resized = "" if side == config.data.img_size else f", on {config.data.img_size} pixels a side"
    measured = f"Scores in percent, measured on the run{exported.graded}{resized}:"
    data = public_name(config.data.source)
    return model_card(
        run.resolve().name,
        ["image-feature-extraction", "timm", "self-supervised-learning", exported.tag],
        exported.description,
        {
            "row": Path(describe["row"]).name,  # it may be a .yaml file of settings
            "architecture": f"{name}: {len(vit.blocks)} blocks, width {vit.embed_dim}, "
            f"{heads} heads",
            **input_facts(vit),
            "pre-trained on": f"{describe['images']:,} images of {data}, "
            f"{state['images_seen']:,} seen",
            **_start(config),
            "recipe": _recipe(config),
            _LICENSE: license or "none claimed",
        }
        | exported.facts
        | _whitening_facts(whitened),
        f"features = model(transform(image).unsqueeze(0))  # (1, {vit.embed_dim})",
        license=license,
        scores=f"{measured}\n\n{table}" if table else "",
    )


def _start(config: Any) -> dict[str, str]:
    """Return the weights that a run began with: their license may bind its own."""
    if not config.init_from:
        return {}
    name, _, file = config.init_from.partition("@")
    return {"begun from": f"{Path(name).name}@{Path(file).name}" if file else Path(name).name}


def _recipe(config: Any) -> str:
    """Return the training of a run in a line."""
    data, optim = config.data, config.optim
    parts = [
        f"{optim.epochs:g} epochs",
        f"batch {optim.batch_size:,}",
        f"blr {optim.blr:g} after {optim.warmup_epochs:g} epochs of warm-up",
        f"weight decay {optim.weight_decay:g}",
        f"{data.crop} crops" + (" and flips" if data.flip else ""),
    ]
    if optim.ema:
        parts.append(f"an average of the weights with decay {optim.ema:g}")
    return ", ".join(parts)


def _whitening_facts(whitened: dict | None) -> dict[str, str]:
    return {"whitened by": _WHITENED_BY.format(**whitened)} if whitened else {}


def card_of_network(
    spec: str, folder: Path | None, model: nn.Module, license: str, whitened: dict | None
) -> str:
    """Return the card of the folder that the network comes from, or else a new one.

    A network with another task than that folder's, a classifier without its head, gets a new one.
    """
    cfg = model.pretrained_cfg
    is_classifier = bool(model.num_classes) and not is_whitened(cfg)
    if folder and (folder / README).is_file() and has_classifier(folder) == is_classifier:
        text = with_graphs((folder / README).read_text(encoding="utf-8"), "")
        claimed = {_LICENSE: license} if license else {}
        text = with_facts(text, input_facts(model) | _whitening_facts(whitened) | claimed)
        return with_license(text, license) if license else text
    name = spec.partition("@")[0] if folder is None else folder.resolve().name
    license, seen = license or cfg.get("license") or "", getattr(model, "images_seen", None)
    task = "image classifier" if is_classifier else "image encoder"
    with torch.no_grad():
        outputs = model(torch.zeros(1, *preprocessing(model).input_size)).shape[1:]
    params = sum(parameter.numel() for parameter in model.parameters())
    table = score_table(folder, params, seen) if folder else ""
    return model_card(
        name,
        ["timm", "image-feature-extraction" if task == "image encoder" else "image-classification"],
        f"An {task} in the format of timm, exported with ldae from {name}.",
        {
            "architecture": cfg["architecture"],
            **input_facts(model),
            "parameters": f"{params:,}",
            _LICENSE: license or "none claimed",
        }
        | ({} if seen is None else {"pre-trained on": f"{seen:,} images seen"})
        | _whitening_facts(whitened),
        f"output = model(transform(image).unsqueeze(0))  # (1, {', '.join(map(str, outputs))})",
        license=license,
        scores=f"Scores in percent:\n\n{table}" if table else "",
    )


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
