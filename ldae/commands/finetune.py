"""``ldae finetune``: fine-tune a backbone with a new classifier."""

import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from torch import nn

from ldae import devices, distributed
from ldae.backbones.preprocessing import preprocessing
from ldae.backbones.timm_folder import write_timm_folder
from ldae.console import print_main
from ldae.data.augment import Augmentation
from ldae.deployment.model_card import input_facts, model_card
from ldae.downstream.training import DownstreamTraining, prepare_downstream
from ldae.errors import InputError
from ldae.evals.accuracy import top1_top5
from ldae.evals.call import describe_call
from ldae.evals.cell import seed_folder
from ldae.evals.evaluation import Evaluation, Setup
from ldae.evals.features import known_labels
from ldae.evals.seeds import write_means
from ldae.finetuning.mixing import Mixing
from ldae.finetuning.network import ClassificationLoss, build_network
from ldae.finetuning.recipes import RECIPES
from ldae.finetuning.settings import FinetuneConfig
from ldae.precision import recorded_gradients
from ldae.runs import layout
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.kinds import kind_of, settings_and_folder


@recorded_gradients()
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
    _, config, run = settings_and_folder(config, run, [RECIPES.kind])
    if seeds:
        return _over_seeds(config, run, dry_run, seeds)
    with prepare_downstream(
        "finetune", RECIPES, config, run, multiple=config.augment.mix_images
    ) as training:
        training = _with_classifier(training)
        augmentation, mixing = _augmentation(training), _mixing(training)
        if dry_run:
            network, transform = training.evaluation.model, training.evaluation.transform
            count = sum(parameter.numel() for parameter in network.parameters())
            return training.show_plan(f"{count:,}", asdict(transform))
        with training.open_run():
            return _train_and_grade(training, augmentation, mixing)


def _over_seeds(config: FinetuneConfig, run: Path, dry_run: bool, seeds: tuple[int, ...]) -> dict:
    """Fine-tune by each seed in a folder of its own, and return the content of results.json."""
    Setup(seed=config.seed, seeds=seeds)  # refuses a single one, and another seed beside them
    if kind_of(run):
        raise InputError(f"run folder {run} holds one run, not several seeds: name another --run")
    runs = {seed: replace(config, seed=seed) for seed in seeds}
    if dry_run:  # the plan of one is that of all
        return finetune(runs[seeds[0]], run / seed_folder(seeds[0]), dry_run)
    with distributed.process_group(devices.device_for(config.system.device)):
        records = {seed: finetune(one, run / seed_folder(seed)) for seed, one in runs.items()}
        names = [*records[seeds[0]]["results"]]
        call = describe_call("finetune", [replace(config, seed=0)], seeds=seeds)
        return write_means(run, records, names, call)


def _with_classifier(training: DownstreamTraining) -> DownstreamTraining:
    """Return the training of the network: the backbone with a new classifier."""
    evaluation = training.evaluation
    network = build_network(evaluation.model, training.config, len(evaluation.train.classes))
    transform = preprocessing(network)
    size = {"img_size": transform.input_size[-1]}
    setup, protocol = replace(evaluation.setup, **size), replace(evaluation.protocol, **size)
    changes = {"model": network, "transform": transform, "setup": setup, "protocol": protocol}
    return replace(training, evaluation=replace(evaluation, **changes))


def _augmentation(training: DownstreamTraining) -> Augmentation:
    augment, transform = training.config.augment, training.evaluation.transform
    crop = (transform.input_size, transform.interpolation, transform.mean)
    augmentation = Augmentation(*crop, augment.min_area, augment.flip, augment.policy)
    augmentation.check()
    return augmentation


def _mixing(training: DownstreamTraining) -> Mixing:
    config, evaluation = training.config, training.evaluation
    how = (len(evaluation.train.classes), config.seed, evaluation.device)
    mixing = Mixing(config.augment, evaluation.transform, *how)
    mixing.check(training.plan.micro_batch)
    return mixing


def _train_and_grade(
    training: DownstreamTraining, augmentation: Augmentation, mixing: Mixing
) -> dict:
    """Train to the end of the plan, grade, write the classifier and results.json, and return it."""
    config, run = training.config, training.run
    start = " from scratch" if config.model.random_init else ""
    row = f"{config.recipe} fine-tuning of {config.backbone}{start}"
    grade = partial(_grade, training.evaluation)
    model = ClassificationLoss(training.evaluation.model, config.model.layer_decay, training.bf16)
    trained = training.train(model, row, augmentation, mixing, grade, graded_weights="both")
    results = grade(trained)
    if config.optim.ema:
        weights = copy.deepcopy(trained)  # the last checkpoint is written, as rank 0 has graded
        weights.load_state_dict(Checkpoints(run).load_on_all_ranks()["model"])
        results |= {f"weights_{name}": value for name, value in grade(weights).items()}
    network = trained.network
    if distributed.is_main() and not (run / layout.CLASSIFIER).exists():
        save(network, run / layout.CLASSIFIER, training, results)
    graded = replace(training.evaluation, model=network)
    record = graded.write(results, network.num_features, **training.facts)
    print_main(f"{run}: done; classifier in {run / layout.CLASSIFIER}")
    return record


def _grade(evaluation: Evaluation, model: ClassificationLoss) -> dict[str, float]:
    """Return top-1 and top-5 in percent on the evaluation split. Each image counts once.

    Raises: InputError when a logit is not finite.
    """
    source = evaluation.eval
    batches = replace(evaluation, model=model.network).encoder().share(source)
    return top1_top5(batches, known_labels(source)[:, None], len(source), evaluation.device)


def save(
    network: nn.Module, folder: Path, training: DownstreamTraining, results: dict[str, float]
) -> None:
    """Write the network and its classifier as a folder that timm opens.

    Raises: InputError when the folder cannot be written, or timm reads back another network.
    """
    # On the CPU, since a GPU may compute float32 in TF32.
    saved = copy.deepcopy(network).cpu().eval()
    # The tag and the license of the backbone's weights are wrong.
    saved.pretrained_cfg = network.pretrained_cfg | {
        "tag": "finetuned",
        "custom_load": False,
        "license": training.config.license or None,
    }
    write_timm_folder(
        folder,
        saved,
        network.model_args,
        card=_model_card(network, folder, training, results),
        classes=list(training.evaluation.train.classes),
    )


def _model_card(
    network: nn.Module, folder: Path, training: DownstreamTraining, results: dict[str, float]
) -> str:
    config, evaluation = training.config, training.evaluation
    start = "from scratch" if config.model.random_init else f"from {Path(config.backbone).name}"
    return model_card(
        folder.resolve().parent.name,
        ["image-classification", "timm"],
        f"An image classifier, fine-tuned {start} with ldae.",
        {
            "architecture": network.pretrained_cfg["architecture"],
            **input_facts(network),
            "classes": network.num_classes,
            "recipe": training.recipe,
            "changed from it": training.modified,
            "trained on": f"{len(evaluation.train):,} images, {training.plan.total:,} seen",
            f"accuracy on {len(evaluation.eval):,} others": f"top-1 {results['top1']:.2f}, "
            f"top-5 {results['top5']:.2f}",
        },
        f"logits = model(transform(image).unsqueeze(0))  # (1, {network.num_classes})\n"
        'names = model.pretrained_cfg["label_names"]',
        license=config.license,
    )
