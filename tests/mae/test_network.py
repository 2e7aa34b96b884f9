"""The loss of an MAE is that of its equations, and the encoder sees only what is not masked."""

import copy
import math

import pytest
import torch
from mae_layout import DEPTH, HEADS, LIKE_PUBLISHED, PATCH, SIZES, positions, published_state

from ldae import distributed, masking
from ldae.errors import InputError
from ldae.mae.network import build
from ldae.mae.open import backbone_of, control_of
from ldae.mae.start import open_start, start_from
from ldae.patches import patchify, unpatchify
from ldae.settings import OptimSettings, SystemSettings
from ldae.train.optim import adamw
from ldae.train.parallel import compile_parts, parallelize

CPU = torch.device("cpu")


def reference_loss(state, images, kept, norm_pix_loss: bool) -> float:
    """Return MAE's loss in float64, image by image, from weights in the published layout.

    ``images`` are normalised (B, 3, H, W), ``kept`` the visible patches of each.
    """
    w = {name: value.double() for name, value in state.items()}
    side = images.shape[-1] // PATCH

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(name, x, heads):
        q, k, v = linear(f"{name}.qkv", x).chunk(3, -1)
        outputs = []
        for a, b, c in zip(*(part.chunk(heads, -1) for part in (q, k, v))):
            outputs.append((a @ b.T / math.sqrt(a.shape[-1])).softmax(-1) @ c)
        return linear(f"{name}.proj", torch.cat(outputs, -1))

    def block(name, x, heads):
        x = x + attention(f"{name}.attn", norm(f"{name}.norm1", x), heads)
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return x + linear(f"{name}.mlp.fc2", hidden)

    errors = []
    for image, seen in zip(images.double(), kept.tolist(), strict=True):
        corners = [(row * PATCH, column * PATCH) for row in range(side) for column in range(side)]
        cut = [image[:, y : y + PATCH, x : x + PATCH] for y, x in corners]
        place = positions(w["cls_token"].shape[-1], side)
        tokens = [w["cls_token"][0, 0]]
        for number in seen:
            embedded = (w["patch_embed.proj.weight"] * cut[number]).sum((1, 2, 3))
            tokens.append(embedded + w["patch_embed.proj.bias"] + place[1 + number])
        x = torch.stack(tokens)
        for number in range(DEPTH):
            x = block(f"blocks.{number}", x, HEADS)
        x = linear("decoder_embed", norm("norm", x))
        whole = w["mask_token"][0].repeat(1 + len(cut), 1)
        whole[0] = x[0]
        for token, number in zip(x[1:], seen, strict=True):
            whole[1 + number] = token
        x = whole + positions(SIZES["model.decoder_embed_dim"], side)
        for number in range(SIZES["model.decoder_depth"]):
            x = block(f"decoder_blocks.{number}", x, SIZES["model.decoder_num_heads"])
        predicted = linear("decoder_pred", norm("decoder_norm", x))[1:]
        for number in set(range(len(cut))) - set(seen):
            target = cut[number].permute(1, 2, 0).flatten()  # pixel by pixel, as published
            if norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((predicted[number] - target).square().mean())
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_of_published_weights_equals_a_slow_reference(
    norm_pix_loss, tiny_mae, published, images, tmp_path
):
    changes = LIKE_PUBLISHED | {"init_from": published()}
    config = tiny_mae(objective__norm_pix_loss=norm_pix_loss, **changes)
    config, start = open_start(config, tmp_path / "new")
    mae = build(config)
    start_from(mae, start)
    images = images[:3].repeat_interleave(2, -1).repeat_interleave(2, -2)
    places = torch.tensor([4, 9, 2**40])
    kept = masking.kept_tokens(mae.seed, places, 16, 4)
    wanted = reference_loss(published_state(), mae.pixels.normalize(images), kept, norm_pix_loss)
    assert float(mae(images, places).detach()) == pytest.approx(wanted, rel=1e-5)


def test_masked_pixels_change_the_loss_but_not_the_features(mae, images):
    mae, places = mae(), torch.arange(len(images))
    masked = mae.mask(images, places)
    hidden = ~masking.is_kept(masked.kept, mae.num_tokens)
    changed = patchify(images, 8)
    changed[hidden] = 255 - changed[hidden]
    others = unpatchify(changed, 8, 3)
    again = mae.mask(others, places)
    with torch.no_grad():
        before, after = (mae.encode(part.visible, part.kept) for part in (masked, again))
        assert torch.equal(after, before)
        assert abs(mae(others, places) - mae(images, places)) > 1e-3
        visible = patchify(images, 8)
        visible[~hidden] = 255 - visible[~hidden]
        seen = mae.mask(unpatchify(visible, 8, 3), places)
        assert not torch.allclose(mae.encode(seen.visible, seen.kept), before)


def test_kept_patches_depend_on_seed_and_position_alone(mae, images):
    mae, places = mae(), torch.arange(100, 108)
    kept = mae.mask(images, places).kept
    assert kept.shape == (8, 4)  # a quarter of 16
    assert torch.equal(kept, masking.kept_tokens(mae.seed, places, 16, 4))
    assert torch.equal(mae.mask(images[5:], places[5:]).kept, kept[5:])
    mae.seed = 1
    assert not torch.equal(mae.mask(images, places).kept, kept)


def test_positions_are_constants_that_no_optimizer_changes(tiny_mae):
    mae = build(tiny_mae())
    expected = positions(32, 4).float()
    torch.testing.assert_close(mae.encoder.pos_embed[0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(mae.decoder.pos_embed[0, :, :16], positions(16, 4).float())
    optimizer = adamw(mae, OptimSettings())
    trained = {id(part) for group in optimizer.param_groups for part in group["params"]}
    left_out = [name for name, part in mae.named_parameters() if id(part) not in trained]
    assert left_out == ["encoder.pos_embed"]


def test_the_initial_weights_are_maes(tiny_mae):
    mae = build(tiny_mae(model__embed_dim=256, model__num_heads=4))
    patches = mae.encoder.patch_embed.proj.weight.flatten(1)  # (256, 192), by Xavier as a matrix
    for weight in (patches, mae.encoder.blocks[0].mlp.fc1.weight, mae.decoder.pred.weight):
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < weight.abs().max() <= bound
    assert float(mae.encoder.cls_token.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert not any(block.mlp.fc1.bias.any() for block in mae.decoder.blocks)


def test_the_backbone_is_the_encoder_on_all_patches(mae, images):
    mae = mae()
    vit = backbone_of(mae)
    x = mae.pixels.normalize(images)
    all_kept = torch.arange(16).expand(len(images), -1)
    with torch.no_grad():
        features = mae.encode(patchify(x, 8), all_kept)
        torch.testing.assert_close(vit(x), features[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vit.forward_features(x), features, rtol=1e-5, atol=1e-5)
    state = mae.encoder.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in vit.state_dict().items())
    control = control_of(mae)
    assert control.state_dict().keys() == state.keys()
    assert not torch.allclose(control.pos_embed, vit.pos_embed)


def test_a_wrong_backbone_is_refused(mae):
    mae = mae()
    mae.encoder.norm_pre = torch.nn.LayerNorm(32)
    mae.encoder.norm_pre.weight.data.fill_(2.0)
    with pytest.raises(RuntimeError, match="norm_pre"):  # timm's ViT of this name has none
        backbone_of(mae)


def test_recomputed_activations_give_the_same_gradients(mae, images):
    gradients = []
    for recomputed in (False, True):
        network = mae(system__checkpoint_activations=recomputed).train()
        network(images, torch.arange(8)).backward()
        gradients.append([part.grad for part in network.parameters() if part.requires_grad])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_the_residual_streams_are_in_bfloat16_and_the_loss_in_float32(mae, images):
    mae, seen = mae(), []
    mae.bf16 = True
    for block in (*mae.encoder.blocks, *mae.decoder.blocks):
        block.register_forward_hook(lambda block, given, output: seen.append(output.dtype))
    loss = mae(images, torch.arange(len(images)))
    assert seen == [torch.bfloat16] * 4 and loss.dtype == torch.float32


def losses(network, mae, images):
    """Return the losses of three batches, and the gradients of their sum."""
    found = [network(images, torch.arange(n, n + len(images)), None) for n in (0, 8, 2**40)]
    sum(found).backward()
    gradients = {name: part.grad for name, part in mae.named_parameters() if part.requires_grad}
    mae.zero_grad()
    return found, gradients


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_equals_eager_in_four_whole_graphs(recomputed, mae, images, compiled_by):
    """The masking, a block of each stack for all of it, and the loss."""
    mae = mae(system__checkpoint_activations=recomputed).train()
    eager = losses(mae, mae, images)
    counter = compiled_by("eager")
    compile_parts(mae)
    torch.testing.assert_close(losses(mae, mae, images), eager)
    assert counter.frame_count == 4


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_give_the_gradients_of_one(fsdp, mae, images, on_ranks):
    mae = mae().train()
    expected = losses(mae, mae, images)

    def work():
        with distributed.process_group(CPU, rank_timeout=1):
            parallel = parallelize(mae, None, SystemSettings(fsdp=fsdp), CPU, compiled=False)
            found, sharded = losses(parallel.network, mae, images)
            full = {name: parallel.full_tensor(part) for name, part in sharded.items()}
            torch.testing.assert_close((found, full), expected)

    assert on_ranks(work) == ["", ""]


def test_the_reconstruction_keeps_what_is_visible(mae, images):
    """With the true targets as predictions, the picture is the original."""
    for norm_pix_loss in (True, False):
        one, places = mae(objective__norm_pix_loss=norm_pix_loss), torch.arange(8)
        masked = one.mask(images, places)
        hidden, filled, clean = one.reconstruct(images, places)
        torch.testing.assert_close(clean, images / 255)
        seen = masking.is_kept(masked.kept, 16)
        for picture in (hidden, filled):
            torch.testing.assert_close(patchify(picture, 8)[seen], patchify(clean, 8)[seen])
        mean = one.pixels.pixel_mean.repeat_interleave(64).expand((~seen).sum(), -1)
        torch.testing.assert_close(patchify(hidden, 8)[~seen], mean)
        target, _, _ = one.target(masked.patches)
        exact = copy.copy(one)
        exact.predict = lambda masked, target=target: target
        torch.testing.assert_close(exact.reconstruct(images, places)[1], clean)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"objective__mask_ratio": 0.99}, "mask_ratio 0.99 keeps none of the 16 tokens"),
        ({"objective__mask_ratio": 0.01}, "mask_ratio 0.01 masks none of the 16 tokens"),
        ({"data__img_size": 36}, "img_size 36 is not a multiple of model.patch_size 8"),
        ({"model__decoder_num_heads": 3}, "decoder_num_heads 3 does not divide model.decoder_emb"),
        ({"model__decoder_embed_dim": 6, "model__decoder_num_heads": 1}, "not a multiple of 4"),
        ({"model__num_heads": 3}, "model.num_heads 3 does not divide model.embed_dim 32"),
        ({"model__name": "vit_tiny_patch16"}, "no model 'vit_tiny_patch16'; the nearest"),
        ({"model__name": "resnet18"}, "resnet18 is not one of timm's plain vision transformers"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, sentence, tiny_mae):
    with pytest.raises(InputError, match=sentence):
        build(tiny_mae(**changes))
