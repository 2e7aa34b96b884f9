"""The recipe of MAE at every scale."""

from ldae.mae.settings import MAEConfig
from ldae.trajectory import at_scale
from ldae.tree import put

DEFAULT = "mae"
SUMMARIES = {"mae": "masked autoencoder: pixels of the patches that the encoder does not see"}

# Changes to the published recipe below the scale of the paper, beside those of ``at_scale``.
_CHANGES = {"data.stats": "auto"}


def config(name: str = DEFAULT, scale: str = "paper") -> MAEConfig:
    """Return the configuration of MAE at a scale.

    At the scale paper it is MAE's published pre-training of ViT-L: batch 4096, 800 epochs, the
    length of PRETRAIN.md's command and of the paper's ablations (its final models take 1600, and
    the script's own default is 400). At the other scales the image size, the encoder, the batch,
    the epochs and the rate, which was not tuned, are those of the rows of the paper, so that MAE
    and the rows can be compared. There is one recipe, so ``name`` is not read.

    Raises: InputError for a scale that does not exist.

    Source: He et al. 2022, table 8; facebookresearch/mae, main_pretrain.py and PRETRAIN.md.
    """
    found = at_scale(MAEConfig(), scale)
    return found if scale == "paper" else put(found, _CHANGES)
