"""Weights of other projects' checkpoint files: found, renamed and loaded without running code."""

import argparse
import pickle
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from timm.models import adapt_input_conv
from torch import nn

from ldae.distributed import is_main
from ldae.errors import InputError, first_line

Weights = dict[str, torch.Tensor]

# Where checkpoints keep their weights. Averaged copies first: they win where two fit equally well.
_NESTS = (
    "state_dict_ema", "model_ema", "teacher", "target_encoder", "model", "state_dict", "encoder"
)  # fmt: skip

_WRAPPERS = ("module.", "_orig_mod.", "backbone.", "base_encoder.", "encoder.", "encoder_q.")
_NAMES_SHOWN = 8


def load_weights(model: nn.Module, file: Path, name: str, classifier: bool = False) -> None:
    """Load what fits of ``file`` into a timm model, and list on the console what does not.

    ``file`` is ``.safetensors`` or PyTorch's. ``name`` is what messages call the model. With
    ``classifier``, the model gets the file's classifier, and as many classes.

    Raises: InputError when the file can not be read, or nothing in it fits, or it has no classifier.
    """
    own = model.state_dict()
    candidates = [
        {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
        for weights in _weight_sets(read_checkpoint(file))
        for prefix in _prefixes(weights)
    ]
    if not candidates:
        raise InputError(f"{file} holds no weights")
    weights = max(candidates, key=lambda candidate: len(candidate.keys() & own.keys()))
    if not classifier:
        weights = _without_heads(weights, model.pretrained_cfg.get("classifier"))
    weights = _with_channels(_converter(model)(weights, model), model)
    if classifier:
        _take_classes(model, weights, file)
        own = model.state_dict()
    fitting = {
        key: value for key, value in weights.items() if key in own and value.shape == own[key].shape
    }
    if not fitting:
        raise InputError(f"nothing in {file} fits {name}")
    model.load_state_dict(fitting, strict=False)
    if is_main():
        print(f"{file}: {len(fitting)} of the {len(own)} tensors of {name}")
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


def read_checkpoint(file: Path) -> Any:
    """The content of a checkpoint, without running any code that it may hold.

    Raises: InputError when the file is missing or can not be read so.
    """
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
        # A KeyError is of torch's old format, which takes any bytes for its instructions.
        reason = "it is no file of torch's" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"{file} is no readable checkpoint: {reason}") from error


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


def _take_classes(model: nn.Module, weights: Weights, file: Path) -> None:
    """Give the model as many classes as the weights have."""
    head = model.pretrained_cfg.get("classifier")
    key = f"{head if isinstance(head, str) else head[0]}.weight"
    if key not in weights:
        raise InputError(f"{file} has no classifier: there is no {key} in it")
    if len(weights[key]) != model.num_classes:
        model.reset_classifier(len(weights[key]))


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
