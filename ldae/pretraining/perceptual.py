"""Perceptual distances between images: LPIPS on VGG16, or on the features of any backbone."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from ldae.backbones.open import load_backbone
from ldae.backbones.preprocessing import preprocessing
from ldae.backbones.weights import read_checkpoint
from ldae.errors import InputError, first_line

_VGG_ENDS = (3, 8, 15, 22, 29)  # the last ReLU before each pooling


class PerceptualDistance:
    """A distance between images in [0, 1]: (B, C, H, W) twice -> (B,), in float32.

    Feature maps are normalised to unit length over their channels. Their squared differences are
    summed over channels, weighted by ``heads`` if given, and averaged over positions. With heads,
    the distances of all maps are summed, as in LPIPS (Zhang et al. 2018). Without heads, they are
    averaged.

    It is not an nn.Module, so that a model that holds it neither trains nor saves its network.

    Args:
        name: name of the distance in results.
        network: is frozen.
        maps: function from normalised images to feature maps, (B, C_l, H_l, W_l) each.
        mean: mean of each channel, in [0, 1].
        std: standard deviation of each channel, in [0, 1].
        heads: weights of the channels of each map, (C_l, 1, 1) each.
        size: side of the images that the network takes; None: any side.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        maps: Callable[[torch.Tensor], list[torch.Tensor]],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        heads: list[torch.Tensor] | None = None,
        size: int | None = None,
    ) -> None:
        self.name, self.maps, self.size = name, maps, size
        self.network = network.eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(part)[:, None, None] for part in (mean, std))
        self.heads = heads

    def to(self, device: torch.device) -> "PerceptualDistance":
        """Move the network and the constants to a device, in place, and return the distance."""
        self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        self.heads = self.heads and [head.to(device) for head in self.heads]
        return self

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.mean.device.type, enabled=False):
            pairs = zip(self._maps(x.float()), self._maps(y.float()), strict=True)
            parts = [(x_map - y_map).square() for x_map, y_map in pairs]
            if self.heads:
                parts = [part * head for part, head in zip(parts, self.heads, strict=True)]
            layers = torch.stack([part.sum(1).mean((1, 2)) for part in parts])
        return layers.sum(0) if self.heads else layers.mean(0)

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        if self.size and images.shape[-1] != self.size:
            images = nn.functional.interpolate(
                images, (self.size, self.size), mode="bicubic", antialias=True
            )
        maps = self.maps((images - self.mean) / self.std)
        return [part / (part.square().sum(1, keepdim=True) + 1e-8).sqrt() for part in maps]


def open_perceptual(spec: str, in_chans: int) -> PerceptualDistance:
    """Open ``vgg16`` (LPIPS with torchvision's weights), ``vgg16@FILE``, or a backbone by its spec.

    Raises: InputError when weights are absent, or the network takes another number of channels.
    """
    name, _, file = spec.partition("@")
    distance = open_lpips(file) if name == "vgg16" else _backbone_distance(spec)
    if len(distance.mean) != in_chans:
        raise InputError(
            f"tokenizer.perceptual_net {spec} takes {len(distance.mean)} channels, but "
            f"data.in_chans is {in_chans}"
        )
    return distance


def lpips_is_cached() -> bool:
    """Return whether LPIPS can be computed without a download."""
    from torchvision.models import VGG16_Weights

    cached = Path(torch.hub.get_dir(), "checkpoints", Path(VGG16_Weights.IMAGENET1K_V1.url).name)
    return cached.is_file() and find_spec("torchmetrics") is not None


def open_lpips(file: str = "") -> PerceptualDistance:
    """Return LPIPS with the VGG16 of ``file``, or with torchvision's, which is downloaded once.

    Raises: InputError when the weights are absent, or the file does not hold torchvision's VGG16.
    """
    from torchvision.models import VGG16_Weights, vgg16

    with torch.device("meta"):
        features = vgg16(weights=None, init_weights=False).features
    try:
        if file:
            state = read_checkpoint(Path(file))
        else:
            weights = VGG16_Weights.IMAGENET1K_V1
            state = weights.get_state_dict(check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"torchvision's weights of VGG16 cannot be downloaded ({first_line(error)}): give a "
            "file of them with tokenizer.perceptual_net vgg16@FILE, or name another network"
        ) from None
    try:
        features.load_state_dict(
            {name[9:]: value for name, value in state.items() if name.startswith("features.")},
            assign=True,
        )
    except (AttributeError, RuntimeError):
        raise InputError(f"{file} does not hold torchvision's VGG16") from None

    def maps(images: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for index, layer in enumerate(features[: _VGG_ENDS[-1] + 1]):
            images = layer(images)
            if index in _VGG_ENDS:
                outputs.append(images)
        return outputs

    statistics = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return PerceptualDistance("LPIPS", features, maps, *statistics, heads=_lpips_heads())


def _lpips_heads() -> list[torch.Tensor]:
    """Return LPIPS' weights of the channels of VGG16, (C_l, 1, 1) each.

    They are read from a file of torchmetrics, the only part of torchmetrics that is used: its own
    LPIPS does not take a local file of VGG16.

    Raises: InputError when torchmetrics is not installed.
    """
    package = find_spec("torchmetrics")
    if package is None:
        raise InputError("LPIPS needs torchmetrics: pip install 'ldae[conv]'")
    folder = Path(package.submodule_search_locations[0], "functional", "image", "lpips_models")
    state = read_checkpoint(folder / "vgg.pth")
    return [state[f"lin{layer}.model.1.weight"][0] for layer in range(len(_VGG_ENDS))]


def _backbone_distance(spec: str) -> PerceptualDistance:
    network = load_backbone(spec)
    if not hasattr(network, "forward_intermediates"):
        raise InputError(
            f"tokenizer.perceptual_net {spec} has no forward_intermediates, which returns the "
            "feature maps of a network: name another backbone"
        )
    transform = preprocessing(network)
    fixed = network.pretrained_cfg.get("fixed_input_size")
    return PerceptualDistance(
        f"perceptual({spec})",
        network,
        partial(network.forward_intermediates, intermediates_only=True, output_fmt="NCHW"),
        transform.mean,
        transform.std,
        size=transform.input_size[1] if fixed else None,
    )
