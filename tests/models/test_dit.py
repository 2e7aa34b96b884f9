import pytest
import torch
from timm.models.vision_transformer import Block as PlainBlock

from ldae.errors import InputError
from ldae.models.dit import Block, DiT
from ldae.models.vit import ViTShape, vit_shape


def dit(out_dim: int = 6, **changes) -> DiT:
    """Return a DiT for 16 tokens of 6 numbers, with 2 + 2 blocks of width 16."""
    return DiT("vit_tiny_patch16_224", 2, 16, 2, side=4, in_dim=6, out_dim=out_dim, **changes)


def test_a_block_starts_as_the_identity():
    block = dit().encoder[0]
    x, c = torch.randn(3, 16, 16), torch.randn(3, 4)
    assert torch.equal(block(x, c), x)


def test_the_output_starts_at_zero():
    denoiser = dit(out_dim=5)
    assert torch.equal(denoiser(torch.randn(2, 16, 6), torch.tensor([0, 9])), torch.zeros(2, 16, 5))


def test_a_block_without_modulation_is_timms_block():
    block = Block(16, 2, 4.0, 4)
    plain = PlainBlock(16, 2, qkv_bias=True, act_layer=lambda: torch.nn.GELU(approximate="tanh"))
    plain.attn.load_state_dict(block.attn.state_dict())
    plain.mlp.load_state_dict(block.mlp.state_dict())
    plain.norm1.eps = plain.norm2.eps = 1e-6
    with torch.no_grad():
        block.adaLN_modulation[1].weight.zero_()
        gates = torch.cat([torch.zeros(32), torch.ones(16)])
        block.adaLN_modulation[1].bias.copy_(torch.cat([gates, gates]))
    x = torch.randn(3, 10, 16)
    torch.testing.assert_close(block(x, torch.randn(3, 4)), plain(x))


@pytest.mark.parametrize("decoder_depth, blocks", [(None, 2), (1, 1), (3, 3)])
def test_the_decoder_is_as_deep_as_the_encoder_unless_told_otherwise(decoder_depth, blocks, awake):
    denoiser = awake(dit(decoder_depth=decoder_depth))
    tokens, t = torch.randn(2, 16, 6), torch.tensor([3, 500])
    assert (len(denoiser.encoder), len(denoiser.decoder)) == (2, blocks)
    c = denoiser.condition(t)
    x = denoiser.encode(tokens, c)
    for block in denoiser.decoder:
        x = block(x, c)
    torch.testing.assert_close(denoiser.final(x, c), denoiser(tokens, t))


def test_the_conditioning_has_a_quarter_of_the_width():
    block = dit().encoder[0]
    assert block.adaLN_modulation[1].in_features == 16 // 4


def test_kept_tokens_have_their_own_positions(awake):
    denoiser = awake(dit())
    tokens, kept = torch.randn(2, 16, 6), torch.tensor([[3, 0, 9], [15, 1, 2]])
    c = denoiser.condition(torch.tensor([3, 500]))
    for image, numbers in enumerate(kept):
        x = (denoiser.embed(tokens[image]) + denoiser.pos_embed)[numbers][None]
        for block in denoiser.encoder:
            x = block(x, c[image : image + 1])
        actual = denoiser.encode(tokens, c, kept)[image : image + 1]
        torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, width, depth, heads",
    [
        ("vit_tiny_patch16_224", 192, 12, 3),
        ("vit_base_patch16_224", 768, 12, 12),
        ("vit_large_patch16_224", 1024, 24, 16),
    ],
)
def test_shapes_come_from_timms_names(name, width, depth, heads):
    assert vit_shape(name) == ViTShape(name, 16, width, depth, heads, 4.0)
    assert vit_shape(name, depth=3) == ViTShape(name, 16, width, 3, heads, 4.0)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("vit_lage_patch16_224",), "vit_large_patch16_224"),
        (("swin_tiny_patch4_window7_224",), "not one of timm's plain"),
        (
            ("vit_tiny_patch16_224", None, 100, 3),
            "num_heads 3 does not divide model.embed_dim 100",
        ),
        (("vit_tiny_patch16_224", None, 6, 3), "embed_dim 6 .* multiple of 4"),
    ],
)
def test_wrong_shapes_are_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        vit_shape(*arguments)
