"""Any encoder as a plain timm model: of a run, a folder, a timm name or a checkpoint file."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ldae.backbones.weights import load_weights
from ldae.errors import InputError, first_line, nearest
from ldae.runs.kinds import kind_of
from ldae.runs.layout import CLASSIFIER


def load_backbone(
    spec: str | Path,
    *,
    random_init: bool = False,
    in_chans: int = 3,
    img_size: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """A timm model without classifier, in eval mode: normalised (B, C, H, W) -> (B, D).

    Its ``pretrained_cfg`` tells its preprocessing, see ``ldae.preprocessing``; its ``model_args``
    are what timm needs to build it again. ``spec`` is one of

    - a run folder: the backbone of its newest checkpoint;
    - a folder that timm wrote, or ``ldae export``;
    - a timm name, with the weights that timm downloads, or ``hf-hub:USER/MODEL``;
    - ``NAME@FILE``: a timm name and a checkpoint on this machine, ``.safetensors`` or PyTorch's;
    - ``pixels`` or ``pixels:SIZE``: the raw pixels of a square, 32 on a side by default.

    ``random_init`` builds the same architecture with timm's own random initialisation, drawn from
    ``seed``: the untrained control. ``in_chans`` and ``img_size`` are for timm names; the other
    kinds know their own, except that pixels take any ``in_chans``.

    Raises: InputError, naming ``spec``, when it can not be opened, or nothing in the file fits.
    """
    spec = str(spec)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # the CPU's alone: no GPU is restored
        model = _open(spec, random_init, in_chans, img_size)
    return model.eval()


def load_classifier(spec: str | Path, in_chans: int = 3, img_size: int | None = None) -> nn.Module:
    """A timm classifier in eval mode, to compute with: normalised (B, C, H, W) -> (B, num_classes).

    ``spec`` is a folder that timm wrote, or ``ldae linear --save``, or a timm name, or ``NAME@FILE``,
    which then has as many classes as the file; ``in_chans`` and ``img_size`` are for timm names. Its
    ``pretrained_cfg`` tells its preprocessing.

    Raises: InputError, naming ``spec``, when it can not be opened, or has no classifier.
    """
    spec = str(spec)
    folder = backbone_folder(spec)
    name, at, file = spec.partition("@")
    if name.startswith("hf-hub:"):  # there, @ precedes a revision
        name, at = spec, ""
    if folder and not kind_of(folder):
        if img_size is not None:
            raise InputError(f"img_size is for timm names: {spec} has its own")
        model = _from_timm_folder(folder, False, head=True)
    elif folder or spec.partition(":")[0] == "pixels":
        raise InputError(
            f"{spec} has no classifier: name a folder of `ldae linear --save`, or a timm model"
        )
    else:
        model = _from_timm_name(name, not at, in_chans, img_size, head=True)
        if at:
            load_weights(model, Path(file), name, classifier=True)
    if not model.num_classes:
        raise InputError(f"{spec} has no classifier: its num_classes is 0")
    return model.eval().requires_grad_(False)


def label_names(classifier: nn.Module) -> list[str]:
    """The names of its outputs, as far as its configuration tells them."""
    names = classifier.pretrained_cfg.get("label_names") or ()
    return [str(name) for name in (names.values() if isinstance(names, dict) else names)]


def backbone_folder(spec: str | Path) -> Path | None:
    """The run or timm folder that ``spec`` names; None when it names something else.

    Of a fine-tuning that is done it is the folder of its classifier.
    """
    folder = Path(spec)
    if (folder / CLASSIFIER / "config.json").is_file():
        return folder / CLASSIFIER
    return folder if kind_of(folder) or (folder / "config.json").is_file() else None


def _open(spec: str, random_init: bool, in_chans: int, img_size: int | None) -> nn.Module:
    name, at, file = spec.partition("@")
    folder = backbone_folder(spec)
    is_pixels = name.partition(":")[0] == "pixels"
    if img_size is not None and (folder or is_pixels):
        raise InputError(f"img_size is for timm names: {spec} has its own")
    if folder:
        model = (_from_run if kind_of(folder) else _from_timm_folder)(folder, random_init)
        own_chans = model.pretrained_cfg["input_size"][0]
        if in_chans not in (3, own_chans):  # 3 is what callers pass who did not ask
            raise InputError(f"in_chans is for timm names: {spec} takes {own_chans} channels")
        return model
    if is_pixels:
        return _pixels(spec, random_init, in_chans)
    if name.startswith("hf-hub:"):  # there, @ precedes a revision
        return _from_timm_name(spec, not random_init, in_chans, img_size)
    model = _from_timm_name(name, not (random_init or at), in_chans, img_size)
    if at and not random_init:
        load_weights(model, Path(file), name)
    return model


def _from_run(folder: Path, random_init: bool) -> nn.Module:
    from ldae.backbones.run import backbone_of_run, control_of_run

    return (control_of_run if random_init else backbone_of_run)(folder)


def _from_timm_folder(folder: Path, random_init: bool, head: bool = False) -> nn.Module:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = timm.create_model(f"local-dir:{folder}", not random_init, **_head(head))
    except Exception as error:  # those of json, timm, safetensors and torch have nothing in common
        reason = first_line(error)
        if "weights_only" in reason:  # torch's and timm's words tell how to run it
            reason = "it holds pickled code, which is not run here"
        raise InputError(f"{folder} can not be opened by timm: {reason}") from error
    model.model_args = config.get("model_args", {})
    return model


def _head(wanted: bool) -> dict[str, int]:
    """The argument that makes timm leave the classifier out, if it is not wanted."""
    return {} if wanted else {"num_classes": 0}


def _from_timm_name(
    name: str, pretrained: bool, in_chans: int, img_size: int | None, head: bool = False
) -> nn.Module:
    from huggingface_hub.errors import HfHubHTTPError

    known = None if name.startswith("hf-hub:") else _known(name)
    if pretrained and known and not known.has_weights:
        raise InputError(
            f"timm has no weights for {name}: name a checkpoint as {name}@FILE, "
            "or ask for the random initialisation"
        )
    args = {"in_chans": in_chans}
    # Models that take any size have no such argument. Those of the hub are mostly of a fixed size.
    if img_size is not None and (known is None or known.fixed_input_size):
        args["img_size"] = img_size
    try:
        model = timm.create_model(name, pretrained, **_head(head), **args)
    except (OSError, HfHubHTTPError) as error:
        raise InputError(
            f"the weights of {name} can not be downloaded ({type(error).__name__}); "
            "a checkpoint on this machine is opened by NAME@FILE, with its timm name"
        ) from error
    model.model_args = args
    adapt_cfg(model, in_chans, img_size)
    return model


def _known(name: str) -> Any:
    """timm's entry for ``name``, which may carry a tag.

    Raises: InputError, with the nearest name.
    """
    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture):
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        if not tag or tag in tags:
            return timm.models.get_pretrained_cfg(name)
        raise InputError(f"timm has no weights {tag!r} of {architecture}, but {', '.join(tags)}")
    if Path(name).is_file():
        raise InputError(f"the file {name} does not tell its architecture: write NAME@{name}")
    if Path(name).is_dir():
        raise InputError(
            f"the folder {name} holds neither a run nor the config.json of a timm model"
        )
    close = nearest(name, timm.list_models(), likeness=0.4)
    hint = f"; the nearest is {close!r}" if close else ""
    raise InputError(f"there is no folder {name} and no timm model of that name{hint}")


def adapt_cfg(model: nn.Module, in_chans: int, img_size: int | None) -> None:
    """Make ``pretrained_cfg``, which describes the weights, describe the model that was built."""
    cfg = dict(model.pretrained_cfg)
    own_chans, height, width = cfg["input_size"]
    if in_chans != own_chans:
        # timm's rule where the statistics of the channels are unknown: their mean for all.
        for key in ("mean", "std"):
            cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * in_chans
    cfg["input_size"] = (in_chans, img_size or height, img_size or width)
    if cfg["input_size"] != tuple(model.pretrained_cfg["input_size"]):
        cfg["pool_size"] = None
        for key in ("test_input_size", "test_crop_pct", "min_input_size"):
            cfg.pop(key, None)
    model.pretrained_cfg = model.default_cfg = cfg


def _pixels(spec: str, random_init: bool, in_chans: int) -> nn.Module:
    size = spec.partition(":")[2] or "32"
    if not size.isdecimal() or int(size) < 1:
        raise InputError(f"{spec} is not pixels:SIZE with a whole number of pixels")
    if random_init:
        raise InputError(f"{spec} has no weights that could be random")
    model = nn.Flatten()
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
