"""``ldae linear``: grade a backbone by a linear classifier on its frozen features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Fixed

from ldae.console import print_main
from ldae.errors import InputError
from ldae.evals.augmented import (
    AugmentedProtocol,
    check_batch_sizes,
    remove_training,
    train_on_augmented,
)
from ldae.evals.classifier import check_savable, save_classifier
from ldae.evals.evaluation import (
    EvalSourceSpec,
    Evaluation,
    FeaturesSourceSpec,
    FeaturesSpec,
    Setup,
)
from ldae.evals.features import Features, extract_share, image_names, known_labels
from ldae.evals.heads import (
    Head,
    Heads,
    SweepProtocol,
    grade_heads,
    report_few_updates,
    sweep,
    train_heads,
)
from ldae.evals.open import data_of, open_evaluation
from ldae.evals.predictions import Predictions
from ldae.evals.seeds import over_seeds
from ldae.evals.subsets import held_out
from ldae.evals.taps import Pool, Tap, taps_of
from ldae.precision import unchanged_generators
from ldae.tree import POSITIVE, AnyPath


@dataclass(frozen=True)
class CachedProtocol(SweepProtocol):
    """The best of many heads on features that are extracted once.

    Every head is trained on nine tenths of train. The best on the held-out tenth is trained again,
    on all of train.
    """

    shares_features = True
    name: Fixed[str] = "cached"
    version: Fixed[int] = 2
    """Version 1 had no weight decays, blocks and pools; without these, 2 gives the same numbers."""
    blocks: tuple[int, ...] = ()
    """Blocks or stages, counted from 0, or from the end if negative, instead of the model's own
    output. Block 11 is the last of 12, behind what ldae grid calls 12 leading blocks."""
    pools: tuple[Pool, ...] | None = None
    """Poolings, tried at each block; by default the model's own, or avg if blocks are given."""

    def __post_init__(self) -> None:
        if self.pools is None:
            self._set("pools", tuple(dict.fromkeys(tap.pool for tap in self.taps)))
        super().__post_init__()

    @property
    def taps(self) -> tuple[Tap, ...]:
        return taps_of(self.blocks, self.pools)

    @property
    def heads(self) -> list[Head]:
        """Every candidate of the sweep."""
        return self.heads_of(self.taps)


@dataclass(frozen=True)
class MAEProtocol(AugmentedProtocol):
    """MAE's probe by LARS, on images that are augmented anew in every epoch.

    Source: MAE, main_linprobe.py, util/lars.py, util/crop.py, util/lr_sched.py, FINETUNE.md.
    """

    name: Fixed[str] = "mae"
    blr: Annotated[float, POSITIVE] = 0.1
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"


@dataclass(frozen=True)
class LDAEProtocol(AugmentedProtocol):
    """MAE's probe by SGD at the rate of the l-DAE paper, which states no optimizer.

    The rate is 6.4e-3 at a batch of 16,384.
    """

    name: Fixed[str] = "ldae"
    blr: Annotated[float, POSITIVE] = 1e-4
    optimizer: Literal["lars", "sgd", "adamw"] = "sgd"


@unchanged_generators()
@over_seeds
def linear(
    backbone: FeaturesSpec,
    /,
    data: FeaturesSourceSpec = None,
    eval_data: EvalSourceSpec = None,
    *,
    protocol: CachedProtocol | MAEProtocol | LDAEProtocol = CachedProtocol(),
    save: AnyPath | None = None,
    predictions: bool = False,
    setup: Setup = Setup(),
) -> dict:
    """Grade a backbone by a linear classifier on its frozen features.

    Args:
        save: folder for the classifier, backbone and head, as timm opens it.
        predictions: write the predicted class of each image to predictions.npz, beside
            results.json.

    Returns: the content of results.json; its results are top-1 and top-5 in percent after the last
    epoch, and for a sweep the chosen head and the held-out top-1 of every head.

    Raises: InputError for a backbone or data that cannot be graded.

    Examples:
        >>> ldae.linear("runs/l_dae", "/data/imagenet")["results"]["top1"]
        >>> protocol = ldae.MAEProtocol(blr=0.2)
        >>> ldae.linear("vit_base_patch16_224.mae", "/data/imagenet", protocol=protocol)
    """
    save = Path(save).expanduser() if save else None
    data, cached = data_of(backbone, data), isinstance(protocol, CachedProtocol)
    task, grade = ("linear", _sweep) if cached else (f"linear-{protocol.name}", _train_on_augmented)
    with open_evaluation(
        task, backbone, data, eval_data, protocol, setup, predictions=predictions
    ) as evaluation:
        if save:  # checked before the training
            if protocol.taps != (Tap(),):
                raise InputError("--save needs the model's own output, not blocks or other pools")
            check_savable(evaluation.model, save)
        predicted = Predictions(evaluation.eval, evaluation.device) if predictions else None
        heads, results, dim = grade(evaluation, predicted)
        record = evaluation.write(results, dim)
        if predicted:
            predicted.save(evaluation.folder)
        if save:
            classes = evaluation.train.classes
            save_classifier(evaluation.model, heads, classes, save, evaluation.eval)
            print_main(f"classifier in {save}")
        remove_training(evaluation.folder)
        return record


def _sweep(evaluation: Evaluation, predicted: Predictions | None) -> tuple[Heads, dict, int]:
    """Return the chosen head, its results and the width of its features."""
    protocol, labels = evaluation.protocol, known_labels(evaluation.train)
    held = held_out(image_names(evaluation.train), labels, protocol.held_out)
    train, test = evaluation.features(protocol.taps)
    classes = int(labels.max()) + 1
    heads, results = linear_probe(
        train, test, held, classes, protocol, evaluation.device, predicted
    )
    return heads, results, heads.weight.shape[2]


def _train_on_augmented(
    evaluation: Evaluation, predicted: Predictions | None
) -> tuple[Heads, dict, int]:
    """Return the head trained on augmented images, its results and the width of its features."""
    protocol, encoder = evaluation.protocol, evaluation.encoder()
    check_batch_sizes(encoder, len(evaluation.train), protocol)
    heads, record = train_on_augmented(encoder, evaluation.train, protocol, evaluation.folder)
    test = extract_share(encoder, evaluation.eval)
    top1, top5 = grade_heads({Tap(): heads}, test, evaluation.device)[Tap()][0].tolist()
    if predicted:
        predicted.classify("top1", heads, test)
    return heads, {"top1": top1, "top5": top5, **record}, encoder.dim


def linear_probe(
    train: Features,
    test: Features,
    held: torch.Tensor,
    classes: int,
    protocol: CachedProtocol = CachedProtocol(),
    device: torch.device = torch.device("cpu"),
    predicted: Predictions | None = None,
) -> tuple[Heads, dict]:
    """Return the chosen head, trained on all of ``train``, and its results on ``test`` in percent.

    Both are this rank's share. ``held`` (N,) marks which of all train images choose the head, and
    ``predicted`` gets the classes that it predicts.
    """
    report_few_updates(held, protocol)
    swept = sweep(train, held, classes, protocol.heads, protocol, device)
    best = max(swept, key=swept.get)
    trained = train_heads(train, [best], classes, protocol, device)
    top1, top5 = grade_heads(trained, test, device)[best.tap][0].tolist()
    if predicted:
        columns = test.columns[best.tap]
        predicted.classify("top1", lambda rows: trained[best.tap](rows[:, columns]), test)
    return trained[best.tap], {
        "top1": top1,
        "top5": top5,
        **best.record(),
        "sweep": [head.record() | {"held_out_top1": top1} for head, top1 in swept.items()],
    }
