"""``ldae fit-tokenizer``: fit or train the tokenizer of a row."""

import json
from pathlib import Path

from ldae import tree
from ldae.console import describe, print_main
from ldae.data.open import open_source
from ldae.errors import InputError
from ldae.precision import recorded_gradients, runs_in_bf16
from ldae.pretraining.recipes import name_of
from ldae.pretraining.tokenizer import Fit, fit_or_load, open_fit, prepare
from ldae.pretraining.training import join_ranks
from ldae.runs import layout
from ldae.runs.kinds import settings_and_folder
from ldae.settings import Config
from ldae.train.run import describe_training


@recorded_gradients()
def fit_tokenizer(
    config: Config | str | Path,
    run: str | Path | None = None,
    row: str = "",
    dry_run: bool = False,
) -> dict:
    """Fit the tokenizer of ``config`` in the folder ``run``, or resume the fit there.

    The folder gets config.yaml, environment.json, tokenizer.safetensors, reconstruction.json and
    reconstructed.png; a tokenizer that is trained adds metrics.jsonl and checkpoints/. A finished
    fit stays as it is. A dry run prints the settings and the plan, and writes nothing.

    Args:
        config: the settings, such as ``ldae.config`` returns; or a run folder, and no ``run``, to
            resume it by its own settings.
        run: the run folder, new or to resume.
        row: the name of the recipe in the records; by default the row whose settings these are.
        dry_run: print the settings and the plan, and stop.

    Returns: the content of reconstruction.json, or of a dry run the lines of the plan by name.

    Raises: InputError for wrong settings, weights or data; Interrupted after a stop signal.

    Examples:
        >>> config = ldae.config("patch_pca", changes={"data.source": "/data/imagenet"})
        >>> ldae.fit_tokenizer(config, "runs/pca")["results"]["psnr"]
    """
    _, config, run = settings_and_folder(config, run, ["tokenizer"])
    tree.check(config)
    row = row or name_of(config, "tokenizer")
    with join_ranks(config.system) as device:
        if config.tokenizer.path:
            raise InputError("tokenizer.path names a fitted tokenizer, but this command fits one")
        if config.data.latents:
            raise InputError("data.latents names latents, but a tokenizer is fitted to images")
        fit = prepare(config, open_source(config.data.source, "train"), device, run)
        if dry_run:
            facts = _facts(fit)
            print(describe(fit.config, facts))
            return facts
        with open_fit(fit, run):
            fit_or_load(fit, run, row)
        print_main(f"{run}: done; {layout.TOKENIZER}, pictures in {layout.RECONSTRUCTED}")
        return json.loads((run / layout.RECONSTRUCTION).read_text(encoding="utf-8"))


def _facts(fit: Fit) -> dict[str, str]:
    config, tokenizer = fit.config, fit.tokenizer
    facts = {
        "parameters": f"{sum(p.numel() for p in tokenizer.parameters()):,}",
        "tokens per image": f"{tokenizer.num_tokens}, each of {tokenizer.dim} numbers",
        "images": f"{len(fit.source):,} in {fit.source.spec}",
    }
    if not fit.plan:
        images = min(config.tokenizer.fit_images or len(fit.source), len(fit.source))
        return facts | {"fitted in": f"one pass over {images:,} images"}
    bf16 = runs_in_bf16(config.system.precision, fit.device)
    return facts | describe_training(fit.plan, config.tokenizer.optim, bf16, fit.device)
