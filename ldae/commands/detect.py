"""``ldae detect``: train a detector on a backbone, and grade it by COCO's average precision."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from ldae import distributed
from ldae.console import print_main
from ldae.data.coco import open_instance_splits
from ldae.detection.inference import find_instances
from ldae.detection.jitter import OnDevice, canvas_of
from ldae.detection.network import DetectionLoss, Detector, build_detector
from ldae.detection.recipes import RECIPES
from ldae.detection.scoring import Result, average_precision, check_installed
from ldae.detection.settings import DetectConfig
from ldae.downstream.training import DownstreamProtocol, DownstreamTraining, prepare_downstream
from ldae.errors import InputError
from ldae.files import write_json
from ldae.precision import recorded_gradients
from ldae.runs import layout
from ldae.runs.kinds import settings_and_folder


@dataclass(frozen=True)
class DetectProtocol(DownstreamProtocol):
    """The constants of a detection."""

    @property
    def headlines(self) -> tuple[str, ...]:
        return ("box_ap", "box_ap50", *(["mask_ap"] if self.model.masks else []))


@recorded_gradients()
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
    _, config, run = settings_and_folder(config, run, [RECIPES.kind])
    check_installed()
    with prepare_downstream(
        "detect", RECIPES, config, run, protocol=DetectProtocol, splits=open_instance_splits
    ) as training:
        training = _with_detector(training)
        if dry_run:
            network, transform = training.evaluation.model, training.evaluation.transform
            return training.show_plan(_parameters(network), transform.input_size)
        with training.open_run():
            return _train_and_grade(training)


def _with_detector(training: DownstreamTraining) -> DownstreamTraining:
    """Return the training of the detector on the backbone, with the crop that the detector takes.

    Raises: InputError for settings that contradict each other, and for annotations without masks.
    """
    config, evaluation = training.config, training.evaluation
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
    detector = build_detector(evaluation.model, config, len(evaluation.train.classes))
    transform = replace(
        evaluation.transform,
        input_size=(evaluation.transform.input_size[0], detector.side, detector.side),
        interpolation="bilinear",
        crop_pct=1.0,
        crop_mode="upper left",
    )
    return replace(training, evaluation=replace(evaluation, model=detector, transform=transform))


def _train_and_grade(training: DownstreamTraining) -> dict:
    """Train to the end of the plan, grade, write results.json, and return its content."""
    config, run, evaluation = training.config, training.run, training.evaluation
    start = "the untrained " if config.model.random_init else ""
    side, jitter = evaluation.model.side, (config.augment.scale, config.augment.flip)
    row = f"{config.recipe} detection on {start}{config.backbone}"
    model = DetectionLoss(evaluation.model, config.model.layer_decay, training.bf16)
    jittered, grade = canvas_of(evaluation.transform, side, *jitter), partial(_grade, training)
    trained = training.train(model, row, jittered, OnDevice(evaluation.device), grade)
    detector = trained.detector
    found = _find(training, detector)
    if config.system.predictions and distributed.is_main():
        write_json(run / layout.DETECTIONS, found)
    dim, classes = detector.backbone.vit.num_features, len(evaluation.train.classes)
    graded, scores = replace(evaluation, model=detector), _score(training, found)
    record = graded.write(scores, dim, classes, **training.facts)
    print_main(f"{run}: done")
    return record


def _grade(training: DownstreamTraining, model: nn.Module) -> dict[str, float]:
    """Return the average precisions on the evaluation images, for the metrics."""
    scores = _score(training, _find(training, model.detector))
    return {name: score for name, score in scores.items() if score is not None}


def _find(training: DownstreamTraining, detector: Detector) -> list[Result]:
    """Return the detections of all ranks in the evaluation images."""
    system, evaluation = training.config.system, training.evaluation
    how = (evaluation.device, system.eval_batch, system.workers)
    transform = canvas_of(evaluation.transform, detector.side)
    return find_instances(detector, evaluation.eval, transform, *how)


def _score(training: DownstreamTraining, found: list[Result]) -> dict[str, float | None]:
    """Return the average precisions of detections, which rank 0 computes for all."""
    score = partial(average_precision, masks=training.config.model.masks)
    dataset = training.evaluation.eval.dataset
    results = score(dataset(), found) if distributed.is_main() else None
    return distributed.gather_values(results)[0]


def _parameters(network: nn.Module) -> str:
    counts = {part: 0 for part in (True, False)}
    for parameter in network.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return f"{counts[True]:,} trained, {counts[False]:,} frozen"
