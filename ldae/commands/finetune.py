"""The verb that fine-tunes: any timm backbone with a new classifier, through the one loop."""

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ldae import distributed, tree
from ldae.backbones.card import model_card
from ldae.backbones.preprocessing import preprocessing
from ldae.backbones.timm_folder import write_timm_folder
from ldae.console import describe, print_main
from ldae.data.augment import Augmentation
from ldae.data.source import Source
from ldae.errors import InputError
from ldae.evals.accuracy import top1_top5
from ldae.evals.evaluation import Evaluation, Setup, open_evaluation
from ldae.evals.features import Encoder, known_labels
from ldae.evals.protocol import Protocol
from ldae.finetuning.mixing import Mixing
from ldae.finetuning.network import ClassificationLoss, build_network
from ldae.finetuning.recipes import changed_constants
from ldae.finetuning.settings import AugmentSettings, FinetuneConfig, FinetuneModelSettings
from ldae.runs import layout
from ldae.runs.folder import open_run
from ldae.settings import OptimSettings
from ldae.train.loop import Hook, Plan, plan_run
from ldae.train.optim import peak_lr
from ldae.train.run import compiles, runs_in_bf16, train_in


@dataclass(frozen=True)
class FinetuneProtocol(Protocol):
    """The constants of the recipe, as they were used."""

    name: str
    version: int
    size: str
    img_size: int | None
    augment: AugmentSettings
    model: FinetuneModelSettings
    optim: OptimSettings
    seed: int
    modified: tuple[str, ...]
    """The constants that are not the recipe's."""


@dataclass(frozen=True)
class Work:
    """A fine-tuning that fits together; nothing is written yet."""

    config: FinetuneConfig
    evaluation: Evaluation
    """The network, its data and its device."""
    plan: Plan
    augmentation: Augmentation
    mixing: Mixing
    bf16: bool


def finetune(config: FinetuneConfig, run: Path, dry_run: bool = False) -> dict | None:
    """Fine-tune the backbone of ``config`` in the folder ``run``, or go on with what is there.

    The folder gets config.yaml, environment.json, metrics.jsonl with the loss and the accuracy on
    the evaluation split, checkpoints/, results.json and classifier/, a folder that timm opens with
    the classifier. The same call again resumes; a finished run is left as it is. Where the recipe has
    a moving average of the weights, that is graded and written. A dry run prints what would be done
    and touches nothing.

    Exact: a run that was interrupted is bit for bit the one that was not, on a CPU. Order,
    augmentation, erasing and mixing do not depend on how a batch is divided into ranks and micro
    batches; what the network itself draws, drop path, does, and so do the statistics of a BatchNorm.

    Returns: what results.json holds; None from a dry run.

    Raises: InputError for settings, a backbone or data that do not fit; Interrupted by Ctrl-C or
        SIGTERM.
    """
    run = Path(run)
    _check(config)
    bf16 = runs_in_bf16(config.system.precision, distributed.device_for(config.system.device))
    setup = Setup(
        random_init=config.model.random_init,
        in_chans=config.data.in_chans,
        seed=config.seed,
        out=run,
        workers=config.system.workers,
        precision="bf16" if bf16 else "fp32",
        device=config.system.device,
    )
    data = (config.data.source, config.data.eval_source or None)
    opened = (config.backbone, *data, protocol_of(config), setup)
    with open_evaluation("finetune", *opened) as evaluation:
        work = _prepare(config, evaluation, bf16)
        if dry_run:
            print(describe(config, _facts(work)))
            return None
        with open_run(run, "fine-tuning", config, evaluation.train, evaluation.device):
            return _carry_out(work, run)


def _check(config: FinetuneConfig) -> None:
    tree.check(config)
    if not config.data.source:
        raise InputError("no images: say where they are with --data SOURCE")
    if config.optim.warmup_epochs >= config.optim.epochs:
        raise InputError(
            f"optim.warmup_epochs {config.optim.warmup_epochs:g} must be fewer than optim.epochs "
            f"{config.optim.epochs:g}"
        )


def _prepare(config: FinetuneConfig, evaluation: Evaluation, bf16: bool) -> Work:
    classes = len(evaluation.train.classes)
    network = build_network(evaluation.model, config, classes)
    expected = preprocessing(network)
    size = {"img_size": expected.input_size[-1]}
    setup, protocol = replace(evaluation.setup, **size), replace(evaluation.protocol, **size)
    evaluation = replace(
        evaluation, protocol=protocol, setup=setup, model=network, transform=expected
    )
    plan = plan_run(len(evaluation.train), config.optim, config.system)
    augmentation = Augmentation(
        expected.input_size,
        expected.interpolation,
        expected.mean,
        config.augment.min_area,
        config.augment.flip,
        config.augment.policy,
    )
    augmentation.check()
    mixing = Mixing(config.augment, expected, classes, config.seed, evaluation.device)
    mixing.check(plan.batch_size // distributed.world_size() // plan.micro_batches)
    return Work(config, evaluation, plan, augmentation, mixing, bf16)


def _carry_out(work: Work, run: Path) -> dict:
    config, evaluation = work.config, work.evaluation
    device = evaluation.device
    control = " from scratch" if config.model.random_init else ""
    model = ClassificationLoss(evaluation.model, config.model.layer_decay, work.bf16).to(device)
    trained = train_in(
        run,
        model,
        config,
        config.optim,
        work.plan,
        evaluation.train,
        row=f"{config.recipe} fine-tuning of {config.backbone}{control}",
        transform=work.augmentation,
        mixing=work.mixing,
        device=device,
        compiled=compiles(config.system.compile, device),
        hooks=_hooks(work),
    )
    network = trained.network
    results = accuracy(network, evaluation)
    if distributed.is_main() and not (run / layout.CLASSIFIER).exists():
        save(network, run / layout.CLASSIFIER, work, results)
    record = replace(evaluation, model=network).write(results, evaluation.model.num_features)
    print_main(f"{run}: done; classifier in {run / layout.CLASSIFIER}")
    return record


def _hooks(work: Work) -> tuple[Hook, ...]:
    every = round(work.config.system.eval_every * work.plan.epoch)
    if not every:
        return ()
    return (Hook(every, lambda model: accuracy(model.network, work.evaluation)),)


def accuracy(network: nn.Module, evaluation: Evaluation) -> dict[str, float]:
    """Top-1 and top-5 in percent on the evaluation split, each image counted once over all ranks.

    Raises: InputError when a logit is not finite.
    """
    source, setup = evaluation.eval, evaluation.setup
    encoder = Encoder(network, evaluation.device, setup.precision)
    batches = encoder.share(source, setup.batch_size, setup.workers)
    return top1_top5(batches, known_labels(source)[:, None], len(source), evaluation.device)


def protocol_of(config: FinetuneConfig) -> FinetuneProtocol:
    return FinetuneProtocol(
        config.recipe,
        config.version,
        config.size,
        config.data.img_size,
        config.augment,
        config.model,
        config.optim,
        config.seed,
        tuple(f"{name}={used}" for name, (_, used) in changed_constants(config).items()),
    )


def save(network: nn.Module, folder: Path, work: Work, results: dict[str, float]) -> None:
    """Write the network, with its classifier, as a folder that timm opens.

    Raises: InputError when it can not be written, or timm does not read back what was written.
    """
    # On the CPU, where float32 is float32; and these that timm would record are of other weights.
    alone = copy.deepcopy(network).cpu().eval()
    alone.pretrained_cfg = network.pretrained_cfg | {"tag": "finetuned", "custom_load": False}
    images = torch.randn(2, *preprocessing(network).input_size)

    @torch.no_grad()
    def verify(opened: nn.Module) -> None:
        if not torch.equal(opened(images), alone(images)):
            raise InputError(f"{folder} is not written: timm does not read back what was trained")

    write_timm_folder(
        folder,
        alone,
        network.model_args,
        verify,
        card=_model_card(network, folder, work, results),
        classes=list(work.evaluation.train.classes),
    )


def _model_card(network: nn.Module, folder: Path, work: Work, results: dict[str, float]) -> str:
    config, evaluation = work.config, work.evaluation
    start = "from scratch" if config.model.random_init else f"from {Path(config.backbone).name}"
    return model_card(
        folder.resolve().parent.name,
        ["image-classification", "timm"],
        f"An image classifier, fine-tuned {start} with ldae.",
        {
            "architecture": network.pretrained_cfg["architecture"],
            "input": " x ".join(map(str, preprocessing(network).input_size)),
            "classes": network.num_classes,
            "recipe": f"{config.recipe}, version {config.version}, size {config.size}",
            "changed from it": ", ".join(work.evaluation.protocol.modified) or "nothing",
            "trained on": f"{len(evaluation.train):,} images, {work.plan.total:,} seen",
            f"accuracy on {len(evaluation.eval):,} others": f"top-1 {results['top1']:.2f}, "
            f"top-5 {results['top5']:.2f}",
        },
        f"logits = model(transform(image).unsqueeze(0))  # (1, {network.num_classes})\n"
        'names = model.pretrained_cfg["label_names"]',
    )


def _facts(work: Work) -> dict[str, str]:
    config, network, plan = work.config, work.evaluation.model, work.plan
    train: Source = work.evaluation.train
    count = sum(parameter.numel() for parameter in network.parameters())
    modified = ", ".join(work.evaluation.protocol.modified) or "nothing"
    return {
        "recipe": f"{config.recipe}, version {config.version}, size {config.size}; "
        f"changed: {modified}",
        "parameters": f"{count:,}",
        "input": f"{asdict(preprocessing(network))}",
        "images": f"{len(train):,} in {train.spec}, {len(train.classes)} classes",
        "steps": f"{plan.steps:,} of {plan.batch_size} images, {plan.total:,} images seen",
        "learning rate": f"{peak_lr(config.optim):.3g} at its peak",
        "computed in": f"{'bfloat16' if work.bf16 else 'float32'} on {work.evaluation.device}",
    }
