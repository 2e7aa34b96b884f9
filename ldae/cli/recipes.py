"""Commands that train on a backbone by a recipe: ``ldae finetune BACKBONE --recipe NAME``."""

from collections.abc import Callable, Sequence
from importlib import import_module

from ldae.cli.commands import BY_RECIPE
from ldae.cli.flags import asks_help, pop_positional, split_options
from ldae.cli.settings import call_with_settings
from ldae.errors import InputError


def call_with_recipe(command: str, argv: Sequence[str], function: Callable) -> None:
    """Read what sets the defaults first: backbone, recipe, its version in the run, and size."""
    recipes = import_module(BY_RECIPE[command])
    chosen, rest = split_options(argv, recipe=recipes.DEFAULT, size="")
    backbone = pop_positional(rest)
    names = ", ".join(recipes.RECIPES)
    recipe = "[--recipe NAME]" if recipes.DEFAULT else "--recipe NAME"
    if asks_help(rest):
        name = chosen.recipe or next(iter(recipes.RECIPES))
        base = recipes.RECIPES.config(name, chosen.size or "B")
    elif backbone is None or not chosen.recipe:
        raise InputError(
            f"name a backbone and a recipe: ldae {command} BACKBONE {recipe} ... ({names})"
        )
    else:
        make = getattr(recipes, f"{command}_config")
        run = split_options(rest, run="")[0].run
        base = make(backbone, chosen.recipe, size=chosen.size, run=run)
    call_with_settings(
        command,
        function,
        rest,
        base,
        usage=f"BACKBONE {recipe} [--size SIZE]",
        argument="BACKBONE (a run folder, an exported folder, a timm name or NAME@FILE) by the "
        f"recipe NAME ({names}) for SIZE (B, L or H; by default from the backbone's width)",
    )
