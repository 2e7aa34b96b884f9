"""The configuration tree. Its defaults are l-DAE at the paper's scale, each with its why beside it."""

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
import yaml

from ldae.errors import InputError


class Range(NamedTuple):
    """The finite numbers that a setting takes: at least ``low`` (above it, if ``open``) to ``high``."""

    low: float
    high: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open else value >= self.low
        return above and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        words = f"{'above' if self.open else 'at least'} {self.low:g}"
        return words if self.high == math.inf else f"{words} and at most {self.high:g}"


NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, open=True)
COUNT = Range(1)
SHARE = Range(0, 1)


@dataclass(frozen=True)
class Data:
    """Which images, and how they become squares."""

    source: Annotated[str, tyro.conf.arg(aliases=["--data"], metavar="SOURCE")] = ""
    """A folder, a .zip or .tar of one, torch/NAME@DIR, hfds/NAME, scattered-digits[:N] or digits."""
    eval_source: Annotated[str, tyro.conf.arg(aliases=["--eval-data"], metavar="SOURCE")] = ""
    """Images of the online k-NN; empty: the evaluation split of the source."""
    img_size: Annotated[int, COUNT] = 256  # 16 x 16 tokens of 16 x 16 pixels
    """Side of the square that the network sees, in pixels."""
    in_chans: Annotated[int, COUNT] = 3
    """Channels: 1 grey, 3 RGB, 4 RGBA, any number from .npy arrays."""
    crop: Literal["center", "random"] = "center"  # the paper: l-DAE hardly relies on augmentation
    """Center crop, or random resized crop (+0.5 points in the paper)."""
    flip: bool = False  # the paper states none
    """Mirror half of the training images."""
    stats: Literal["auto", "imagenet"] = "auto"
    """Where mean and std come from when they are not given: the data itself, or ImageNet's."""
    mean: Annotated[tuple[float, ...], SHARE] = ()
    """Mean of each channel, in [0, 1]."""
    std: Annotated[tuple[float, ...], POSITIVE] = ()
    """Standard deviation of each channel, in [0, 1]."""
    bad_images: Literal["stop", "skip"] = "stop"
    """What an undecodable image does: stop the run, or be replaced by the next one and counted."""


@dataclass(frozen=True)
class Tokenizer:
    """How an image becomes latent tokens."""

    name: Literal["patch_pca", "pixel", "patch_ae", "patch_vae", "conv_vae"] = "patch_pca"
    """The map from pixels to tokens."""
    dim: Annotated[int, COUNT] = 32  # the best of 8 to 128 for PCA of 16 x 16 patches (Table 2)
    """Latent dimension d of one token."""
    scale: Literal["raw", "global", "per-axis"] = "per-axis"  # benchmarks/results/cifar10-latents
    """Scale of latents before unit noise: as they are, unit mean variance, unit variance each."""
    fit_images: Annotated[int, NOT_NEGATIVE] = 20_000  # 5 million patches, for 768 axes
    """Images that the tokenizer is fitted on, the first in training order; 0: every image once."""
    path: str = ""
    """A fitted tokenizer.safetensors to use instead of fitting one."""
    perceptual_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the perceptual loss when a conv tokenizer is trained."""
    adversarial_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the adversarial loss when a conv tokenizer is trained."""


@dataclass(frozen=True)
class Noise:
    """z_t = gamma_t z_0 + sigma_t eps."""

    schedule: Literal["ddpm", "cosine", "linear_gamma2", "linear_sigma", "single"] = "linear_sigma"
    """ddpm, cosine, linear_gamma2: gamma^2 + sigma^2 = 1. linear_sigma, single: gamma = 1."""
    steps: Annotated[int, COUNT] = 1000
    """Number T of noise levels; single has one."""
    max_sigma: Annotated[float, POSITIVE] = math.sqrt(2)  # a signal-to-noise ratio of 1/2
    """Largest sigma of linear_sigma."""
    single_sigma: Annotated[float, POSITIVE] = math.sqrt(1 / 3)
    """The sigma of single."""


@dataclass(frozen=True)
class Objective:
    """What the network sees and predicts."""

    input: Literal["latent", "image"] = "image"
    """Noised latents, or their inverse projection: a noisy image."""
    target: Literal["eps", "latent", "projected", "image"] = "image"
    """The noise, the clean latent, its inverse projection, or the original image."""
    weight: Literal["uniform", "gamma2", "inverse"] = "inverse"
    """lambda_t: 1, gamma_t^2, or 1 / (1 + sigma_t^2)."""
    residual_weight: Annotated[float, NOT_NEGATIVE] = 0.1
    """Weight of the error outside the first d principal axes when the target is the image."""


@dataclass(frozen=True)
class Model:
    """The encoder, in timm's words; the decoder has as many blocks."""

    name: str = "vit_large_patch16_224"
    """A timm ViT; the fields below override what it says."""
    patch_size: Annotated[int | None, COUNT] = None
    """Side of a patch in pixels."""
    depth: Annotated[int | None, COUNT] = 12  # "ViT-1/2L": DiT-L's 24 blocks are 12 + 12
    """Blocks of the encoder."""
    embed_dim: Annotated[int | None, COUNT] = None
    """Width of the tokens."""
    num_heads: Annotated[int | None, COUNT] = None
    """Attention heads."""
    cond_ratio: Annotated[float, POSITIVE] = 0.25  # at DiT's 1 it is a third of the parameters
    """Width of the conditioning as a share of embed_dim."""
    class_conditional: bool = False
    """Tell the network the label, as DiT does."""
    label_dropout: Annotated[float, SHARE] = 0.1
    """How often the label is withheld when class_conditional."""


@dataclass(frozen=True)
class Optim:
    """The recipe. Progress is counted in images."""

    batch_size: Annotated[int, COUNT] = 2048
    """Images of one step, over all devices."""
    blr: Annotated[float, POSITIVE] = 1e-4
    """Learning rate at batch 256: lr = blr * batch_size / 256."""
    epochs: Annotated[float, POSITIVE] = 400
    """Passes over the data."""
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 100
    """Passes of linear warm-up, before the half-cosine to zero."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0  # DiT's and the paper's
    """AdamW's, on matrices only."""
    betas: Annotated[tuple[float, float], SHARE] = (0.9, 0.999)  # unstated in the paper; DiT's
    """AdamW's."""
    clip_grad: Annotated[float, NOT_NEGATIVE] = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    ema: Annotated[float, SHARE] = 0.0
    """Decay of the moving average of the weights, a step; 0: none. Evaluations use it if it is on."""


@dataclass(frozen=True)
class System:
    """How a run is executed. These settings may change between the parts of a resumed run."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the network; auto: bf16 where the device computes it natively."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on GPUs."""
    checkpoint_activations: bool = False
    """Recompute the blocks in the backward pass: less memory, a third more time."""
    device_batch: Annotated[int, NOT_NEGATIVE] = 0
    """Largest batch of one device at once; smaller than its share: gradients accumulate. 0: all."""
    workers: Annotated[int, NOT_NEGATIVE] = 8
    """Data workers of each process; 0: load in the process itself."""
    log_every: Annotated[int, COUNT] = 20
    """Steps between two lines of progress."""
    save_minutes: Annotated[float, NOT_NEGATIVE] = 10
    """Minutes between two checkpoints; there is always one at the end."""
    keep: Annotated[int, NOT_NEGATIVE] = 2
    """Newest checkpoints to keep; 0: all."""
    knn_every: Annotated[int, NOT_NEGATIVE] = 0
    """Epochs between two online k-NN evaluations; 0: none."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder (extra: tensorboard)."""
    wandb: str = ""
    """Weights & Biases project to log to (extra: wandb)."""


@dataclass(frozen=True)
class Config:
    """One pre-training."""

    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    noise: Noise = field(default_factory=Noise)
    objective: Objective = field(default_factory=Objective)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    system: System = field(default_factory=System)
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Of the weights, the data order, the augmentation and the noise."""
    init_from: str = ""
    """An exported backbone to start the encoder from."""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf under its dotted name, in the order of the tree."""
    leaves = {}
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{part.name}.")
        else:
            leaves[prefix + part.name] = value
    return leaves


def check(settings: Any, prefix: str = "") -> None:
    """Raises: InputError naming the first setting of the tree that is out of its range."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for part in dataclasses.fields(settings):
        name, value = prefix + part.name, getattr(settings, part.name)
        if dataclasses.is_dataclass(value):
            check(value, f"{name}.")
        allowed = [r for r in getattr(hints[part.name], "__metadata__", ()) if isinstance(r, Range)]
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not all(r.holds(number) for r in allowed):
                raise InputError(f"{name} must be {allowed[0]}, not {number}")


def replace(config: Any, changes: dict[str, Any]) -> Any:
    """``config`` with the leaves of these dotted names changed.

    Raises: InputError for a name that does not exist, with the nearest one that does, and for a
        value that the setting does not take.
    """
    known = flatten(config)
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise InputError(f"there is no setting {name!r}; the nearest is {near[0]!r}")
    return _replace(config, changes, "")


def _replace(config: Any, changes: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(type(config))
    values = {}
    for part in dataclasses.fields(config):
        name, value = prefix + part.name, getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            values[part.name] = _replace(value, changes, f"{name}.")
        elif name in changes:
            values[part.name] = _checked(name, changes[name], hints[part.name])
    return dataclasses.replace(config, **values)


def _checked(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type that the setting has; YAML knows no tuples and reads 1e-4 as text."""
    options = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
    if options and value in options:
        return value
    if not options and not _is_union(hint) and typing.get_origin(hint) is None:
        if hint is float and isinstance(value, str | int) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
        if type(value) is hint:
            return value
    if _is_union(hint) and (value is None or type(value) in typing.get_args(hint)):
        return value
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(float(part) for part in value)
    wanted = " or ".join(map(str, options)) if options else getattr(hint, "__name__", str(hint))
    raise InputError(f"setting {name!r} takes {wanted}, not {value!r}")


def _is_union(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def difference(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """The leaves that differ: dotted name -> (old value, new value)."""
    before, after = flatten(old), flatten(new)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def to_yaml(config: Config) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


def load(path: str | Path, base: Config = Config()) -> Config:
    """``base`` changed by what the YAML file says, which may be a whole tree or a few settings.

    Raises: InputError naming the file when it is missing, no YAML, or sets what does not exist.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"configuration {path} can not be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"configuration {path} is not a YAML file") from None
    if not isinstance(tree, dict):
        raise InputError(f"configuration {path} holds no settings")
    changes: dict[str, Any] = {}

    def collect(part: dict, prefix: str) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{key}.")
            else:
                changes[f"{prefix}{key}"] = value

    collect(tree, "")
    try:
        return replace(base, changes)
    except InputError as error:
        raise InputError(f"configuration {path}: {error}") from None
