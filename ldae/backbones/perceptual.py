"""Perceptual distances between images: LPIPS over VGG16, or the features of any backbone."""

from collections.abc import Callable
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
    """A distance of images in [0, 1]: (B, C, H, W) twice -> (B,), in float32.

    Feature maps are made unit vectors over their channels; the squared differences are summed over
    the channels, with the weights of ``heads`` where there are some, and averaged over positions.
    With heads the maps are summed, which is LPIPS (Zhang et al. 2018); without, they are averaged.
    It is no nn.Module, so that its network is no part of what is trained and saved around it.

    Args:
        name: what records call it.
        network: frozen here.
        maps: normalised images to feature maps, (B, C_l, H_l, W_l) each.
        size: side that the network takes; None: any.
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
        self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        self.heads = self.heads and [head.to(device) for head in self.heads]
        return self

    def __call__(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.mean.device.type, enabled=False):
            pairs = zip(self._maps(one.float()), self._maps(other.float()), strict=True)
            parts = [(first - second).square() for first, second in pairs]
            if self.heads:
                parts = [part * head for part, head in zip(parts, self.heads, strict=True)]
            layers = torch.stack([part.sum(1).mean((1, 2)) for part in parts])
        return layers.sum(0) if self.heads else layers.mean(0)

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        if self.size and images.shape[-1] != self.size:
            images = nn.functional.interpolate(
                images, (self.size, self.size), mode="bicubic", antialias=True
            )
        found = self.maps((images - self.mean) / self.std)
        return [part / (part.square().sum(1, keepdim=True) + 1e-8).sqrt() for part in found]


def open_perceptual(spec: str, in_chans: int) -> PerceptualDistance:
    """The distance of ``vgg16`` (torchvision's weights), ``vgg16@FILE``, or a backbone's spec.

    Raises: InputError when weights are absent, or the network takes other channels.
    """
    name, _, file = spec.partition("@")
    found = lpips(file) if name == "vgg16" else _of_backbone(spec)
    if len(found.mean) != in_chans:
        raise InputError(
            f"tokenizer.perceptual_net {spec} takes {len(found.mean)} channels, data.in_chans is "
            f"{in_chans}"
        )
    return found


def lpips_is_here() -> bool:
    """Whether LPIPS can be computed without a download."""
    from torchvision.models import VGG16_Weights

    cached = Path(torch.hub.get_dir(), "checkpoints", Path(VGG16_Weights.IMAGENET1K_V1.url).name)
    return cached.is_file() and find_spec("torchmetrics") is not None


def lpips(file: str = "") -> PerceptualDistance:
    """LPIPS with the VGG16 of ``file``, or torchvision's, which is downloaded once.

    Raises: InputError when its weights are absent.
    """
    from torchvision.models import VGG16_Weights, vgg16

    with torch.device("meta"):
        features = vgg16(weights=None, init_weights=False).features
    try:
        weights = VGG16_Weights.IMAGENET1K_V1
        state = read_checkpoint(Path(file)) if file else weights.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"torchvision's weights of VGG16 can not be downloaded ({first_line(error)}): name a "
            "file of them by tokenizer.perceptual_net vgg16@FILE, or another network"
        ) from None
    try:
        features.load_state_dict(
            {name[9:]: value for name, value in state.items() if name.startswith("features.")},
            assign=True,
        )
    except (AttributeError, RuntimeError):
        raise InputError(f"{file} does not hold torchvision's VGG16") from None

    def maps(images: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for number, layer in enumerate(features[: _VGG_ENDS[-1] + 1]):
            images = layer(images)
            if number in _VGG_ENDS:
                found.append(images)
        return found

    statistics = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return PerceptualDistance("LPIPS", features, maps, *statistics, heads=_published_heads())


def _published_heads() -> list[torch.Tensor]:
    """LPIPS' weights of each channel of VGG16, (C_l, 1, 1) each, which torchmetrics brings along.

    Its own LPIPS takes no VGG of a local file, so the file is all that is used of it.
    """
    package = find_spec("torchmetrics")
    if package is None:
        raise InputError("LPIPS needs a package: pip install 'ldae[conv]'")
    folder = Path(package.submodule_search_locations[0], "functional", "image", "lpips_models")
    state = read_checkpoint(folder / "vgg.pth")
    return [state[f"lin{layer}.model.1.weight"][0] for layer in range(len(_VGG_ENDS))]


def _of_backbone(spec: str) -> PerceptualDistance:
    network = load_backbone(spec)
    if not hasattr(network, "forward_intermediates"):
        raise InputError(f"tokenizer.perceptual_net {spec} shows no feature maps within it")
    wanted = preprocessing(network)

    def maps(images: torch.Tensor) -> list[torch.Tensor]:
        return network.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")

    fixed = network.pretrained_cfg.get("fixed_input_size")
    return PerceptualDistance(
        f"perceptual({spec})",
        network,
        maps,
        wanted.mean,
        wanted.std,
        size=wanted.input_size[1] if fixed else None,
    )
