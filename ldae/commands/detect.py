"""``ldae detect``: train a detector on a backbone, and grade it by COCO's average precision."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from ldae import distributed, tree
from ldae.console import describe, print_main
from ldae.data.coco import open_instance_splits
from ldae.detection.inference import find_instances
from ldae.detection.jitter import OnDevice, canvas_of
from ldae.detection.network import DetectionLoss, Detector, build_detector
from ldae.detection.recipes import changed_constants
from ldae.detection.scoring import Result, average_precision, check_installed
from ldae.detection.settings import DetectConfig, DetectModelSettings, JitterSettings
from ldae.errors import InputError
from ldae.evals.call import describe_call
from ldae.evals.evaluation import Evaluation, Setup
from ldae.evals.open import open_evaluation
from ldae.evals.protocol import Protocol
from ldae.files import state_hash, write_json
from ldae.precision import runs_in_bf16, unchanged_generators
from ldae.runs import layout
from ldae.runs.folder import open_run
from ldae.runs.kinds import settings_and_folder
from ldae.settings import OptimSettings
from ldae.train.loop import Hook
from ldae.train.plan import Plan, plan_run
from ldae.train.run import check_warmup, compiles, describe_training, train_in


@dataclass(frozen=True)
class DetectProtocol(Protocol):
    """The constants of a detection."""

    name: str
    version: int
    size: str
    img_size: int | None
    augment: JitterSettings
    model: DetectModelSettings
    optim: OptimSettings
    seed: int
    modified: tuple[str, ...]
    """The constants that differ from the recipe's."""

    @property
    def headlines(self) -> tuple[str, ...]:
        return ("box_ap", "box_ap50", *(["mask_ap"] if self.model.masks else []))


@dataclass(frozen=True)
class Detection:
    """Everything that a detection needs, after all checks."""

    config: DetectConfig
    evaluation: Evaluation
    """The detector, the images and the device."""
    starts_from: str
    """Hash of the backbone's weights before the training."""
    plan: Plan
    bf16: bool

    def find(self, detector: Detector) -> list[Result]:
        """Return the detections of all ranks in the evaluation images."""
        system, evaluation = self.config.system, self.evaluation
        how = (evaluation.device, system.eval_batch, system.workers)
        transform = canvas_of(evaluation.transform, detector.side)
        return find_instances(detector, evaluation.eval, transform, *how)

    def score(self, found: list[Result]) -> dict[str, float | None]:
        """Return the average precisions of detections, which rank 0 computes for all."""
        score = partial(average_precision, masks=self.config.model.masks)
        dataset = self.evaluation.eval.dataset
        results = score(dataset(), found) if distributed.is_main() else None
        return distributed.gather_values(results)[0]


def detect(
    config: DetectConfig | str | Path, run: str | Path | None = None, dry_run: bool = False
) -> dict:
    """Train a detector on a backbone in the folder ``run``, or resume the run there; then grade it.

    The detector is torchvision's Mask R-CNN on ViTDet's simple feature pyramid over a plain ViT,
    whose attention is global in all blocks. Its data is a folder in COCO's layout, with
    annotations/instances_train2017.json, or another name that begins with instances_train or
    instances_val, and images in train2017/ or images/train2017/; or digit-scenes, which is built
    in.

    The folder gets config.yaml, environment.json, metrics.jsonl with the losses, checkpoints/ and
    results.json. A finished run stays as it is. A dry run prints the settings and the plan, and
    writes nothing. On a CPU, an interrupted run equals an uninterrupted one bit for bit.

    Args:
        config: the settings, such as ``ldae.detect_config`` returns; or a run folder, and no
            ``run``, to resume it by its own settings.
        run: the run folder, new or to resume.
        dry_run: print the settings and the plan, and stop.

    Returns: the content of results.json, whose results are in percent box_ap, box_ap50, box_ap75,
    box_ap_small, box_ap_medium and box_ap_large, and mask_ap and so on; or of a dry run the lines
    of the plan by name.

    Raises: InputError for wrong settings, backbone or data; Interrupted after a stop signal.

    Examples:
        >>> config = ldae.detect_config("runs/l_dae", changes={"data.source": "/data/coco"})
        >>> ldae.detect(config, "runs/detector")["results"]["box_ap"]
    """
    _, config, run = settings_and_folder(config, run, ["detection"])
    tree.check(config)
    check_installed()
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
    opened = (config.backbone, *data, protocol_of(config), setup, open_instance_splits)
    with (
        unchanged_generators(),
        open_evaluation("detect", *opened, in_run=True) as evaluation,
    ):
        detection = _prepare(config, evaluation, bf16)
        if dry_run:
            facts = _facts(detection)
            print(describe(config, facts))
            return facts
        with open_run(run, "detection", config, evaluation.train, evaluation.device):
            return _train_and_grade(detection, run)


def _prepare(config: DetectConfig, evaluation: Evaluation, bf16: bool) -> Detection:
    low, high = config.augment.scale
    if low > high:
        raise InputError(f"augment.scale {low:g} {high:g} must be the smallest, then the largest")
    for source in (evaluation.train, evaluation.eval):
        if config.model.masks and not source.has_masks:
            raise InputError(
                f"{source.spec} ({source.split}) has annotations without a segmentation: "
                "--model.no-masks trains boxes alone"
            )
        source.has_masks = config.model.masks
    starts_from = state_hash(evaluation.model.state_dict())
    detector = build_detector(evaluation.model, config, len(evaluation.train.classes))
    transform = replace(
        evaluation.transform,
        input_size=(evaluation.transform.input_size[0], detector.side, detector.side),
        interpolation="bilinear",
        crop_pct=1.0,
        crop_mode="upper left",
    )
    call = describe_call("detect", [config])
    evaluation = replace(evaluation, model=detector, transform=transform, call=call)
    plan = plan_run(len(evaluation.train), config.optim, config.system, evaluation.device)
    return Detection(config, evaluation, starts_from, plan, bf16)


def _train_and_grade(detection: Detection, run: Path) -> dict:
    config, evaluation = detection.config, detection.evaluation
    device = evaluation.device
    start = "the untrained " if config.model.random_init else ""
    every = round(config.system.eval_every * detection.plan.epoch)
    jitter = (config.augment.scale, config.augment.flip)
    model = DetectionLoss(evaluation.model, config.model.layer_decay, detection.bf16).to(device)
    trained = train_in(
        run,
        model,
        config,
        config.optim,
        detection.plan,
        evaluation.train,
        row=f"{config.recipe} detection on {start}{config.backbone}",
        transform=canvas_of(evaluation.transform, evaluation.model.side, *jitter),
        mixing=OnDevice(device),
        device=device,
        compiled=compiles(config.system.compile, device),
        hooks=(Hook(every, partial(_grade, detection)),) if every else (),
    )
    detector = trained.detector
    found = detection.find(detector)
    if config.system.predictions and distributed.is_main():
        write_json(run / layout.DETECTIONS, found)
    graded = replace(evaluation, model=detector)
    dim, classes = detector.backbone.vit.num_features, len(evaluation.train.classes)
    record = graded.write(detection.score(found), dim, classes, starts_from=detection.starts_from)
    print_main(f"{run}: done")
    return record


def _grade(detection: Detection, model: nn.Module) -> dict[str, float]:
    """Return the average precisions on the evaluation images, for the metrics."""
    scores = detection.score(detection.find(model.detector))
    return {name: score for name, score in scores.items() if score is not None}


def protocol_of(config: DetectConfig) -> DetectProtocol:
    """Return the constants of a detection, for its record."""
    return DetectProtocol(
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


def _facts(detection: Detection) -> dict[str, str]:
    config, evaluation = detection.config, detection.evaluation
    modified = ", ".join(evaluation.protocol.modified) or "nothing"
    counts = {part: 0 for part in (True, False)}
    for parameter in evaluation.model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    train = evaluation.train
    return {
        "recipe": f"{config.recipe}, version {config.version}, size {config.size}; "
        f"changed: {modified}",
        "parameters": f"{counts[True]:,} trained, {counts[False]:,} frozen",
        "input": f"{evaluation.transform.input_size}",
        "images": f"{len(train):,} in {train.spec}, {len(train.classes)} classes",
    } | describe_training(detection.plan, config.optim, detection.bf16, evaluation.device)
