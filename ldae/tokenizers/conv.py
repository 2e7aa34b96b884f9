"""The convolutional autoencoder of latent diffusion (LDM): a KL or a VQ network of diffusers."""

import math
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from ldae.errors import InputError, first_line, import_extra
from ldae.patches import patchify, unpatchify
from ldae.tokenizers.trained import LOG_VARIANCE_RANGE, Posterior, TrainedTokenizer

_COMMITMENT = 0.25  # beta of van den Oord et al. 2017, on the encoder's term
_RESIDUAL_BLOCKS = 2  # LDM's, in each level of the encoder; the decoder has one more


class ConvTokenizer(TrainedTokenizer):
    """LDM's convolutional autoencoder, a network of diffusers; a token is 2 x 2 latents.

    The latent map has ``patch_size`` / 2 times fewer pixels a side than the image. There are thus
    as many tokens as patches, of dim = 4 x latent channels. Without ``codes`` the network is an
    AutoencoderKL with a Gaussian posterior. With ``codes`` it is a VQModel: ``encode`` returns
    latents before quantisation, and ``decode`` quantises them.

    Args:
        width: channels at full resolution. They double at the second and at the third level, and
            then stay constant.
        codes: size of the codebook; 0 builds none.
        pretrained: a published network of either kind, used as it is. It is a folder, or USER/NAME
            on the hub, or USER/NAME/SUBFOLDER. It brings its own codebook, and a factor and a shift
            of its latents, which the scales ``auto`` and ``raw`` use.

    Raises: InputError when a size does not fit, the network cannot be opened, or diffusers is not
        installed.
    """

    auto_scale = "global"  # DiT's latents have one factor
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
        scale = "raw" if pretrained and scale == "auto" else scale
        super().__init__(img_size, patch_size, in_chans, dim, scale)
        factor, rest = divmod(patch_size, 2)
        if rest or factor & (factor - 1):
            raise InputError(
                f"model.patch_size {patch_size} does not fit conv_vae, which halves the image "
                "repeatedly and joins 2 x 2 latents: set it to a power of two, at least 2"
            )
        if dim % 4:
            raise InputError(
                f"tokenizer.dim {dim} is not a multiple of 4: a token of conv_vae is 2 x 2 latents"
            )
        self.width, self.codes, self.pretrained = width, codes, pretrained
        diffusers = import_extra("diffusers", "conv", "tokenizer.name conv_vae needs diffusers")
        if pretrained:
            self.network = _load_published(diffusers, pretrained)
        else:
            self.network = _build_untrained(diffusers, factor, in_chans, dim // 4, width, codes)
        self.quantised = hasattr(self.network, "quantize")
        self.stochastic = not self.quantised
        if self.quantised:
            self.network.quantize.legacy = False  # True would put beta on the codebook's term
        if pretrained:
            self._adopt_published()

    def posterior(self, images: torch.Tensor) -> Posterior:
        network = self.network
        if self.quantised:
            return Posterior(patchify(network.encode(images).latents, 2), None)
        posterior = network.encode(images).latent_dist
        log_variance = posterior.logvar.clamp(*LOG_VARIANCE_RANGE)
        return Posterior(patchify(posterior.mean, 2), patchify(log_variance, 2))

    def decode_raw(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = self.network.decode(unpatchify(latents, 2, self.dim // 4))
        loss = decoded.commit_loss if self.quantised else None
        return decoded.sample, latents.new_zeros(()) if loss is None else loss

    def code_indices(self, images: torch.Tensor) -> torch.Tensor:
        """Return the index of each latent's code, int64 (B, 4 N), for normalised images."""
        _, _, (_, _, indices) = self.network.quantize(self.network.encode(images).latents)
        return indices.reshape(len(images), -1)

    @property
    def last_weight(self) -> torch.Tensor:
        return self.network.decoder.conv_out.weight

    def _adopt_published(self) -> None:
        """Check that the published network fits the settings, and take over its constants.

        Raises: InputError when it does not fit.
        """
        config, name = self.network.config, f"tokenizer.pretrained {self.pretrained}"
        codes = config.num_vq_embeddings if self.quantised else 0
        channels = (config.get("vq_embed_dim") if self.quantised else 0) or config.latent_channels
        for setting, required, value in (
            ("data.in_chans", config.in_channels, self.in_chans),
            ("tokenizer.dim", 4 * channels, self.dim),
            ("model.patch_size", 2 ** len(config.block_out_channels), self.patch_size),
            ("tokenizer.codes", codes, self.codes or codes),
        ):
            if required != value:
                raise InputError(f"{name} needs {setting} {required}, not {value}")
        self.codes = codes
        self.pixel_mean.fill_(0.5)  # published networks take pixels in [-1, 1]
        self.pixel_std.fill_(0.5)
        self.raw_shift = config.get("shift_factor") or 0.0
        self.raw_scale = config.scaling_factor


def _build_untrained(
    diffusers: ModuleType, factor: int, in_chans: int, channels: int, width: int, codes: int
) -> nn.Module:
    """Build LDM's network; its latents are ``factor`` times smaller a side than the image."""
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
    network.quantize.beta = _COMMITMENT
    nn.init.uniform_(network.quantize.embedding.weight, -1 / codes, 1 / codes)
    return network


def _load_published(diffusers: ModuleType, name: str) -> nn.Module:
    """Load an AutoencoderKL or a VQModel, as its config.json names the class.

    Raises: InputError when it cannot be opened.
    """
    is_folder = Path(name).is_dir()
    if not is_folder and not 1 <= name.count("/") <= 2:
        raise InputError(
            f"tokenizer.pretrained: there is no folder {name}; a network on the hub is USER/NAME"
        )
    place = {"pretrained_model_name_or_path": name}
    if not is_folder and name.count("/") > 1:
        user, repository, folder = name.split("/", 2)
        place = {"pretrained_model_name_or_path": f"{user}/{repository}", "subfolder": folder}
    classes = {cls.__name__: cls for cls in (diffusers.AutoencoderKL, diffusers.VQModel)}
    try:
        config = diffusers.AutoencoderKL.load_config(**place)
        cls = classes.get(config.get("_class_name"))
        # low_cpu_mem_usage would need the package accelerate.
        network = cls and cls.from_pretrained(
            **place, use_safetensors=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # the hub, diffusers and json share no type of exception
        where = "" if is_folder else " on the hub, and there is no such folder here"
        raise InputError(
            f"tokenizer.pretrained {name} cannot be opened{where}: {first_line(error)}"
        ) from None
    if network is None:
        raise InputError(
            f"tokenizer.pretrained {name} is a {config.get('_class_name', 'model')}, but must be "
            "an AutoencoderKL or a VQModel"
        )
    return network
