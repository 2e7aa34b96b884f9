"""``ldae finetune``: fine-tune a backbone with a new classifier."""

import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ldae import distributed, tree
from ldae.backbones.card import model_card
from ldae.backbones.preprocessing import preprocessing
from ldae.backbones.timm_folder import write_timm_folder
from ldae.console import describe, print_main
from ldae.data.augment import Augmentation
from ldae.errors import InputError
from ldae.evals.accuracy import top1_top5
from ldae.evals.call import describe_call
from ldae.evals.cell import seed_folder
from ldae.evals.evaluation import Evaluation, Setup
from ldae.evals.features import known_labels
from ldae.evals.open import open_evaluation
from ldae.evals.protocol import Protocol
from ldae.evals.seeds import write_means
from ldae.files import state_hash
from ldae.finetuning.mixing import Mixing
from ldae.finetuning.network import ClassificationLoss, build_network
from ldae.finetuning.recipes import changed_constants
from ldae.finetuning.settings import AugmentSettings, FinetuneConfig, FinetuneModelSettings
from ldae.precision import runs_in_bf16, unchanged_generators
from ldae.runs import layout
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.folder import open_run
from ldae.runs.kinds import kind_of, settings_and_folder
from ldae.settings import OptimSettings
from ldae.train.loop import Hook
from ldae.train.plan import Plan, plan_run
from ldae.train.run import check_warmup, compiles, describe_training, train_in


@dataclass(frozen=True)
class FinetuneProtocol(Protocol):
    """The constants of a fine-tuning."""

    name: str
    version: int
    size: str
    img_size: int | None
    augment: AugmentSettings
    model: FinetuneModelSettings
    optim: OptimSettings
    seed: int
    modified: tuple[str, ...]
    """The constants that differ from the recipe's."""


@dataclass(frozen=True)
class FineTuning:
    """Everything that a fine-tuning needs, after all checks."""

    config: FinetuneConfig
    evaluation: Evaluation
    """The network, the images and the device."""
    starts_from: str
    """The hash of the backbone's weights."""
    plan: Plan
    augmentation: Augmentation
    mixing: Mixing
    bf16: bool


def finetune(
    config: FinetuneConfig | str | Path,
    run: str | Path | None = None,
    dry_run: bool = False,
    seeds: tuple[int, ...] = (),
) -> dict:
    """Fine-tune the backbone of ``config`` in the folder ``run``, or resume the run there.

    The folder gets config.yaml, environment.json, metrics.jsonl with the loss and the accuracy on
    the evaluation split, checkpoints/, results.json and classifier/, a folder for timm. Where the
    recipe has a moving average of the weights, the average is graded and written, and the weights
    are graded too, as weights_top1 and weights_top5. A finished run stays as it is. A dry run
    prints the settings and the plan, and writes nothing.

    With several seeds, each has a run folder of its own in the folder ``run``, and results.json has
    their means and their standard deviations.

    Networks are graded in float32, since logits in bfloat16 often tie.

    On a CPU, an interrupted run equals an uninterrupted one bit for bit. Order, augmentation,
    erasing and mixing do not depend on the number of ranks and micro batches. Drop path and the
    statistics of a BatchNorm do.

    Args:
        config: the settings, such as ``ldae.finetune_config`` returns; or a run folder, and no
            ``run``, to resume it by its own settings.
        run: the run folder, new or to resume.
        dry_run: print the settings and the plan, and stop.
        seeds: seeds to fine-tune by, one after the other, instead of that of ``config``.

    Returns: the content of results.json, or of a dry run the lines of the plan by name.

    Raises: InputError for wrong settings, backbone or data; Interrupted after a stop signal.

    Examples:
        >>> changes = {"data.source": "/data/imagenet"}
        >>> config = ldae.finetune_config("runs/l_dae", "ldae", changes)
        >>> ldae.finetune(config, "runs/finetuned")["results"]["top1"]
    """
    _, config, run = settings_and_folder(config, run, ["fine-tuning"])
    tree.check(config)
    if seeds:
        return _over_seeds(config, run, dry_run, seeds)
    check_warmup(run, config.optim)
    bf16 = runs_in_bf16(config.system.precision, distributed.device_for(config.system.device))
    setup = Setup(
        random_init=config.model.random_init,
        in_chans=config.data.in_chans,
        seed=config.seed,
        out=run,
        workers=config.system.workers,
        device=config.system.device,
    )
    data = (config.data.source, config.data.eval_source or None)
    opened = (config.backbone, *data, protocol_of(config), setup)
    with (
        unchanged_generators(),
        open_evaluation("finetune", *opened, in_run=True) as evaluation,
    ):
        tuning = _prepare(config, evaluation, bf16)
        if dry_run:
            facts = _facts(tuning)
            print(describe(config, facts))
            return facts
        with open_run(run, "fine-tuning", config, evaluation.train, evaluation.device):
            return _train_and_grade(tuning, run)


def _over_seeds(config: FinetuneConfig, run: Path, dry_run: bool, seeds: tuple[int, ...]) -> dict:
    """Fine-tune by each seed in a folder of its own, and return the content of results.json."""
    Setup(seeds=seeds)  # refuses a single one
    if kind_of(run):
        raise InputError(f"run folder {run} holds one run, not several seeds: name another --run")
    runs = {seed: replace(config, seed=seed) for seed in seeds}
    if dry_run:  # the plan of one is that of all
        return finetune(runs[seeds[0]], run / seed_folder(seeds[0]), dry_run)
    with distributed.process_group(distributed.device_for(config.system.device)):
        records = {seed: finetune(one, run / seed_folder(seed)) for seed, one in runs.items()}
        names = [*records[seeds[0]]["results"]]
        call = describe_call("finetune", [replace(config, seed=0)], seeds=seeds)
        return write_means(run, records, names, call)


def _prepare(config: FinetuneConfig, evaluation: Evaluation, bf16: bool) -> FineTuning:
    classes = len(evaluation.train.classes)
    starts_from = state_hash(evaluation.model.state_dict())
    network = build_network(evaluation.model, config, classes)
    transform = preprocessing(network)
    size = {"img_size": transform.input_size[-1]}
    setup, protocol = replace(evaluation.setup, **size), replace(evaluation.protocol, **size)
    evaluation = replace(
        evaluation,
        protocol=protocol,
        setup=setup,
        model=network,
        transform=transform,
        call=describe_call("finetune", [config]),
    )
    plan = plan_run(
        len(evaluation.train),
        config.optim,
        config.system,
        evaluation.device,
        multiple=config.augment.mix_images,
    )
    augmentation = Augmentation(
        transform.input_size,
        transform.interpolation,
        transform.mean,
        config.augment.min_area,
        config.augment.flip,
        config.augment.policy,
    )
    augmentation.check()
    mixing = Mixing(config.augment, transform, classes, config.seed, evaluation.device)
    mixing.check(plan.micro_batch)
    return FineTuning(config, evaluation, starts_from, plan, augmentation, mixing, bf16)


def _train_and_grade(tuning: FineTuning, run: Path) -> dict:
    config, evaluation = tuning.config, tuning.evaluation
    device = evaluation.device
    start = " from scratch" if config.model.random_init else ""
    every = round(config.system.eval_every * tuning.plan.epoch)
    grade = partial(_grade, evaluation)
    model = ClassificationLoss(evaluation.model, config.model.layer_decay, tuning.bf16).to(device)
    trained = train_in(
        run,
        model,
        config,
        config.optim,
        tuning.plan,
        evaluation.train,
        row=f"{config.recipe} fine-tuning of {config.backbone}{start}",
        transform=tuning.augmentation,
        mixing=tuning.mixing,
        device=device,
        compiled=compiles(config.system.compile, device),
        hooks=(Hook(every, grade, weights_too=True),) if every else (),
    )
    network = trained.network
    results = grade(trained)
    if config.optim.ema:
        weights = copy.deepcopy(trained)  # the last checkpoint is written, as rank 0 has graded
        weights.load_state_dict(Checkpoints(run).load_on_all_ranks()["model"])
        results |= {f"weights_{name}": value for name, value in grade(weights).items()}
    if distributed.is_main() and not (run / layout.CLASSIFIER).exists():
        save(network, run / layout.CLASSIFIER, tuning, results)
    record = replace(evaluation, model=network).write(
        results, evaluation.model.num_features, starts_from=tuning.starts_from
    )
    print_main(f"{run}: done; classifier in {run / layout.CLASSIFIER}")
    return record


def _grade(evaluation: Evaluation, model: ClassificationLoss) -> dict[str, float]:
    """Return top-1 and top-5 in percent on the evaluation split. Each image counts once.

    Raises: InputError when a logit is not finite.
    """
    source = evaluation.eval
    batches = replace(evaluation, model=model.network).encoder().share(source)
    return top1_top5(batches, known_labels(source)[:, None], len(source), evaluation.device)


def protocol_of(config: FinetuneConfig) -> FinetuneProtocol:
    """Return the constants of a fine-tuning, for its record."""
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


def save(network: nn.Module, folder: Path, tuning: FineTuning, results: dict[str, float]) -> None:
    """Write the network and its classifier as a folder that timm opens.

    Raises: InputError when the folder cannot be written, or timm reads back another network.
    """
    # On the CPU, since a GPU may compute float32 in TF32.
    saved = copy.deepcopy(network).cpu().eval()
    # The tag and the license of the backbone's weights are wrong.
    saved.pretrained_cfg = network.pretrained_cfg | {
        "tag": "finetuned",
        "custom_load": False,
        "license": tuning.config.license or None,
    }
    images = torch.randn(2, *preprocessing(network).input_size)

    @torch.no_grad()
    def verify(opened: nn.Module) -> None:
        if not torch.equal(opened(images), saved(images)):
            raise InputError(f"{folder} is not written: timm reads back another network")

    write_timm_folder(
        folder,
        saved,
        network.model_args,
        verify,
        card=_model_card(network, folder, tuning, results),
        classes=list(tuning.evaluation.train.classes),
    )


def _model_card(
    network: nn.Module, folder: Path, tuning: FineTuning, results: dict[str, float]
) -> str:
    config, evaluation = tuning.config, tuning.evaluation
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
            "changed from it": ", ".join(tuning.evaluation.protocol.modified) or "nothing",
            "trained on": f"{len(evaluation.train):,} images, {tuning.plan.total:,} seen",
            f"accuracy on {len(evaluation.eval):,} others": f"top-1 {results['top1']:.2f}, "
            f"top-5 {results['top5']:.2f}",
        },
        f"logits = model(transform(image).unsqueeze(0))  # (1, {network.num_classes})\n"
        'names = model.pretrained_cfg["label_names"]',
        license=config.license,
    )


def _facts(tuning: FineTuning) -> dict[str, str]:
    config, network, train = tuning.config, tuning.evaluation.model, tuning.evaluation.train
    count = sum(parameter.numel() for parameter in network.parameters())
    modified = ", ".join(tuning.evaluation.protocol.modified) or "nothing"
    return {
        "recipe": f"{config.recipe}, version {config.version}, size {config.size}; "
        f"changed: {modified}",
        "parameters": f"{count:,}",
        "input": f"{asdict(preprocessing(network))}",
        "images": f"{len(train):,} in {train.spec}, {len(train.classes)} classes",
    } | describe_training(tuning.plan, config.optim, tuning.bf16, tuning.evaluation.device)
