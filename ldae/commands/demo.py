"""``ldae demo``: pre-training, evaluation with controls and export, on built-in images."""

import time
from dataclasses import replace
from pathlib import Path

from ldae import trajectory, tree
from ldae.commands.export import export
from ldae.commands.knn import knn
from ldae.commands.linear import CachedProtocol, linear
from ldae.commands.pretrain import pretrain
from ldae.console import format_duration
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.neighbours import KNNProtocol
from ldae.files import as_json, write_json
from ldae.runs import layout
from ldae.tree import AnyPath

DATA = "scattered-digits:20000"
_PROBE_EPOCHS = 20  # instead of 90, since the demo takes five minutes


def demo(run: AnyPath = Path("runs/demo"), epochs: float = 2.5) -> dict:
    """Pre-train l-DAE on scattered digits, export its backbone, and compare it with controls.

    The same command again resumes.

    Args:
        run: the run folder; its sub-folder ``exported`` gets the backbone.
        epochs: passes over the 20,000 training images.

    Returns: (k-NN, linear) accuracies in percent by backbone, which are also in ``demo.json``.

    Raises: InputError when the exported backbone does not score as the run does.

    Examples:
        >>> ldae.demo("runs/demo")["l-DAE"]  # k-NN and linear, in percent
    """
    run, start = Path(run).expanduser(), time.perf_counter()
    config = trajectory.config("l_dae", scale="demo")
    warmup = min(config.optim.warmup_epochs, epochs / 2)
    changes = {"data.source": DATA, "optim.epochs": epochs, "optim.warmup_epochs": warmup}
    config = tree.replace(config, changes)
    pretrain(config, run, "l_dae")
    exported = run / layout.EXPORTED
    if not exported.exists():
        export(run, exported)
    table = {
        "raw pixels": _grade("pixels", run),
        "random ViT (timm's initialisation)": _grade(str(exported), run, random_init=True),
        "l-DAE": _grade(str(run), run),
        "l-DAE, exported and reopened by timm": _grade(str(exported), run),
    }
    write_json(run / layout.DEMO, table)
    print(f"\n{DATA.split(':')[0]}, top-1 in percent{'':14} k-NN  linear")
    for name, (neighbours, probe) in table.items():
        print(f"{name:40} {neighbours:6.1f}  {probe:6.1f}")
    print(f"\nrun folder         {run}")
    print(f"exported backbone  {exported}")
    print(f"denoising          {run / layout.DENOISED} (clean, noised, denoised)")
    print(f"tokenizer filters  {run / layout.FILTERS}")
    print(f"time               {format_duration(time.perf_counter() - start)}")
    inside, reopened = list(table.values())[-2:]
    if inside != reopened:
        raise InputError(f"the exported backbone scores {reopened}, the run {inside}")
    return as_json(table)


def _grade(backbone: str, run: Path, random_init: bool = False) -> tuple[float, float]:
    """Return the top-1 of 20 nearest neighbours and of a linear probe, on 10,000 images."""
    folder = run / layout.EVALS / f"{Path(backbone).name}{'-random-init' if random_init else ''}"
    setup = Setup(random_init=random_init, workers=0)
    images, vote = "scattered-digits:10000", KNNProtocol(k=(20,))
    neighbours = knn(backbone, images, protocol=vote, setup=replace(setup, out=folder / "knn"))
    sweep = CachedProtocol(epochs=_PROBE_EPOCHS)
    probe = linear(backbone, images, protocol=sweep, setup=replace(setup, out=folder / "linear"))
    return neighbours["results"]["top1_k20"], probe["results"]["top1"]
