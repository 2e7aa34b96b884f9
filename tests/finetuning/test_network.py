import pytest
import timm
import torch

from ldae import tree
from ldae.backbones.open import load_backbone
from ldae.errors import InputError
from ldae.finetuning import recipes
from ldae.finetuning.network import ClassificationLoss, build_network
from ldae.settings import OptimSettings
from ldae.train.optim import adamw, set_lr

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)


def backbone(name="vit_tiny_patch16_224", seed=3, **args):
    """Return a backbone as load_backbone does, with weights that a recipe's seed does not draw."""
    args = SMALL | {"num_classes": 0} | args if name.startswith("vit") else {"num_classes": 0}
    torch.manual_seed(seed)
    model = timm.create_model(name, **args).eval()
    if name.startswith("vit"):
        model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, 32, 32)}
    model.model_args = args
    return model


def settings(**changes):
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return tree.replace(recipes.RECIPES.config("mae"), {"backbone": "it"} | given)


@pytest.mark.parametrize(
    "name, depth", [("vit_base_patch16_224", 12), ("vit_large_patch16_224", 24)]
)
def test_layer_decay_matches_maes_closed_form(name, depth):
    """decay^(depth + 1 - layer): 0 is the embedding, i + 1 is block i, depth + 1 is the rest."""
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=7, global_pool="avg")
    model = ClassificationLoss(network, layer_decay=0.65)
    groups = model.parameter_groups(0.05)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for key, parameter in network.named_parameters():
        layer = depth + 1
        if key in ("cls_token", "pos_embed") or key.startswith("patch_embed."):
            layer = 0
        elif key.startswith("blocks."):
            layer = int(key.split(".")[1]) + 1
        assert scale[id(parameter)] == pytest.approx(0.65 ** (depth + 1 - layer)), key
        free = parameter.ndim == 1 or key in ("cls_token", "pos_embed")
        assert decayed[id(parameter)] == (0 if free else 0.05), key
    assert len(scale) == len(list(network.parameters()))


def test_optimizer_applies_the_lr_scales():
    network = build_network(backbone(), settings(model__layer_decay=0.5), 4)
    optimizer = adamw(ClassificationLoss(network, 0.5), OptimSettings(weight_decay=0.05))
    set_lr(optimizer, 0.1)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(network.head.weight)] == 0.1
    assert rates[id(network.blocks[2].mlp.fc1.weight)] == pytest.approx(0.05)
    assert rates[id(network.patch_embed.proj.weight)] == pytest.approx(0.1 / 16)


def test_network_is_the_backbone_with_maes_new_head():
    source = backbone(global_pool="token")
    network = build_network(source, settings(), 4)
    state = network.state_dict()
    for key, value in source.state_dict().items():
        if not key.startswith("norm."):  # fc_norm replaces it
            assert torch.equal(state[key], value), key
    assert network.global_pool == "avg" and isinstance(network.fc_norm, torch.nn.LayerNorm)
    assert isinstance(network.norm, torch.nn.Identity) and torch.all(network.head.bias == 0)
    assert network.head.weight.std().item() == pytest.approx(2e-5, rel=0.2)
    rates = [block.drop_path1.rate for block in list(network.blocks)[1:]]
    assert rates == pytest.approx([0.05, 0.1])
    assert "drop_path_rate" not in network.model_args


def test_from_scratch_differs_only_in_the_weights():
    pretrained, scratch = (
        build_network(backbone(final_norm=False), settings(model__random_init=random), 4)
        for random in (False, True)
    )
    assert str(pretrained) == str(scratch) and pretrained.model_args == scratch.model_args
    assert pretrained.pretrained_cfg == scratch.pretrained_cfg
    pretrained_state, scratch_state = pretrained.state_dict(), scratch.state_dict()
    assert pretrained_state.keys() == scratch_state.keys()
    same = {
        key for key in pretrained_state if torch.equal(pretrained_state[key], scratch_state[key])
    }
    assert {"head.weight", "head.bias", "fc_norm.weight"} <= same  # drawn with the same seed
    assert not any(
        key in same for key in pretrained_state if key.endswith("qkv.weight") or "embed" in key
    )


def test_pool_own_keeps_the_backbones_features():
    source = backbone(global_pool="token")
    network = build_network(source, settings(model__pool="own"), 4).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(
            network.forward_head(network.forward_features(images), True), source(images)
        )


def test_another_image_size_resizes_the_position_embeddings():
    source = backbone()
    positions = source.pos_embed.detach().clone()
    network = build_network(source, settings(data__img_size=64), 4).eval()
    assert network.pos_embed.shape == (1, 65, 32) and network(torch.randn(1, 3, 64, 64)).shape == (
        1,
        4,
    )
    assert torch.equal(network.pos_embed[:, 0], positions[:, 0])  # the class token's
    assert network.pretrained_cfg["input_size"] == (3, 64, 64)
    assert network.model_args["img_size"] == 64


def test_other_architectures_keep_their_pooling():
    network = build_network(backbone("test_resnet"), settings(), 4).eval()
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 4)
    scales = {g["lr_scale"] for g in ClassificationLoss(network, 0.5).parameter_groups(0.05)}
    assert len(scales) > 3 and max(scales) == 1


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("vit_tiny_patch16_224", {"data__img_size": 30}, "data.img_size 30 does not fit it"),
        ("test_vgg", {}, "does not take model.drop_path 0.1"),
        ("pixels", {}, "it is not a timm model, so it cannot be fine-tuned"),
    ],
)
def test_settings_that_do_not_fit_the_backbone_are_refused(name, changes, message):
    if name == "test_vgg":
        name = "vgg11"
        with torch.device("meta"):
            source = backbone(name)
    else:
        source = load_backbone(name) if name == "pixels" else backbone(name)
    with pytest.raises(InputError, match=message):
        build_network(source, settings(**changes), 4)


def test_loss_is_the_cross_entropy_with_soft_targets():
    network = build_network(backbone(), settings(model__head_std=1.0, model__drop_path=0.0), 4)
    images, targets = torch.randn(3, 3, 32, 32), torch.rand(3, 4).softmax(1)
    loss = ClassificationLoss(network)(images, torch.arange(3), targets)
    logits = network(images).double()
    expected = torch.stack([
        -sum(t * (row - row.exp().sum().log())[c] for c, t in enumerate(target))
        for row, target in zip(logits, targets)
    ]).mean()  # fmt: skip
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
