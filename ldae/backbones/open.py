"""Opens any encoder as a plain timm model: a run, a folder, a timm name or a checkpoint file."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.layers import to_2tuple
from torch import nn

from ldae.backbones.weights import check_no_graph, find_encoder, load_weights
from ldae.backbones.whitening import is_whitened
from ldae.errors import InputError, first_line, nearest, quoted
from ldae.precision import recorded_gradients, seeded_generator, unchanged_generators
from ldae.runs.kinds import kind_of
from ldae.runs.layout import CLASSIFIER

_NO_HEAD: dict[str, Any] = {"num_classes": 0}  # makes timm leave out the classifier

# A network with timm's attributes pretrained_cfg and num_classes, and with ours: model_args and,
# when ldae pre-trained it, images_seen and timestep.
TimmModel = Any


@recorded_gradients()
def load_backbone(
    spec: str | Path,
    *,
    random_init: bool = False,
    in_chans: int = 3,
    img_size: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Open a timm model without classifier in eval mode: normalised (B, C, H, W) -> (B, D).

    Its ``pretrained_cfg`` describes the preprocessing, see ``ldae.backbones.preprocessing``. Its
    ``model_args`` are the arguments with which timm builds it again. Its ``images_seen`` is the
    number of images that ldae pre-trained it on, for a run or an exported folder. Its ``timestep``
    is the t that was folded into the weights of a denoising encoder. The whitening of ``ldae export
    --whiten`` is a part of the backbone, but not of its untrained control.

    Args:
        spec: one of

            - a run folder: the backbone of its newest checkpoint;
            - a folder written by timm or by ``ldae export``;
            - a timm name with timm's weights, or ``hf-hub:USER/MODEL``;
            - ``NAME@FILE``: a timm name and a local checkpoint, ``.safetensors`` or PyTorch's, also
              in a published layout of ``ldae.backbones.layouts``;
            - ``pixels`` or ``pixels:SIZE``: the raw pixels of a square, by default of side 32.

        random_init: give the same architecture timm's random initialisation, the untrained control.
        in_chans: channels of the images, for timm names and pixels; a model of the hub has its own
            where this is 3.
        img_size: side of the square input in pixels, for timm names.
        seed: seed of the random initialisation.

    Raises: InputError naming ``spec`` when it cannot be opened or nothing in the file fits.

    Examples:
        >>> backbone = ldae.load_backbone("runs/l_dae")
        >>> config = timm.data.resolve_model_data_config(backbone)
        >>> transform = timm.data.create_transform(**config)  # of an upright RGB image of Pillow
        >>> features = backbone(transform(image)[None])  # (1, D)
        >>> published = ldae.load_backbone("vit_base_patch16_224.mae@mae_pretrain_vit_base.pth")
    """
    spec = str(spec)
    with seeded_generator(seed):
        model = _open(spec, random_init, in_chans, img_size)
    return model.eval()


@recorded_gradients()
@unchanged_generators()
def load_classifier(spec: str | Path, in_chans: int = 3, img_size: int | None = None) -> nn.Module:
    """Open a timm classifier for inference: normalised (B, C, H, W) -> (B, num_classes).

    Its ``pretrained_cfg`` describes the preprocessing.

    Args:
        spec: a folder of ``ldae finetune``, of ``ldae linear --save`` or of timm, a timm name, or
            ``NAME@FILE``, which has as many classes as the file.
        in_chans, img_size: as in ``load_backbone``, for timm names.

    Raises: InputError naming ``spec`` when it cannot be opened or has no classifier.

    Examples:
        >>> classifier = ldae.load_classifier("runs/finetuned")
        >>> classes = classifier(images).argmax(1)
    """
    spec = str(spec)
    folder = finished_folder(spec)
    if folder and not kind_of(folder):
        if img_size is not None:
            raise InputError(f"img_size is for timm names: {spec} has its own")
        model = _from_timm_folder(folder, False, head=True)
        check_chans(model, spec, in_chans)
    elif folder or spec.partition(":")[0] == "pixels":
        raise InputError(
            f"{spec} has no classifier: name a folder of `ldae linear --save` or `ldae finetune`, "
            "or a timm model"
        )
    else:
        model = _from_timm_name(spec, False, in_chans, img_size, head=True)
    if is_whitened(model.pretrained_cfg):
        raise InputError(f"{spec} has no classifier: its head whitens the features")
    if not model.num_classes:
        raise InputError(f"{spec} has no classifier: it gives features")
    return model.eval().requires_grad_(False)


def check_chans(model: TimmModel, spec: str, in_chans: int) -> None:
    """Check that channels that are asked for are those of a model, which has its own.

    Raises: InputError.
    """
    own = model.pretrained_cfg["input_size"][0]
    if in_chans not in (3, own):  # 3 is the default
        raise InputError(f"in_chans is for timm names: {spec} takes {own} channels")


def label_names(classifier: TimmModel) -> list[str]:
    """Return the names of a timm classifier's outputs; empty if its configuration has none."""
    names = classifier.pretrained_cfg.get("label_names") or ()
    return [str(name) for name in (names.values() if isinstance(names, dict) else names)]


def backbone_folder(spec: str | Path) -> Path | None:
    """Return the run or timm folder that ``spec`` names; None when it names something else.

    For a finished fine-tuning this is the folder of its classifier.

    Raises: InputError when the file system refuses to say what is there.
    """
    folder = Path(os.path.expanduser(spec))
    try:
        if (folder / CLASSIFIER / "config.json").is_file():
            return folder / CLASSIFIER
        return folder if kind_of(folder) or (folder / "config.json").is_file() else None
    except OSError as error:  # no permission, or a name that is too long
        raise InputError(f"{quoted(spec)} cannot be read: {error.strerror}") from None


def finished_folder(spec: str | Path) -> Path | None:
    """Return ``backbone_folder``. Raises: InputError for a fine-tuning without a classifier yet."""
    folder = backbone_folder(spec)
    if folder and kind_of(folder) == "fine-tuning":
        raise InputError(
            f"the fine-tuning {folder} has not ended: the same `ldae finetune` command resumes it"
        )
    return folder


def has_classifier(spec: str | Path) -> bool:
    """Return whether a spec names the folder of a classifier: a fine-tuning or a saved probe."""
    folder = backbone_folder(spec)
    if folder is None or kind_of(folder):
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config.get("num_classes")) and not is_whitened(config["pretrained_cfg"])
    except (OSError, ValueError, KeyError, AttributeError):
        return False  # opening it reports what is wrong


def _open(spec: str, random_init: bool, in_chans: int, img_size: int | None) -> TimmModel:
    folder = finished_folder(spec)
    is_pixels = spec.partition(":")[0] == "pixels"
    if img_size is not None and (folder or is_pixels):
        raise InputError(f"img_size is for timm names: {spec} has its own")
    if folder:
        model = (_from_run if kind_of(folder) else _from_timm_folder)(folder, random_init)
        check_chans(model, spec, in_chans)
        return model
    if is_pixels:
        return _pixels(spec, random_init, in_chans)
    return _from_timm_name(spec, random_init, in_chans, img_size)


def _from_run(folder: Path, random_init: bool) -> TimmModel:
    from ldae.backbones.run import backbone_of_run, control_of_run

    return (control_of_run if random_init else backbone_of_run)(folder)


def _from_timm_folder(folder: Path, random_init: bool, head: bool = False) -> TimmModel:
    model: TimmModel
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        head = head or (not random_init and is_whitened(config.get("pretrained_cfg", {})))
        model = timm.create_model(
            f"local-dir:{folder}", not random_init, **({} if head else _NO_HEAD)
        )
    except Exception as error:  # json, timm, safetensors and torch share no base class of errors
        reason = first_line(error)
        if "weights_only" in reason:  # the libraries explain how to run the code
            reason = "it holds pickled code, which is not run here"
        raise InputError(f"{folder} cannot be opened by timm: {reason}") from error
    args = model.model_args = config.get("model_args", {})
    # timm before 1.0.31 saves the preprocessing of its own weights, which may be of another input.
    own_chans = model.pretrained_cfg["input_size"][0]
    adapt_cfg(model, args.get("in_chans", own_chans), args.get("img_size"))
    model.images_seen = None if random_init else config.get("images_seen")
    model.timestep = None if random_init else config.get("timestep")
    return model


def _from_timm_name(
    spec: str, random_init: bool, in_chans: int, img_size: int | None, head: bool = False
) -> TimmModel:
    from huggingface_hub.errors import HfHubHTTPError

    name, at, file = spec.partition("@")
    is_hub = name.startswith("hf-hub:")
    if is_hub:  # @ precedes a revision
        name, at = spec, ""
    pretrained, file = not (random_init or at), os.path.expanduser(file)
    cfg = None if is_hub else _timm_cfg(name)
    # Without this, a network that others have registered would be graded with random weights.
    if pretrained and not is_hub and not (cfg and cfg.has_weights):
        raise InputError(
            f"timm has no weights for {name}: name a checkpoint as {name}@FILE, "
            "or ask for the random initialisation"
        )
    model: TimmModel
    args: dict[str, Any] = {"in_chans": in_chans}
    try:
        if is_hub:
            args, whitened = _hub_args(name, in_chans)
            head = head or (pretrained and whitened)
        # Models of any input size have no img_size. Most models of the hub have a fixed size.
        if img_size is not None and (cfg is None or cfg.fixed_input_size):
            args["img_size"] = img_size
        model = timm.create_model(name, pretrained, **(args | ({} if head else _NO_HEAD)))
    except (OSError, HfHubHTTPError) as error:
        raise InputError(
            f"the weights of {name} cannot be downloaded ({type(error).__name__}); "
            "open a checkpoint on this machine by NAME@FILE, with its timm name"
        ) from error
    # The control of a file that is there has its architecture too, such as other heads.
    is_read = at and (not random_init or Path(file).is_file())
    foreign = find_encoder(Path(file), model, name) if is_read else None
    if foreign and foreign.args:
        args |= foreign.args
        model = timm.create_model(name, **(args | ({} if head else _NO_HEAD)))
    model.model_args = args
    adapt_cfg(model, args["in_chans"], img_size or args.get("img_size"))
    if foreign and not random_init:
        load_weights(model, foreign, name, classifier=head)
    return model


def _hub_args(name: str, in_chans: int) -> tuple[dict[str, Any], bool]:
    """Return the arguments with which timm builds a model of the hub, and whether it whitens.

    A model keeps its own number of channels where ``in_chans`` is 3, the default.
    """
    cfg, _, args = timm.models.load_model_config_from_hf(name.removeprefix("hf-hub:"))
    args = args or {}
    if in_chans == 3:
        in_chans = args.get("in_chans", cfg.get("input_size", (3,))[0])
    return args | {"in_chans": in_chans}, is_whitened(cfg)


def _timm_cfg(name: str) -> Any:
    """Return timm's configuration of ``name``, which may have a tag.

    Raises: InputError when timm has no such model, with the nearest name or with what a file or
        folder of that name lacks.
    """
    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture):
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        if not tag or tag in tags:
            return timm.models.get_pretrained_cfg(name)
        there = ", ".join(tags) or "none"
        raise InputError(f"timm has no weights {tag!r} of {architecture}; those it has: {there}")
    if name.endswith((".npy", ".parquet")):
        raise InputError(f"{name} holds no backbone: features of `ldae embed` only grade")
    check_no_graph(Path(name))
    if Path(name).is_file():
        raise InputError(f"the file {name} does not name its architecture: write NAME@{name}")
    if Path(name).is_dir():
        raise InputError(
            f"the folder {name} holds neither a run nor the config.json of a timm model"
        )
    close = "/" not in name and nearest(name, timm.list_models(), likeness=0.6)
    hint = f"; the nearest is {close!r}" if close else ""
    raise InputError(f"there is no folder {name} and no timm model of that name{hint}")


def adapt_cfg(model: TimmModel, in_chans: int, img_size: int | Sequence[int] | None) -> None:
    """Adapt ``pretrained_cfg``, which describes timm's weights, to the model that was built.

    Args:
        img_size: side, or height and width; None: the size stays. timm's size for tests has a crop
            of its own.
    """
    cfg = dict(model.pretrained_cfg)
    for key in ("mean", "std"):
        if len(cfg[key]) != in_chans:
            # As timm does when the statistics are unknown: all channels get their mean.
            cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * in_chans
    size = to_2tuple(img_size) if img_size else cfg["input_size"][1:]
    cfg["input_size"] = (in_chans, *size)
    if cfg["input_size"] != tuple(model.pretrained_cfg["input_size"]):
        cfg["pool_size"] = None
        if tuple(size) == tuple(cfg.get("test_input_size") or ())[1:]:
            cfg["crop_pct"] = cfg.get("test_crop_pct") or cfg["crop_pct"]
        for key in ("test_input_size", "test_crop_pct", "min_input_size"):
            cfg.pop(key, None)
    model.pretrained_cfg = model.default_cfg = cfg


def _pixels(spec: str, random_init: bool, in_chans: int) -> TimmModel:
    size = spec.partition(":")[2] or "32"
    if not size.isdecimal() or int(size) < 1:
        raise InputError(f"{spec} is not pixels:SIZE with a whole number of pixels")
    if random_init:
        raise InputError(f"{spec} has no weights to initialise at random")
    model: TimmModel = nn.Flatten()
    model.pretrained_cfg = {
        "architecture": "pixels",
        "input_size": (in_chans, int(size), int(size)),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": (0.5,) * in_chans,
        "std": (0.5,) * in_chans,
    }
    return model
