"""The functions by which graders and the export open a run of MAE."""

import torch
from timm.models.vision_transformer import VisionTransformer

from ldae.backbones.fold import build_vit, check_features
from ldae.errors import InputError
from ldae.mae.network import MAE, MAE_URL, build
from ldae.masking import number_kept
from ldae.models.contract import PlainViT
from ldae.patches import patchify
from ldae.runs.kinds import Exported, Opening


def control_of(mae: MAE) -> VisionTransformer:
    """Return timm's ViT of the encoder's architecture, with timm's random initialisation."""
    vit = mae.encoder
    plain = PlainViT(vit.pretrained_cfg["architecture"], vit.model_args)
    return build_vit(plain, mae.pixels, mae.patch_size, MAE_URL)


@torch.no_grad()
def backbone_of(mae: MAE, verify: bool = True) -> VisionTransformer:
    """Return the encoder as a timm ViT in eval mode, with the class token as its features.

    Source: facebookresearch/mae, main_linprobe.py, which probes the class token by default.

    Raises: InputError when ``verify`` finds another class token on random images.
    """
    vit = control_of(mae).eval()
    vit.load_state_dict(mae.encoder.state_dict())
    if verify:
        _verify(mae, vit)
    return vit


def _verify(mae: MAE, vit: VisionTransformer) -> None:
    """Compare the class tokens of random images. Raises: InputError when they differ."""
    size = (2, mae.pixels.in_chans, mae.pixels.img_size, mae.pixels.img_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(0))
    patches = patchify(images, mae.patch_size).to(vit.cls_token)
    all_kept = torch.arange(mae.num_tokens).expand(2, -1)
    check_features(vit(images), mae.encode(patches, all_kept)[:, 0])


def exported(mae: MAE, timestep: int | None = None) -> Exported:
    """Return the encoder as a timm ViT, with what its model card says.

    Raises: InputError for a ``timestep``, which an MAE does not have, and as ``backbone_of``.
    """
    if timestep is not None:
        raise InputError(
            f"timestep {timestep} is for a denoising pre-training, and an MAE has no t"
        )
    return Exported(
        backbone_of(mae),
        "masked-image-modeling",
        f"An image encoder pre-trained as a masked autoencoder ([MAE]({MAE_URL})) with\n"
        "ldae: a plain ViT whose features are the class token.",
        {
            "features": "the class token behind the final norm, as in MAE's own linear probe; "
            '`global_pool="avg"` averages the patch tokens',
            "seen in pre-training": f"{mae.num_visible} of {mae.num_tokens} patches at a time",
            "target": "pixels, normalised in each patch" if mae.norm_pix_loss else "pixels",
        },
    )


def reconstruct(
    mae: MAE, images: torch.Tensor, positions: torch.Tensor, level: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return reconstructed and clean pictures (B, C, H, W) of uint8 images, in [0, 1].

    Args:
        positions: determine the masks (B,).
        level: share of the patches that are masked.
    """
    visible = number_kept(level, mae.num_tokens, "level")
    _, filled, clean = mae.reconstruct(images, positions, visible)
    return filled, clean


OPENING = Opening(build, backbone_of, control_of, exported, reconstruct)
"""How graders and the export open a run of this kind."""
