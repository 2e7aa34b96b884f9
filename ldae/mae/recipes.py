"""The recipe of MAE at every scale."""

from ldae.mae.settings import MAEConfig
from ldae.trajectory import at_scale
from ldae.tree import put

DEFAULT = "mae"
SUMMARIES = {"mae": "masked autoencoder: pixels of the patches that the encoder does not see"}

# What differs from the published recipe below the scale of the paper. The rates are ours and were
# not tuned. As in MAE's ViT-L, the decoder has half of the encoder's width.
_CHANGES = {
    "paper": {},
    "small": {
        "data.stats": "auto",
        "model.decoder_depth": 2, "model.decoder_embed_dim": 96, "model.decoder_num_heads": 3,
        "optim.blr": 1e-3,
    },
    "demo": {
        "data.stats": "auto",
        "model.decoder_depth": 1, "model.decoder_embed_dim": 64, "model.decoder_num_heads": 4,
        "optim.blr": 2e-3,
    },
}  # fmt: skip


def config(name: str = DEFAULT, scale: str = "paper") -> MAEConfig:
    """Return the configuration of MAE at a scale.

    At the scale paper it is MAE's published pre-training of ViT-L: batch 4096, 800 epochs, the
    length of PRETRAIN.md's command and of the paper's ablations (its final models take 1600, and
    the script's own default is 400). At the other scales the image size, the encoder, the batch and
    the epochs are those of the rows of the paper, so that MAE and the rows can be compared. There
    is one recipe, so ``name`` is not read.

    Raises: InputError for a scale that does not exist.

    Source: He et al. 2022, table 8; facebookresearch/mae, main_pretrain.py and PRETRAIN.md.
    """
    return put(at_scale(MAEConfig(), scale), _CHANGES[scale])
