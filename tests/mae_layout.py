"""The layout of published MAE checkpoints, at the sizes of the tests."""

import math

import torch

SIZES = {"model.decoder_depth": 2, "model.decoder_embed_dim": 16, "model.decoder_num_heads": 4}
# The sizes of timm's test_vit, of which there is no published MAE, in its own image size.
WIDTH, DEPTH, HEADS, PATCH, SIDE = 64, 6, 2, 16, 10
LIKE_PUBLISHED = {
    "data__img_size": 64, "model__name": "test_vit", "model__patch_size": None,
    "model__depth": None, "model__embed_dim": None, "model__num_heads": None,
}  # fmt: skip


def published_state(decoder: bool = True, width: int = WIDTH, depth: int = DEPTH) -> dict:
    """Return random weights with the names and shapes of a published checkpoint of these sizes."""
    generator = torch.Generator().manual_seed(3)

    def block(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}norm1.weight": (width,), f"{prefix}norm1.bias": (width,),
            f"{prefix}attn.qkv.weight": (3 * width, width), f"{prefix}attn.qkv.bias": (3 * width,),
            f"{prefix}attn.proj.weight": (width, width), f"{prefix}attn.proj.bias": (width,),
            f"{prefix}norm2.weight": (width,), f"{prefix}norm2.bias": (width,),
            f"{prefix}mlp.fc1.weight": (hidden, width), f"{prefix}mlp.fc1.bias": (hidden,),
            f"{prefix}mlp.fc2.weight": (width, hidden), f"{prefix}mlp.fc2.bias": (width,),
        }  # fmt: skip

    shapes = {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for number in range(depth):
        shapes |= block(f"blocks.{number}.", width, 3 * width)
    narrow, dim = SIZES["model.decoder_embed_dim"], 3 * PATCH**2
    own = {
        "mask_token": (1, 1, narrow),
        "decoder_embed.weight": (narrow, width),
        "decoder_embed.bias": (narrow,),
        "decoder_norm.weight": (narrow,),
        "decoder_norm.bias": (narrow,),
        "decoder_pred.weight": (dim, narrow),
        "decoder_pred.bias": (dim,),
    }
    for number in range(SIZES["model.decoder_depth"]):
        own |= block(f"decoder_blocks.{number}.", narrow, 4 * narrow)
    shapes |= own if decoder else {}
    state = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["pos_embed"] = positions(width, SIDE).float()[None]
    if decoder:
        state["decoder_pos_embed"] = positions(narrow, SIDE).float()[None]
    return state


def positions(width: int, side: int) -> torch.Tensor:
    """Return MAE's positions (1 + N, width) from their formula, number by number, in float64."""
    table = torch.zeros(1 + side**2, width, dtype=torch.float64)
    quarter = width // 4
    for token in range(side**2):
        for half, place in enumerate((token % side, token // side)):  # the column, then the row
            for k in range(quarter):
                angle = place / 10_000 ** (k / quarter)
                table[1 + token, 2 * quarter * half + k] = math.sin(angle)
                table[1 + token, 2 * quarter * half + quarter + k] = math.cos(angle)
    return table
