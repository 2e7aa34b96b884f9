"""Loading the checkpoint files of other projects into timm models, without running their code."""

import argparse
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ldae.backbones.layouts import PLAIN, Layout, StateDict, layout_of
from ldae.distributed import is_main
from ldae.errors import InputError, first_line

# The keys under which checkpoints keep their weights. Averaged weights come first: of two state
# dicts that fit equally well, the first is loaded.
_STATE_DICT_KEYS = (
    "state_dict_ema", "model_ema", "ema", "EMA", "teacher", "target_encoder", "model",
    "state_dict", "encoder",
)  # fmt: skip

_WRAPPERS = (
    "module.", "_orig_mod.", "teacher.", "backbone.", "base_encoder.", "encoder.", "encoder_q."
)  # fmt: skip
_GRAPHS = (".onnx", ".pt2")  # of ONNX and of torch.export
_MAX_NAMES = 8


class Foreign(NamedTuple):
    """The encoder in a checkpoint of another project."""

    file: Path
    weights: StateDict
    """Its tensors, perhaps with a classifier."""
    layout: Layout

    @property
    def args(self) -> dict[str, Any]:
        """Arguments with which timm builds the encoder, beside those of its name."""
        return self.layout.args(self.weights)


def find_encoder(file: Path, model: nn.Module, name: str) -> Foreign:
    """Return the part of a ``.safetensors`` or PyTorch checkpoint that fits a timm model best.

    Raises: InputError when the file cannot be read or holds no weights, when its layout is known to
        be of no backbone, and when its layout is of a ViT and the model ``name`` is no ViT.
    """
    own = model.state_dict().keys()
    candidates = [
        {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
        for weights in _find_state_dicts(read_checkpoint(file))
        for prefix in _find_prefixes(weights)
    ]
    if not candidates:
        raise InputError(f"{file} holds no weights")
    weights = max(candidates, key=lambda candidate: len(candidate.keys() & own))
    layout = layout_of(weights)
    if layout.refusal:
        raise InputError(f"{file} is {layout.refusal}")
    if layout is not PLAIN and not isinstance(model, VisionTransformer):
        raise InputError(f"{file} is a checkpoint of {layout.name}, a ViT, and {name} is none")
    return Foreign(file, layout.encoder(weights), layout)


def load_weights(model: nn.Module, foreign: Foreign, name: str, classifier: bool = False) -> None:
    """Load the tensors of a checkpoint into a timm model, and print the names of the surplus ones.

    No tensor may be missing, since a part with random weights would be graded as trained. In a
    known layout (``ldae.backbones.layouts``) no tensor may be left over either.

    Args:
        model: changed in place; built with ``foreign.args``.
        name: the model's name in messages.
        classifier: load the classifier too, and give the model as many classes.

    Raises: InputError when the tensors do not fit completely, or there is no classifier.
    """
    file, weights, layout = foreign
    if not classifier:
        weights = _drop_classifier(weights, model.pretrained_cfg.get("classifier"))
    if hasattr(model, "patch_embed"):
        _check_patch_size(foreign, model, name)
    try:
        weights = _timm_converter(model)(weights, model)
    except (RuntimeError, KeyError) as error:  # such as positions of another number of tokens
        reason = f"timm cannot convert it ({first_line(error)})"
        raise InputError(f"{file} does not fit {name}: {reason}") from error
    weights = _adapt_channels(weights, model)
    if classifier:
        _resize_classifier(model, weights, file)
    model_state = model.state_dict()
    common = weights.keys() & model_state.keys()
    fitting = {key: weights[key] for key in common if weights[key].shape == model_state[key].shape}
    if not fitting:
        raise InputError(f"nothing in {file} fits {name}")
    lacking = _listed("not in the file", model_state.keys() - weights.keys())
    lacking += _listed(
        "of another shape",
        [
            f"{key} {tuple(weights[key].shape)} for {tuple(model_state[key].shape)}"
            for key in common - fitting.keys()
        ],
    )
    surplus = _listed("not in the model, left out", weights.keys() - model_state.keys())
    if lacking or (surplus and layout is not PLAIN):
        what = "does not fit" if layout is PLAIN else f"is a checkpoint of {layout.name} and no"
        raise InputError(f"{file} {what} {name}: {'; '.join(lacking + surplus)}")
    model.load_state_dict(fitting, strict=False)
    if is_main():
        print(f"{file}: loaded {len(fitting)} of the {len(model_state)} tensors of {name}")
        for line in surplus:
            print(f"  {line}")


def _check_patch_size(foreign: Foreign, model: nn.Module, name: str) -> None:
    """Check the patch size, to which timm would otherwise resample the patch embedding.

    Raises: InputError when it differs.
    """
    key = f"{model.pretrained_cfg.get('first_conv')}.weight"
    there, here = foreign.weights.get(key), model.state_dict().get(key)
    if there is None or here is None or there.ndim != here.ndim:  # timm has other names or layers
        return
    if there.shape[2:] != here.shape[2:]:
        raise InputError(
            f"{foreign.file} does not fit {name}: its patches have {there.shape[-1]} pixels a "
            f"side, and those of the model {here.shape[-1]}"
        )


def _listed(title: str, names: Iterable[str]) -> list[str]:
    """Return one line with the first of the names, or no line if there are no names."""
    names = sorted(names)
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return [f"{title} ({len(names)}): {', '.join(names[:_MAX_NAMES])}{more}"] if names else []


def check_no_graph(file: Path) -> None:
    """Raises: InputError for an existing file whose name says that it is an exported graph."""
    if file.suffix.lower() in _GRAPHS and file.is_file():
        raise InputError(
            f"{file} is an exported graph, from which timm cannot build the network: name the "
            "exported folder around it, or the timm model"
        )


def read_checkpoint(file: Path) -> Any:
    """Return the content of a checkpoint, without running any code that it may hold.

    Raises: InputError when the file is missing or cannot be read in this way.
    """
    if not file.is_file():
        raise InputError(f"there is no checkpoint file {file}")
    check_no_graph(file)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        # Many training scripts save their command line, a Namespace, with the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} holds pickled code, which is not run here; if you trust it, convert it once "
            f"with torch.save(torch.load({str(file)!r}, weights_only=False)['model'], "
            "'weights.pth'), where 'model' is the key of its weights"
        ) from error
    except Exception as error:  # for a damaged file the two readers raise nearly every type
        # torch takes unknown bytes for instructions of its old format, which raise a KeyError.
        reason = "it is not a torch file" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"{file} is not a readable checkpoint: {reason}") from error


def _find_state_dicts(content: Any) -> Iterator[StateDict]:
    """Yield every dict of named tensors in a checkpoint, nested ones first."""
    if not isinstance(content, dict):
        return
    for key in _STATE_DICT_KEYS:
        yield from _find_state_dicts(content.get(key))
    weights = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if weights:
        yield weights


def _find_prefixes(weights: StateDict) -> list[str]:
    """Return the prefixes of wrappers that names begin with, from the empty one to the longest."""
    prefixes = {""}
    for name in weights:
        prefix = ""
        while wrapper := next((w for w in _WRAPPERS if name.startswith(w, len(prefix))), None):
            prefix += wrapper
            prefixes.add(prefix)
    return sorted(prefixes, key=len)


def _drop_classifier(weights: StateDict, classifier: str | tuple[str, ...] | None) -> StateDict:
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    dropped = tuple(f"{head}." for head in heads)
    return {name: value for name, value in weights.items() if not name.startswith(dropped)}


def _resize_classifier(model: nn.Module, weights: StateDict, file: Path) -> None:
    """Give the model as many classes as the weights have.

    Raises: InputError when the weights hold no classifier.
    """
    head = model.pretrained_cfg.get("classifier")
    key = f"{head if isinstance(head, str) else head[0]}.weight"
    if key not in weights:
        raise InputError(f"{file} has no classifier: it does not hold {key}")
    if len(weights[key]) != model.num_classes:
        model.reset_classifier(len(weights[key]))


def _timm_converter(model: nn.Module) -> Callable[[StateDict, nn.Module], StateDict]:
    """Return timm's conversion of foreign names and sizes for this architecture, or a no-op."""
    module = sys.modules[type(model).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda weights, _: weights)


def _adapt_channels(weights: StateDict, model: nn.Module) -> StateDict:
    """Fit RGB weights of the first convolution to the model's channels, as timm does."""
    name = f"{model.pretrained_cfg.get('first_conv')}.weight"
    in_chans = model.pretrained_cfg["input_size"][0]
    if name in weights and weights[name].shape[1:2] == (3,) and in_chans != 3:
        return {**weights, name: adapt_input_conv(in_chans, weights[name])}
    return weights
