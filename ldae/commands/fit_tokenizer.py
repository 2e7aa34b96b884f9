"""``ldae fit-tokenizer``: fit or train a row's tokenizer by itself."""

from pathlib import Path

from ldae import distributed, tree
from ldae.console import describe, print_main
from ldae.data.open import open_source
from ldae.errors import InputError
from ldae.pretraining.tokenizer import Fit, carry_out, open_fit, prepare
from ldae.runs import layout
from ldae.settings import Config
from ldae.train.optim import peak_lr


def fit_tokenizer(config: Config, run: Path, row: str, dry_run: bool = False) -> None:
    """Fit the tokenizer of ``config`` in the folder ``run``, or go on with what is there.

    The folder gets config.yaml, environment.json, tokenizer.safetensors, reconstruction.json and
    reconstructed.png, and metrics.jsonl and checkpoints/ where gradients train it. The same call
    again resumes; a finished fit is left as it is. A dry run prints what would be done.

    Raises: InputError for settings, weights or data that do not fit; Interrupted by Ctrl-C or SIGTERM.
    """
    run = Path(run)
    device = distributed.device_for(config.system.device)
    with distributed.process_group(device, config.system.rank_timeout):
        tree.check(config)
        if not config.data.source:
            raise InputError("no images: say where they are with --data SOURCE")
        if config.tokenizer.path:
            raise InputError("tokenizer.path names a fitted tokenizer, and this verb fits one")
        fit = prepare(config, open_source(config.data.source, "train"), device, run)
        if dry_run:
            print(describe(fit.config, _facts(fit)))
            return
        with open_fit(fit, run):
            carry_out(fit, run, row)
        print_main(f"{run}: done; {layout.TOKENIZER}, pictures in {layout.RECONSTRUCTED}")


def _facts(fit: Fit) -> dict[str, str]:
    tokenizer, optim, plan = fit.tokenizer, fit.config.tokenizer.optim, fit.plan
    images = min(fit.config.tokenizer.fit_images or len(fit.source), len(fit.source))
    how = f"one pass over {images:,} images"
    if plan:
        how = (
            f"{plan.steps:,} steps of {plan.batch_size} images, {plan.total:,} images "
            f"seen, learning rate {peak_lr(optim):.3g} at its peak"
        )
    return {
        "parameters": f"{sum(p.numel() for p in tokenizer.parameters()):,}",
        "tokens per image": f"{tokenizer.num_tokens}, each of {tokenizer.dim} numbers",
        "images": f"{len(fit.source):,} in {fit.source.spec}",
        "fitted in": how,
    }
