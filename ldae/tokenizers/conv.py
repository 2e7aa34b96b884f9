"""The convolutional autoencoder of latent diffusion, on diffusers: KL-regularised or vector-quantised,
trained here or published."""

import math
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from ldae.errors import InputError, first_line
from ldae.patches import patchify, unpatchify
from ldae.tokenizers.learned import LOG_VARIANCES, Posterior, TrainedTokenizer

COMMITMENT = 0.25  # beta of van den Oord et al. 2017, on the encoder's term
_RESIDUAL_BLOCKS = 2  # of each level of the encoder; the decoder has one more (LDM)


class ConvTokenizer(TrainedTokenizer):
    """A latent map of ``patch_size`` / 2 times fewer pixels a side, of which 2 x 2 make a token.

    So there are as many tokens as patches, of dim = 4 x channels. Without ``codes`` the network is a
    diffusers.AutoencoderKL, with a Gaussian posterior; with ``codes`` it is a VQModel, whose latents
    are those before quantisation: ``decode`` quantises.

    Args:
        width: channels at full resolution; x 2 and x 4 at the second and the third, then constant.
        codes: size of the codebook; 0: none.
        pretrained: a published network of either kind, used as it is: a folder, or USER/NAME of the
            hub with the sub-folder, if any, behind it. It brings its own codebook.

    Raises: InputError when a size does not fit, the network can not be opened, or diffusers is absent.
    """

    loss_weights = ("kl_weight", "perceptual_weight", "adversarial_weight")

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        dim: int,
        scale: str,
        width: int = 128,
        codes: int = 0,
        pretrained: str = "",
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, dim, scale)
        factor, rest = divmod(patch_size, 2)
        if rest or factor & (factor - 1):
            raise InputError(
                f"model.patch_size {patch_size} does not fit conv_vae, which halves the image once or "
                "more and joins 2 x 2 latents: it is a power of two from 2 on"
            )
        if dim % 4:
            raise InputError(
                f"tokenizer.dim {dim} is no multiple of 4: a token of conv_vae is 2 x 2 latents"
            )
        self.width, self.codes, self.pretrained = width, codes, pretrained
        diffusers = _diffusers()
        if pretrained:
            self.network = _published(diffusers, pretrained)
            self._check_published()
            self.pixel_mean.fill_(0.5)  # what every published one sees: pixels in [-1, 1]
            self.pixel_std.fill_(0.5)
        else:
            self.network = _untrained(diffusers, factor, in_chans, dim // 4, width, codes)
        if self.quantised:
            self.network.quantize.legacy = False  # legacy puts beta on the codebook's term

    @property
    def quantised(self) -> bool:
        return hasattr(self.network, "quantize")

    @property
    def stochastic(self) -> bool:
        return not self.quantised

    def posterior(self, images: torch.Tensor) -> Posterior:
        network = self.network
        if self.quantised:
            return Posterior(patchify(network.encode(images).latents, 2), None)
        found = network.encode(images).latent_dist
        return Posterior(patchify(found.mean, 2), patchify(found.logvar.clamp(*LOG_VARIANCES), 2))

    def generate(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = self.network.decode(unpatchify(latents, 2, self.dim // 4))
        loss = decoded.commit_loss if self.quantised else None
        return decoded.sample, latents.new_zeros(()) if loss is None else loss

    def code_indices(self, images: torch.Tensor) -> torch.Tensor:
        """The code of each latent of normalised images, int64 (B, 4 N)."""
        _, _, (_, _, indices) = self.network.quantize(self.network.encode(images).latents)
        return indices.reshape(len(images), -1)

    @property
    def last_weight(self) -> torch.Tensor:
        return self.network.decoder.conv_out.weight

    def raw_units(self) -> tuple[float, float]:
        """A published network's own; those of a new one are what they come out as."""
        if not self.pretrained:
            return 0.0, 1.0
        config = self.network.config
        return config.get("shift_factor") or 0.0, config.scaling_factor

    def _check_published(self) -> None:
        config, name = self.network.config, f"tokenizer.pretrained {self.pretrained}"
        own = config.num_vq_embeddings if self.quantised else 0
        channels = (config.get("vq_embed_dim") if self.quantised else 0) or config.latent_channels
        for setting, theirs, ours in (
            ("data.in_chans", config.in_channels, self.in_chans),
            ("tokenizer.dim", 4 * channels, self.dim),
            ("model.patch_size", 2 ** len(config.block_out_channels), self.patch_size),
            ("tokenizer.codes", own, self.codes or own),
        ):
            if theirs != ours:
                raise InputError(f"{name} needs {setting} {theirs}, not {ours}")
        self.codes = own


def _diffusers() -> ModuleType:
    try:
        import diffusers
    except ImportError:
        raise InputError(
            "tokenizer.name conv_vae needs a package: pip install 'ldae[conv]'"
        ) from None
    return diffusers


def _untrained(
    diffusers: ModuleType, factor: int, in_chans: int, channels: int, width: int, codes: int
) -> nn.Module:
    """LDM's sizes for images that become ``factor`` times smaller."""
    levels = factor.bit_length()
    sizes = {
        "in_channels": in_chans,
        "out_channels": in_chans,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(width * min(2**level, 4) for level in range(levels)),
        "layers_per_block": _RESIDUAL_BLOCKS,
        "latent_channels": channels,
        "norm_num_groups": math.gcd(width, 32),
    }
    if not codes:
        return diffusers.AutoencoderKL(**sizes)
    network = diffusers.VQModel(**sizes, num_vq_embeddings=codes)
    network.quantize.beta = COMMITMENT
    nn.init.uniform_(network.quantize.embedding.weight, -1 / codes, 1 / codes)
    return network


def _published(diffusers: ModuleType, name: str) -> nn.Module:
    """An AutoencoderKL or a VQModel, whichever its config.json says.

    Raises: InputError when it can not be opened.
    """
    if not Path(name).is_dir() and not 1 <= name.count("/") <= 2:
        raise InputError(
            f"tokenizer.pretrained: there is no folder {name}, and on the hub it would be USER/NAME"
        )
    place = {"pretrained_model_name_or_path": name}
    if not Path(name).is_dir() and name.count("/") > 1:
        user, repository, folder = name.split("/", 2)
        place = {"pretrained_model_name_or_path": f"{user}/{repository}", "subfolder": folder}
    kinds = {kind.__name__: kind for kind in (diffusers.AutoencoderKL, diffusers.VQModel)}
    try:
        config = diffusers.AutoencoderKL.load_config(**place)
        kind = kinds.get(config.get("_class_name"))
        how = {"use_safetensors": True, "low_cpu_mem_usage": False}  # the latter needs accelerate
        network = kind and kind.from_pretrained(**place, **how)
    except Exception as error:  # those of the hub, diffusers and json have nothing in common
        where = "" if Path(name).is_dir() else " on the hub, and there is no such folder here"
        raise InputError(
            f"tokenizer.pretrained {name} can not be opened{where}: {first_line(error)}"
        ) from None
    if network is None:
        raise InputError(
            f"tokenizer.pretrained {name} is a {config.get('_class_name', 'model')}, and neither an "
            "AutoencoderKL nor a VQModel"
        )
    return network
