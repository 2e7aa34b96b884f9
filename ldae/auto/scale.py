"""The settings that the scale auto decides for a run: measured at its start, then kept."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldae import tree
from ldae.auto.choosing import Choosing
from ldae.auto.rule import DECODER, LEAST_IMAGES, Choices
from ldae.data.open import open_source
from ldae.devices import device_for
from ldae.distributed import gather_values
from ldae.errors import InputError, unknown
from ldae.precision import unchanged_generators
from ldae.pretraining.recipes import name_of, recipes_of
from ldae.pretraining.training import join_ranks
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import settings_of
from ldae.tokenizers import TOKENIZERS
from ldae.tokenizers.orthonormal import OrthonormalTokenizer

HOURS = 4.0  # by default

SETTINGS = (
    "data.img_size", "data.stats", "model.patch_size", "tokenizer.dim",
    "model.name", "model.depth", "model.embed_dim", "model.num_heads",
    *DECODER,
    "optim.epochs", "optim.warmup_epochs", "optim.batch_size", "optim.blr",
    "system.device_batch", "system.workers",
)  # fmt: skip
"""The settings that the scale auto decides, as far as a recipe has them."""


@contextmanager
def settled(
    config: Any, run: Path, kind: str, row: str, hours: float, keep: Iterable[str] = ()
) -> Iterator[Any]:
    """Join the process group, and yield the settings that ``decide`` returns for the run.

    Rank 0 measures before the ranks join, so that nothing it does waits for another rank. The
    others wait for it, and get its settings or its error.

    Raises: InputError as ``decide``.
    """
    decided: Any = config
    if os.environ.get("RANK", "0") == "0":
        try:
            decided = decide(config, run, kind, row, hours, keep)
        except InputError as error:
            decided = error
    with join_ranks(config.system):
        decided = gather_values(decided)[0]
        if isinstance(decided, InputError):
            raise decided
        yield decided


def decide(
    config: Any, run: Path, kind: str, row: str, hours: float, keep: Iterable[str] = ()
) -> Any:
    """Return the settings of the run in the folder ``run`` by the scale auto.

    A run with a checkpoint keeps what was decided at its start. For a new run the images and the
    machine are measured, and a table with a reason for each setting is printed, with a sentence
    when other processes slow the measurement down or the hours are too few for the network.

    Args:
        config: the settings of the user. What differs from the recipe at the scale paper stays.
        row: the name of the recipe; for another name, the recipe whose settings these are.
        keep: dotted names of further settings that stay.

    Raises: InputError when there is nothing to choose for these settings, hours or images.
    """
    check(config, hours)
    known = tree.flatten(config)
    named = {*tree.difference(_recipe(config, kind, row), config), *keep}
    for name in named - known.keys():
        raise unknown("keep: there is no setting", name, known)
    given = {name: known[name] for name in SETTINGS if name in named}
    if Checkpoints(run).paths():
        before = tree.flatten(settings_of(run, kind))
        print(f"{run}: goes on with its own settings; the scale auto is for the start of a run")
        return tree.put(config, {n: before[n] for n in SETTINGS if n in known} | given)
    device = device_for(config.system.device)
    source = open_source(config.data.source, "train")
    if len(source) < LEAST_IMAGES:
        raise InputError(
            f"the scale auto needs at least {LEAST_IMAGES} images, and {source.spec} has "
            f"{len(source)}"
        )
    print(f"scale auto: {len(source):,} images, {hours:g} hours on {device}; measuring ...")
    choosing = Choosing(config, source, device, hours, given)
    with unchanged_generators():
        choices = choosing.choose()
    print(table(choices), flush=True)
    for warning in choosing.warnings:
        print(warning, flush=True)
    return tree.put(config, {name: choice.value for name, choice in choices.items()})


def _recipe(config: Any, kind: str, row: str) -> Any:
    """Return the recipe of these settings at the scale paper; without one, their kind's default."""
    found = recipes_of(kind)
    names = [name for name in (row, name_of(config, kind)) if name in found.SUMMARIES]
    return found.config(names[0] if names else found.DEFAULT, "paper")


def check(config: Any, hours: float) -> None:
    """Refuse hours and recipes that the scale auto cannot choose for.

    Raises: InputError.
    """
    tree.POSITIVE.check("hours", hours)
    if getattr(config, "init_from", ""):
        raise InputError("the scale auto chooses a network, but init_from names one: leave one out")
    tokenizer = getattr(config, "tokenizer", None)
    if tokenizer is None:  # MAE
        return
    if not issubclass(TOKENIZERS[tokenizer.name], OrthonormalTokenizer):
        raise InputError(
            f"the scale auto chooses nothing for the tokenizer {tokenizer.name}, which has to be "
            "trained: take a row with patch_pca, such as l_dae, or another scale"
        )
    if config.model.denoiser != "dit":
        raise InputError(
            f"the scale auto chooses a ViT, but model.denoiser is {config.model.denoiser}: take "
            "another scale"
        )


def table(choices: Choices) -> str:
    """Return a line for each setting: its name, its value and the reason."""
    lines = [(name, *choices[name]) for name in SETTINGS if name in choices]
    width = max(len(str(value)) for _, value, _ in lines)
    return "\n".join(f"  {name:26}{value!s:{width}}  {why}".rstrip() for name, value, why in lines)
