import pytest
import torch
from timm.models.vision_transformer import Block as PlainBlock

from ldae.errors import InputError
from ldae.models.dit import Block, Denoiser
from ldae.models.vit import ViTShape, vit_shape

SHAPE = ViTShape("vit_tiny_patch16_224", 4, 16, 2, 2, 4.0)


def test_a_block_starts_as_the_identity():
    block = Denoiser(SHAPE, 4, 6, 6).encoder[0]
    x, c = torch.randn(3, 16, 16), torch.randn(3, 4)
    assert torch.equal(block(x, c), x)


def test_the_output_starts_at_zero():
    denoiser = Denoiser(SHAPE, 4, 6, 5)
    assert torch.equal(denoiser(torch.randn(2, 16, 6), torch.tensor([0, 9])), torch.zeros(2, 16, 5))


def test_without_modulation_a_block_is_timms_plain_block():
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


def test_half_of_the_blocks_are_the_encoder(awake):
    denoiser = awake(Denoiser(SHAPE, 4, 6, 6))
    tokens, t = torch.randn(2, 16, 6), torch.tensor([3, 500])
    assert len(denoiser.encoder) == len(denoiser.decoder) == 2
    c = denoiser.condition(t)
    x = denoiser.encode(tokens, c)
    for block in denoiser.decoder:
        x = block(x, c)
    torch.testing.assert_close(denoiser.final(x, c), denoiser(tokens, t))


def test_the_conditioning_has_a_quarter_of_the_width():
    block = Denoiser(SHAPE, 4, 6, 6).encoder[0]
    assert block.adaLN_modulation[1].in_features == SHAPE.embed_dim // 4


def test_no_label_is_the_null_label(awake):
    denoiser = awake(Denoiser(SHAPE, 4, 6, 6, num_classes=10))
    tokens, t = torch.randn(2, 16, 6), torch.tensor([3, 500])
    null = denoiser(tokens, t, torch.tensor([10, 10]))
    assert torch.equal(denoiser(tokens, t), null)
    assert not torch.allclose(denoiser(tokens, t, torch.tensor([1, 2])), null)


def test_recomputed_activations_give_the_same_gradients(awake):
    tokens, t = torch.randn(2, 16, 6), torch.tensor([3, 500])
    gradients = []
    for recompute in (False, True):
        denoiser = awake(Denoiser(SHAPE, 4, 6, 6, checkpoint_activations=recompute)).train()
        denoiser(tokens, t).square().sum().backward()
        gradients.append([parameter.grad for parameter in denoiser.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


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
    assert vit_shape(name, patch_size=4, depth=3).patch_size == 4
    assert vit_shape(name, patch_size=4, depth=3).depth == 3


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("vit_lage_patch16_224",), "vit_large_patch16_224"),
        (("swin_tiny_patch4_window7_224",), "not one of timm's plain"),
        (
            ("vit_tiny_patch16_224", None, 100, None, 3),
            "num_heads 3 does not divide model.embed_dim 100",
        ),
        (("vit_tiny_patch16_224", None, 6, None, 3), "embed_dim 6 .* multiple of 4"),
    ],
)
def test_wrong_shapes_are_told(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        vit_shape(*arguments)
