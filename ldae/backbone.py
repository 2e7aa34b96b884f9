"""Any encoder as a plain timm model: of a run, a folder, a timm name or a checkpoint file."""

import argparse
import difflib
import json
import pickle
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import adapt_input_conv
from torch import nn

from ldae.data.image import to_planes
from ldae.distributed import is_main
from ldae.errors import InputError

Weights = dict[str, torch.Tensor]

# Where checkpoints keep their weights. Averaged copies first: they win where two fit equally well.
_NESTS = (
    "state_dict_ema", "model_ema", "teacher", "target_encoder", "model", "state_dict", "encoder"
)  # fmt: skip
_WRAPPERS = ("module.", "_orig_mod.", "backbone.", "base_encoder.", "encoder.", "encoder_q.")
_NAMES_SHOWN = 8


def load_backbone(
    spec: str | Path,
    *,
    random_init: bool = False,
    in_chans: int = 3,
    img_size: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """A timm model without classifier, in eval mode: normalised (B, C, H, W) -> (B, D).

    Its ``pretrained_cfg`` tells its preprocessing, see :func:`preprocessing`; its ``model_args``
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


def backbone_folder(spec: str | Path) -> Path | None:
    """The run or timm folder that ``spec`` names; None when it names something else."""
    folder = Path(spec)
    return folder if _is_run(folder) or (folder / "config.json").is_file() else None


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _open(spec: str, random_init: bool, in_chans: int, img_size: int | None) -> nn.Module:
    name, at, file = spec.partition("@")
    folder = backbone_folder(spec)
    is_pixels = name.partition(":")[0] == "pixels"
    if img_size is not None and (folder or is_pixels):
        raise InputError(f"img_size is for timm names: {spec} has its own")
    if folder:
        model = (_from_run if _is_run(folder) else _from_timm_folder)(folder, random_init)
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
        _load_file(model, Path(file), spec)
    return model


def _from_run(folder: Path, random_init: bool) -> nn.Module:
    from ldae.export import backbone_of_run

    model = backbone_of_run(folder)
    if random_init:
        args, cfg = model.model_args, model.pretrained_cfg
        model = timm.create_model(cfg["architecture"], pretrained_cfg=cfg, **args)
        model.model_args = args
    return model


def _from_timm_folder(folder: Path, random_init: bool) -> nn.Module:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = timm.create_model(f"local-dir:{folder}", not random_init, num_classes=0)
    except Exception as error:  # those of json, timm, safetensors and torch have nothing in common
        raise InputError(f"{folder} can not be opened by timm: {_first_line(error)}") from error
    model.model_args = config.get("model_args", {})
    return model


def _from_timm_name(name: str, pretrained: bool, in_chans: int, img_size: int | None) -> nn.Module:
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
        model = timm.create_model(name, pretrained, num_classes=0, **args)
    except (OSError, HfHubHTTPError) as error:
        raise InputError(
            f"the weights of {name} can not be downloaded ({type(error).__name__}); "
            "a checkpoint on this machine is opened by NAME@FILE, with its timm name"
        ) from error
    model.model_args = args
    _adapt_cfg(model, in_chans, img_size)
    return model


def _known(name: str) -> Any:
    """timm's entry for ``name``, which may carry a tag.

    Raises: InputError, with the names that are nearest.
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
        raise InputError(f"the folder {name} has neither a config.yaml nor a config.json")
    nearest = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
    hint = f"; the nearest are {', '.join(nearest)}" if nearest else ""
    raise InputError(f"there is no folder {name} and no timm model of that name{hint}")


def _adapt_cfg(model: nn.Module, in_chans: int, img_size: int | None) -> None:
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


def _load_file(model: nn.Module, file: Path, spec: str) -> None:
    """Load what fits of ``file``, and list on the console what does not."""
    own = model.state_dict()
    candidates = [
        {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
        for weights in _weight_sets(_read(file))
        for prefix in _prefixes(weights)
    ]
    if not candidates:
        raise InputError(f"{file} holds no weights")
    weights = max(candidates, key=lambda candidate: len(candidate.keys() & own.keys()))
    weights = _without_heads(weights, model.pretrained_cfg.get("classifier"))
    weights = _with_channels(_converter(model)(weights, model), model)
    fitting = {
        name: value
        for name, value in weights.items()
        if name in own and value.shape == own[name].shape
    }
    if not fitting:
        raise InputError(f"nothing in {file} fits {spec.partition('@')[0]}")
    model.load_state_dict(fitting, strict=False)
    if is_main():
        print(f"{file}: {len(fitting)} of the {len(own)} tensors of {spec.partition('@')[0]}")
        _show("not in the file, left as initialised", own.keys() - weights.keys())
        _show("not in the model, left out", weights.keys() - own.keys())
        other_shape = weights.keys() & own.keys() - fitting.keys()
        _show(
            "of another shape, left as initialised",
            [f"{n} {tuple(weights[n].shape)} for {tuple(own[n].shape)}" for n in other_shape],
        )


def _show(what: str, names: Any) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        print(f"  {what} ({len(names)}): {', '.join(names[:_NAMES_SHOWN])}{more}")


def _read(file: Path) -> Any:
    """The content of a checkpoint, without running any code that it may hold."""
    if not file.is_file():
        raise InputError(f"there is no checkpoint file {file}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        # Many training scripts keep their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} holds pickled code, which is not run here; if you trust it, convert it once "
            f"by torch.save(torch.load({str(file)!r}, weights_only=False)['model'], 'weights.pth') "
            "with the key of its weights"
        ) from error
    except Exception as error:  # a damaged file makes the two readers raise nearly every type
        raise InputError(f"{file} is no readable checkpoint: {_first_line(error)}") from error


def _weight_sets(content: Any) -> Iterator[Weights]:
    """Every set of named tensors in a checkpoint, the nested ones first."""
    if not isinstance(content, dict):
        return
    for nest in _NESTS:
        yield from _weight_sets(content.get(nest))
    weights = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if weights:
        yield weights


def _prefixes(weights: Weights) -> list[str]:
    """The chains of wrappers' prefixes that names begin with, the empty one first."""
    found = {""}
    for name in weights:
        chain = ""
        while wrapper := next((w for w in _WRAPPERS if name.startswith(w, len(chain))), None):
            chain += wrapper
            found.add(chain)
    return sorted(found, key=len)


def _without_heads(weights: Weights, classifier: str | tuple[str, ...] | None) -> Weights:
    """Leave out the classifier, and MAE's decoder with the mask token that belongs to it."""
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    dropped = tuple(f"{head}." for head in heads)
    if any(name.startswith("decoder") for name in weights):
        dropped += ("decoder", "mask_token")
    return {name: value for name, value in weights.items() if not name.startswith(dropped)}


def _converter(model: nn.Module) -> Callable[[Weights, nn.Module], Weights]:
    """timm's own conversion of foreign names and sizes for this architecture, if it has one."""
    module = sys.modules[type(model).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda weights, _: weights)


def _with_channels(weights: Weights, model: nn.Module) -> Weights:
    """Fit the first convolution to the channels of the model, as timm does for its own weights."""
    name = f"{model.pretrained_cfg.get('first_conv')}.weight"
    in_chans = model.pretrained_cfg["input_size"][0]
    if name in weights and weights[name].shape[1:2] == (3,) and in_chans != 3:
        return {**weights, name: adapt_input_conv(in_chans, weights[name])}
    return weights


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(" .")


@dataclass(frozen=True)
class EvalTransform:
    """What a backbone expects: timm's evaluation transform, split at the 8-bit pixels.

    Called on a decoded image it returns uint8 (C, H, W); an image that already has the size is
    copied untouched when ``crop_pct`` is 1. :meth:`normalise` does the rest, on the device.
    """

    input_size: tuple[int, int, int]
    """C, H, W."""
    interpolation: str
    crop_pct: float
    """H over the side to which the image is scaled before the crop."""
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of each channel, in [0, 1]."""

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        planes = to_planes(image, self.input_size[0])
        if len(planes) == 1:
            return self._resize(planes[0])
        # Pillow has no images of such channels, but resizes each channel by itself anyway.
        parts = [resize(plane) for resize, plane in zip(self._resize_channel, planes, strict=True)]
        return torch.cat(parts)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) as the float32 that the backbone takes, on the same device."""
        mean = torch.tensor(self.mean, device=images.device)[:, None, None]
        std = torch.tensor(self.std, device=images.device)[:, None, None]
        return images.float().div_(255).sub_(mean).div_(std)

    @cached_property
    def _resize(self) -> Callable[[Image.Image], torch.Tensor]:
        return self._timm_transform(self.mean)

    @cached_property
    def _resize_channel(self) -> list[Callable[[Image.Image], torch.Tensor]]:
        return [self._timm_transform((mean,)) for mean in self.mean]

    def _timm_transform(self, mean: tuple[float, ...]) -> Callable[[Image.Image], torch.Tensor]:
        return create_transform(
            input_size=self.input_size,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=mean,  # the border that crop_mode "border" adds
            normalize=False,
        )


def preprocessing(model: nn.Module) -> EvalTransform:
    """The transform that the ``pretrained_cfg`` of a backbone asks for."""
    config = resolve_model_data_config(model)
    chans = config["input_size"][0]
    for key in ("mean", "std"):
        values = tuple(config[key])
        config[key] = values * chans if len(values) == 1 else values
    config["input_size"] = tuple(config["input_size"])
    return EvalTransform(**config)
