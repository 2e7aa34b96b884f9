"""The linear probe: a linear classifier on frozen features, its learning rate chosen on train."""

import copy
import math
import os
import shutil
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import timm
import torch
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError
from torch import nn

from ldae.data.loader import eval_batches
from ldae.data.sources import Source
from ldae.distributed import barrier, is_main
from ldae.errors import InputError
from ldae.evals.accuracy import ranks, top
from ldae.evals.features import Features, known_labels, names
from ldae.evals.grading import BackboneSpec, Setup, SourceSpec, grading
from ldae.log import progress
from ldae.preprocessing import preprocessing

_ROWS_AT_ONCE = 1024
_IMAGES_VERIFIED = 64


@dataclass(frozen=True)
class LinearProtocol:
    """Every constant of the number.

    Source: head, schedule and epochs of MAE, main_linprobe.py; rates and optimizer of DINOv2,
    eval/linear.py, over a range that also fits averaged features of small models.
    """

    learning_rates: tuple[float, ...] = (
        0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
    )  # fmt: skip
    """At a batch of 256; times batch_size / 256 in use."""
    epochs: int = 90
    batch_size: int = 512
    momentum: float = 0.9
    weight_decay: float = 0.0  # the sweep in one pass relies on it
    batchnorm_eps: float = 1e-6
    init_std: float = 0.01
    held_out: int = 10
    """One in so many train images chooses the learning rate."""
    seed: int = 0
    """Of the initial weights and of the order of the batches."""

    def __post_init__(self) -> None:
        if not self.learning_rates or not min(self.learning_rates) > 0:
            raise InputError(f"learning_rates must be above 0, not {self.learning_rates}")
        if self.epochs < 1:
            raise InputError(f"epochs must be at least 1, not {self.epochs}")


def linear(
    backbone: BackboneSpec,
    /,
    data: SourceSpec,
    eval_data: SourceSpec | None = None,
    *,
    learning_rates: tuple[float, ...] = LinearProtocol.learning_rates,
    epochs: int = LinearProtocol.epochs,
    save: Path | None = None,
    setup: Annotated[Setup, tyro.conf.arg(name="")] = Setup(),
) -> dict:
    """Grade a backbone by a linear classifier on its frozen features, extracted once.

    Args:
        backbone: a run folder, an exported folder, a timm name, NAME@FILE or pixels[:SIZE].
        data: the labelled images whose train split is learned from.
        eval_data: the images to classify instead of the evaluation split of data.
        learning_rates: at a batch of 256; the best on a tenth of train is used.
        epochs: passes over the features.
        save: folder to write the classifier to, backbone and head, as timm opens it.
        setup: how the backbone is opened and run.

    Returns: what results.json holds; its results are top-1 and top-5 in percent after the last
    epoch, the learning rate, and the top-1 of every rate on the tenth of train that chose it.

    Raises: InputError for a backbone or data that can not be graded.
    """
    protocol = LinearProtocol(learning_rates=tuple(learning_rates), epochs=epochs, seed=setup.seed)
    with grading("linear", backbone, data, eval_data, setup) as graded:
        # Before the work, not after.
        held_out(names(graded.train), known_labels(graded.train), protocol)
        if save:
            _check_savable(graded.model, save)
        train, evaluation = graded.features()
        heads, results = linear_probe(train, evaluation, protocol, graded.device)
        if save:
            save_classifier(graded.model, heads, graded.train.classes, save, graded.eval)
        return graded.write(protocol, results, train.features.shape[1])


class Heads(nn.Module):
    """H linear classifiers behind one BatchNorm without affine: (B, D) -> (B, H, C)."""

    def __init__(self, heads: int, dim: int, classes: int, protocol: LinearProtocol):
        super().__init__()
        generator = torch.Generator().manual_seed(protocol.seed)
        weight = torch.empty(classes, dim)
        nn.init.trunc_normal_(weight, std=protocol.init_std, generator=generator)
        self.norm = nn.BatchNorm1d(dim, eps=protocol.batchnorm_eps, affine=False)
        self.weight = nn.Parameter(weight.repeat(heads, 1, 1))  # all start from the same
        self.bias = nn.Parameter(torch.zeros(heads, classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits = F.linear(self.norm(features), self.weight.flatten(0, 1), self.bias.flatten())
        return logits.unflatten(1, self.bias.shape)


def linear_probe(
    train: Features,
    evaluation: Features,
    protocol: LinearProtocol = LinearProtocol(),
    device: torch.device = torch.device("cpu"),
) -> tuple[Heads, dict]:
    """The chosen head, trained on all of ``train``, and its results on ``evaluation`` in percent.

    Raises: InputError when no tenth of ``train`` can choose the learning rate.
    """
    held_out_top1 = sweep(train, protocol, device)
    rate = max(held_out_top1, key=held_out_top1.get)
    heads = train_heads(train, _num_classes(train), (rate,), protocol, device)
    placed = _placed(heads, evaluation)[:, 0]
    return heads, {
        "top1": top(placed, 1),
        "top5": top(placed, 5),
        "learning_rate": rate,
        "held_out_top1": {str(rate): top1 for rate, top1 in held_out_top1.items()},
    }


def sweep(train: Features, protocol: LinearProtocol, device: torch.device) -> dict[float, float]:
    """Top-1 in percent of every learning rate on the held-out part of ``train``, from one pass."""
    held = held_out(train.names, train.labels, protocol)
    rates = protocol.learning_rates
    heads = train_heads(_subset(train, ~held), _num_classes(train), rates, protocol, device)
    placed = _placed(heads, _subset(train, held))
    return {rate: top(placed[:, head], 1) for head, rate in enumerate(rates)}


def held_out(names: list[str], labels: torch.Tensor, protocol: LinearProtocol) -> torch.Tensor:
    """Which images choose the learning rate, bool (N,): a pure function of each image's name.

    Raises: InputError when there are none, or none of a class that is left to learn from.
    """
    digests = (blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    held = torch.tensor(
        [int.from_bytes(digest, "big") % protocol.held_out == 0 for digest in digests]
    )
    if not torch.isin(labels[held], labels[~held]).any():
        raise InputError(
            f"{len(names)} train images of {len(labels.unique())} classes are too few to hold "
            f"one in {protocol.held_out} out: no class has images in both parts"
        )
    return held


def train_heads(
    train: Features,
    classes: int,
    rates: tuple[float, ...],
    protocol: LinearProtocol,
    device: torch.device,
) -> Heads:
    """One head for each learning rate, trained together; each is what it would be alone.

    A last batch that is short is left out, and its images come earlier in other epochs: BatchNorm
    has no variance for a batch of one. Fewer images than a batch are one batch.
    """
    features, labels = train.features.to(device), train.labels.to(device)
    heads = Heads(len(rates), features.shape[1], classes, protocol).to(device)
    # Without weight decay, to scale a head's loss is to scale its learning rate.
    scales = torch.tensor(rates, device=device) * protocol.batch_size / 256
    optimizer = torch.optim.SGD(
        heads.parameters(), momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
    generator = torch.Generator().manual_seed(protocol.seed)
    steps = max(len(features) // protocol.batch_size, 1)
    with progress(protocol.epochs, "probe") as bar:
        for epoch in range(protocol.epochs):
            order = torch.randperm(len(features), generator=generator).to(device)
            for step, batch in enumerate(order.split(protocol.batch_size)[:steps]):
                done = (epoch * steps + step) / (protocol.epochs * steps)
                optimizer.param_groups[0]["lr"] = (1 + math.cos(math.pi * done)) / 2
                logits = heads(features[batch])
                targets = labels[batch, None].expand(-1, len(rates))
                losses = F.cross_entropy(logits.movedim(1, 2), targets, reduction="none").mean(0)
                optimizer.zero_grad()
                (losses * scales).sum().backward()
                optimizer.step()
            bar.update()
    return heads.eval()


def _num_classes(train: Features) -> int:
    return int(train.labels.max()) + 1


def _subset(features: Features, chosen: torch.Tensor) -> Features:
    return Features(
        features.features[chosen],
        features.labels[chosen],
        [features.names[i] for i in chosen.nonzero()[:, 0]],
    )


@torch.inference_mode()
def _placed(heads: Heads, features: Features) -> torch.Tensor:
    """The rank of the true class of every image under every head, (N, H)."""
    device = heads.weight.device
    placed = []
    for rows, labels in zip(
        features.features.split(_ROWS_AT_ONCE), features.labels.split(_ROWS_AT_ONCE)
    ):
        logits, labels = heads(rows.to(device)), labels.to(device)
        placed.append(torch.stack([ranks(scores, labels) for scores in logits.unbind(1)], 1))
    return torch.cat(placed).cpu()


@torch.no_grad()
def fold_batchnorm(
    norm: nn.BatchNorm1d, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight (C, D) and bias (C,) that do what ``norm`` in eval mode and the given ones do."""
    scaled = weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shifted = bias.double() - scaled @ norm.running_mean.double()
    return scaled.to(weight.dtype), shifted.to(bias.dtype)


def save_classifier(
    backbone: nn.Module, heads: Heads, classes: list[str] | None, folder: Path, source: Source
) -> None:
    """Write ``backbone`` and the first of ``heads`` as one timm classifier, on the main rank.

    The folder appears under its name once timm has read it back and its logits of the first images
    of ``source`` are those of backbone and head.

    Raises: InputError when ``backbone`` takes no plain linear head, or the logits differ.
    """
    if is_main():
        # On the CPU, where float32 is float32; the caller's stay where they are.
        backbone, heads = copy.deepcopy(backbone).cpu(), copy.deepcopy(heads).cpu()
        aside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            _write_classifier(backbone, heads, classes, aside)
            _verify(aside, backbone, heads, source)
            aside.rename(folder)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder} can not be written: {error}") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    barrier()


def _check_savable(backbone: nn.Module, folder: Path) -> None:
    if folder.exists():
        raise InputError(f"{folder} exists already; save to another folder")
    if not hasattr(backbone, "reset_classifier"):
        name = backbone.pretrained_cfg["architecture"]
        raise InputError(f"{name} is no timm model: its classifier can not be saved")


def _write_classifier(
    backbone: nn.Module, heads: Heads, classes: list[str] | None, folder: Path
) -> None:
    weight, bias = fold_batchnorm(heads.norm, heads.weight[0], heads.bias[0])
    model = copy.deepcopy(backbone)
    model.reset_classifier(len(bias))
    head = model.get_classifier()
    if not isinstance(head, nn.Linear) or head.weight.shape != weight.shape:
        raise InputError(
            f"{model.pretrained_cfg['architecture']} ends in more than a linear layer on its "
            "features: its classifier can not be saved"
        )
    head.load_state_dict({"weight": weight, "bias": bias})
    # Else timm records these of the weights that the backbone came from.
    model.pretrained_cfg = backbone.pretrained_cfg | {
        "tag": "linear",
        "num_classes": len(bias),
        "custom_load": False,
    }
    timm.models.save_for_hf(
        model,
        folder,
        model_config={"label_names": classes[: len(bias)]} if classes else None,
        model_args=backbone.model_args | {"num_classes": len(bias)},
        safe_serialization=True,
    )


@torch.inference_mode()
def _verify(folder: Path, backbone: nn.Module, heads: Heads, source: Source) -> None:
    indices = range(min(_IMAGES_VERIFIED, len(source)))
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = preprocessing(opened)
    pixels, _, _ = next(iter(eval_batches(source, transform, indices, len(indices), workers=0)))
    images = transform.normalise(pixels)
    wanted = heads(backbone(images))[:, 0]
    error = (opened(images) - wanted).abs().max() / wanted.abs().max()
    if not error < 1e-3:
        raise InputError(
            f"not saved: the logits of {folder} differ from those of the probe by {error:.1e}"
        )
