"""The linear probe: a linear classifier on frozen features, by three protocols of the field."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ldae.errors import InputError
from ldae.evals.classifier import check_savable, save_classifier
from ldae.evals.evaluation import BackboneSpec, Evaluation, Setup, SourceSpec, open_evaluation
from ldae.evals.features import Encoder, Features, known_labels, names, own_rows
from ldae.evals.heads import Head, Heads, grade_heads, train_heads
from ldae.evals.online import OnlineProtocol, check_sizes, forget, train_online
from ldae.evals.subsets import held_out
from ldae.evals.sweep import SweepProtocol, sweep
from ldae.evals.taps import Pool, Tap, TapReader
from ldae.tree import POSITIVE


@dataclass(frozen=True)
class CachedProtocol(SweepProtocol):
    """Every constant of the number of a sweep over features that are extracted once."""

    name: str = "cached"
    version: int = 2
    """1 was without weight decays, blocks and pools; its numbers are those of 2 without them."""
    blocks: tuple[int, ...] = ()
    """None: the model's own output."""
    pools: tuple[Pool, ...] = ("default",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pools:
            raise InputError("pools must name at least one")

    @property
    def taps(self) -> tuple[Tap, ...]:
        return tuple(Tap(block, pool) for block in self.blocks or (None,) for pool in self.pools)

    @property
    def heads(self) -> list[Head]:
        """Every candidate."""
        return self.heads_of(self.taps)


@dataclass(frozen=True)
class MAEProtocol(OnlineProtocol):
    """Source: MAE, main_linprobe.py, util/lars.py, util/crop.py, util/lr_sched.py, FINETUNE.md."""

    name: str = "mae"
    blr: Annotated[float, POSITIVE] = 0.1
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"


@dataclass(frozen=True)
class LDAEProtocol(OnlineProtocol):
    """MAE's with the rate of the l-DAE paper, 6.4e-3, whose optimizer is not stated."""

    name: str = "ldae"
    blr: Annotated[float, POSITIVE] = 1e-4
    optimizer: Literal["lars", "sgd", "adamw"] = "sgd"


PROTOCOLS = {"cached": CachedProtocol, "mae": MAEProtocol, "ldae": LDAEProtocol}


def linear(
    backbone: BackboneSpec,
    /,
    data: SourceSpec,
    eval_data: SourceSpec | None = None,
    *,
    protocol: Literal["cached", "mae", "ldae"] = "cached",
    learning_rates: tuple[float, ...] | None = None,
    weight_decays: tuple[float, ...] | None = None,
    blocks: tuple[int, ...] | None = None,
    pools: tuple[Pool, ...] | None = None,
    epochs: int | None = None,
    total_batch: int | None = None,
    blr: float | None = None,
    warmup_epochs: int | None = None,
    optimizer: Literal["lars", "sgd", "adamw"] | None = None,
    save: Path | None = None,
    setup: Annotated[Setup, tyro.conf.arg(name="")] = Setup(),
) -> dict:
    """Grade a backbone by a linear classifier on its frozen features.

    What is not given is the protocol's. A changed constant is part of the results' name, and their
    protocol is recorded as modified.

    Args:
        backbone: a run folder, an exported folder, a timm name, NAME@FILE or pixels[:SIZE].
        data: the labelled images whose train split is learned from.
        eval_data: the images to classify instead of the evaluation split of data.
        protocol: cached: features once, the best of many heads on a tenth of train, then all of it;
            mae: LARS at batch 16384 on augmented images; ldae: the same at the paper's rate.
        learning_rates: cached: at a batch of 256, all trained together.
        weight_decays: cached: each with each learning rate.
        blocks: cached: numbers of blocks or stages, from the end if negative, instead of the output.
        pools: cached: default, avg, cls or cls+avg, each at each block; of blocks, avg if not given.
        epochs: passes over train.
        total_batch: images of one update.
        blr: mae, ldae: learning rate at a batch of 256.
        warmup_epochs: mae, ldae: passes of linear warm-up.
        optimizer: mae, ldae: lars, sgd or adamw.
        save: folder to write the classifier to, backbone and head, as timm opens it.
        setup: how the backbone is opened and run.

    Returns: what results.json holds; its results are top-1 and top-5 in percent after the last
    epoch, and of a sweep the chosen head and the top-1 of each on the tenth of train.

    Raises: InputError for a backbone or data that can not be graded, and for a setting that the
        protocol has not.
    """
    constants = _constants(
        protocol,
        setup.seed,
        learning_rates=learning_rates,
        weight_decays=weight_decays,
        blocks=blocks,
        pools=pools or (("avg",) if blocks else None),
        epochs=epochs,
        total_batch=total_batch,
        blr=blr,
        warmup_epochs=warmup_epochs,
        optimizer=optimizer,
    )
    run = _run_cached if protocol == "cached" else _run_online
    task = "linear" if protocol == "cached" else f"linear-{protocol}"
    with open_evaluation(task, backbone, data, eval_data, setup) as graded:
        if save:  # before the work, not after
            if constants.taps != (Tap(),):
                raise InputError("--save takes the model's own output, not blocks or other pools")
            check_savable(graded.model, save)
        learn = run(graded, constants)
        heads, results, dim = learn()
        record = graded.write(constants, results, dim)
        if save:
            save_classifier(graded.model, heads, graded.train.classes, save, graded.eval)
        forget(graded.folder(constants))
        return record


def _constants(protocol: str, seed: int, **given: object) -> CachedProtocol | OnlineProtocol:
    """The protocol with what is given in the place of its own.

    Raises: InputError for what it has not, or does not take.
    """
    base = PROTOCOLS[protocol](seed=seed)
    changes = {key: value for key, value in given.items() if value is not None}
    for key in changes:
        if not hasattr(base, key):
            raise InputError(f"{key.replace('_', '-')} is no setting of the protocol {protocol}")
    return replace(base, **changes)


Learn = Callable[[], tuple[Heads, dict, int]]


def _run_cached(graded: Evaluation, protocol: CachedProtocol) -> Learn:
    """What learns, once all that can be refused has been."""
    labels = known_labels(graded.train)
    held = held_out(names(graded.train), labels, protocol.held_out)
    setup = graded.setup
    reader = TapReader(graded.model, protocol.taps)
    encoder = Encoder(graded.model, graded.device, setup.precision, reader=reader)

    def learn() -> tuple[Heads, dict, int]:
        train, evaluation = (
            own_rows(encoder, source, setup.batch_size, setup.workers)
            for source in (graded.train, graded.eval)
        )
        classes = int(labels.max()) + 1
        heads, results = linear_probe(train, evaluation, held, classes, protocol, graded.device)
        return heads, results, heads.weight.shape[2]

    return learn


def _run_online(graded: Evaluation, protocol: OnlineProtocol) -> Learn:
    setup = graded.setup
    encoder = Encoder(graded.model, graded.device, setup.precision)
    check_sizes(encoder, len(graded.train), protocol)

    def learn() -> tuple[Heads, dict, int]:
        how = (setup.batch_size, setup.workers)
        folder = graded.folder(protocol)
        heads, record = train_online(encoder, graded.train, protocol, *how, folder)
        evaluation = own_rows(encoder, graded.eval, *how)
        top1, top5 = grade_heads({Tap(): heads}, evaluation, graded.device)[Tap()][0].tolist()
        return heads, {"top1": top1, "top5": top5, **record}, encoder.dim

    return learn


def linear_probe(
    train: Features,
    evaluation: Features,
    held: torch.Tensor,
    classes: int,
    protocol: CachedProtocol = CachedProtocol(),
    device: torch.device = torch.device("cpu"),
) -> tuple[Heads, dict]:
    """The chosen head, trained on all of ``train``, and its results on ``evaluation`` in percent.

    Both are this rank's share; ``held`` (N,) tells which of all train images choose.
    """
    swept = sweep(train, held, classes, protocol.heads, protocol, device)
    best = max(swept, key=swept.get)
    trained = train_heads(train, [best], classes, protocol, device)
    top1, top5 = grade_heads(trained, evaluation, device)[best.tap][0].tolist()
    return trained[best.tap], {
        "top1": top1,
        "top5": top5,
        **best.record(),
        "sweep": [head.record() | {"held_out_top1": found} for head, found in swept.items()],
    }
