"""Published checkpoints open completely, by the names and shapes that their projects gave them."""

import argparse
import re
from pathlib import Path

import pytest
import timm
import torch
from mae_layout import published_state
from timm.layers import resample_abs_pos_embed

from ldae.backbones.layouts import LAYOUTS
from ldae.backbones.open import load_backbone, load_classifier
from ldae.backbones.weights import find_encoder
from ldae.errors import InputError
from ldae.patches import sincos_positions

SIDE = 56  # of the images; all patch sizes here divide it or 64
VIT_S, VIT_S_14 = "vit_small_patch16_224.dino", "vit_small_patch14_dinov2"
REGISTERS, SWIGLU = "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Two blocks of each ViT, and a narrow one in place of the giant."""
    create = timm.create_model

    def small(name, *args, **kwargs):
        narrow = {"embed_dim": 192, "num_heads": 3} if "giant" in name else {}
        return create(name, *args, **({"depth": 2} | narrow | kwargs))

    monkeypatch.setattr(timm, "create_model", small)


def size_of(name: str) -> int:
    return SIDE if "patch14" in name else 64


def encoder(name: str, **args) -> torch.nn.Module:
    """Return a stand-in for a published encoder: random numbers in every weight."""
    model = timm.create_model(name, num_classes=0, img_size=size_of(name), **args).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def features(model: torch.nn.Module, name: str) -> torch.Tensor:
    images = torch.randn(2, 3, size_of(name), size_of(name), generator=torch.Generator())
    with torch.inference_mode():
        return model(images)


def prefixed(prefix: str, weights: dict) -> dict:
    return {prefix + name: value for name, value in weights.items()}


def others(weights: dict) -> dict:
    """Return the same names with other numbers, as of a student."""
    return {name: value + 1 for name, value in weights.items()}


def projector(prefix: str, widths: list[int]) -> dict:
    """Return MoCo v3's MLP: Linear without bias, BatchNorm, ReLU; no ReLU after the last."""
    state = {}
    for layer, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        linear, norm, last = f"{prefix}{3 * layer}", f"{prefix}{3 * layer + 1}", widths[layer + 2 :]
        state[f"{linear}.weight"] = torch.zeros(after, before)
        if last:
            state |= {f"{norm}.weight": torch.ones(after), f"{norm}.bias": torch.zeros(after)}
        state |= {f"{norm}.running_mean": torch.zeros(after)}
        state |= {f"{norm}.running_var": torch.ones(after)}
        state |= {f"{norm}.num_batches_tracked": torch.tensor(1)}
    return state


def dino_head(width: int, outputs: int = 8) -> dict:
    return {
        "mlp.0.weight": torch.zeros(16, width), "mlp.0.bias": torch.zeros(16),
        "mlp.2.weight": torch.zeros(16, 16), "mlp.2.bias": torch.zeros(16),
        "mlp.4.weight": torch.zeros(4, 16), "mlp.4.bias": torch.zeros(4),
        "last_layer.weight_g": torch.ones(outputs, 1),
        "last_layer.weight_v": torch.zeros(outputs, 4),
    }  # fmt: skip


def chunked(weights: dict) -> dict:
    """Return DINOv2's names in training: block 1 in the second of two chunks."""
    return {re.sub(r"^blocks\.(\d+)", r"blocks.\1.\1", name): v for name, v in weights.items()}


def dinov2(name: str) -> tuple[torch.nn.Module, dict]:
    """Return an encoder, and its weights by DINOv2's names."""
    model = encoder(name)
    own = dict(model.state_dict())
    width = model.embed_dim
    if "reg4" in name:  # the positions have one of the class token, which timm adds to it
        first = torch.full((1, 1, width), 0.01)
        own["register_tokens"] = own.pop("reg_token")
        own["cls_token"] = own["cls_token"] - first
        own["pos_embed"] = torch.cat([first, own["pos_embed"]], 1)
    if "giant" in name:
        own = {
            n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for n, v in own.items()
        }
    return model, own | {"mask_token": torch.zeros(1, width)}


def mae() -> tuple[torch.nn.Module, dict]:
    decoder = {n: v for n, v in published_state(width=384).items() if n.startswith(("dec", "mask"))}
    model = encoder(VIT_S)
    own = dict(model.state_dict())
    args = argparse.Namespace(model="mae_vit_small_patch16", mask_ratio=0.75)
    return model, {"model": own | decoder, "optimizer": {"state": {}}, "epoch": 399, "args": args}


def mae_finetuned() -> tuple[torch.nn.Module, dict]:
    model = encoder(VIT_S, global_pool="avg")
    head = {"head.weight": torch.zeros(1000, 384), "head.bias": torch.zeros(1000)}
    assert "fc_norm.weight" in model.state_dict()
    return model, {"model": dict(model.state_dict()) | head}


def moco_vit(width: int = 384) -> torch.nn.Module:
    model = encoder(VIT_S, num_heads=12)
    positions = torch.zeros_like(model.pos_embed)
    side, quarter = size_of(VIT_S) // 16, width // 4
    for token in range(side**2):  # moco-v3/vits.py: the sine and cosine of the row, of the column
        for half, place in enumerate((token // side, token % side)):
            angles = place / 10_000 ** (torch.arange(quarter) / quarter)
            row = torch.cat([angles.sin(), angles.cos()])
            positions[0, 1 + token, half * 2 * quarter :][: 2 * quarter] = row
    model.pos_embed.data = positions
    return model


def moco() -> tuple[torch.nn.Module, dict]:
    model = moco_vit()
    own = dict(model.state_dict()) | projector("head.", [384, 32, 32, 16])
    state = prefixed("module.base_encoder.", own)
    state |= prefixed("module.momentum_encoder.", others(own))
    state |= projector("module.predictor.", [16, 32, 16])
    return model, {"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {}}


def moco_linear() -> tuple[torch.nn.Module, dict]:
    model = moco_vit()
    own = dict(model.state_dict()) | {
        "head.weight": torch.zeros(9, 384),
        "head.bias": torch.zeros(9),
    }
    return model, {"epoch": 90, "state_dict": prefixed("module.", own), "best_acc1": 73.2}


def dino() -> tuple[torch.nn.Module, dict]:
    model = encoder(VIT_S)
    own, head = dict(model.state_dict()), prefixed("head.", dino_head(384))
    student = prefixed("module.backbone.", others(own)) | prefixed("module.", head)
    teacher = prefixed("backbone.", own) | head
    return model, {"student": student, "teacher": teacher, "epoch": 800, "optimizer": {}}


def ibot() -> tuple[torch.nn.Module, dict]:
    model, content = dino()
    content["student"]["module.backbone.masked_embed"] = torch.zeros(1, 384)
    content["teacher"] |= prefixed("head.last_layer2.", {"weight_g": torch.ones(8, 1)})
    return model, content


def ibot_student() -> tuple[torch.nn.Module, dict]:
    """The backbone of a student, as the models of ImageNet-22K are published."""
    model = encoder(VIT_S)
    return model, {"state_dict": model.state_dict() | {"masked_embed": torch.zeros(1, 384)}}


def dinov2_training() -> tuple[torch.nn.Module, dict]:
    model, own = dinov2(VIT_S_14)
    heads = prefixed("dino_head.", dino_head(384)) | prefixed("ibot_head.", dino_head(384))
    return model, {"teacher": prefixed("backbone.", chunked(own)) | heads}


def dinov2_both() -> tuple[torch.nn.Module, dict]:
    model, own = dinov2(VIT_S_14)
    state = prefixed("student.backbone.", others(own)) | prefixed("teacher.backbone.", own)
    return model, {"model": state | prefixed("teacher.dino_head.", dino_head(384)), "iteration": 9}


def plain(key: str | None = None) -> tuple[torch.nn.Module, dict]:
    model = encoder(VIT_S)
    own = dict(model.state_dict())
    return model, {key: own} if key else own


# The layout that is found in each file; empty for names that are timm's already.
PUBLISHED = {
    "MAE with its decoder": (VIT_S, mae, "MAE"),
    "MAE's encoder": (VIT_S, lambda: plain("model"), ""),
    "MAE fine-tuned": (VIT_S, mae_finetuned, "fine-tuned MAE"),
    "MoCo v3": (VIT_S, moco, "MoCo v3"),
    "MoCo v3's linear probe": (VIT_S, moco_linear, "MoCo v3"),
    "DINO, student and teacher": (VIT_S, dino, ""),
    "DINO's backbone": (VIT_S, plain, ""),
    "iBOT, student and teacher": (VIT_S, ibot, ""),
    "iBOT's backbone": (VIT_S, lambda: plain("state_dict"), ""),
    "iBOT's student": (VIT_S, ibot_student, "iBOT"),
    "DINOv2": (VIT_S_14, lambda: dinov2(VIT_S_14), "DINOv2"),
    "DINOv2 with registers": (REGISTERS, lambda: dinov2(REGISTERS), "DINOv2"),
    "DINOv2 with SwiGLU": (SWIGLU, lambda: dinov2(SWIGLU), "DINOv2"),
    "DINOv2's teacher in training": (VIT_S_14, dinov2_training, "DINOv2"),
    "DINOv2, student and teacher": (VIT_S_14, dinov2_both, "DINOv2"),
}


@pytest.fixture
def written(tmp_path):
    def write(content: dict) -> str:
        torch.save(content, tmp_path / "file.pth")
        return str(tmp_path / "file.pth")

    return write


@pytest.mark.parametrize("published", PUBLISHED)
def test_a_published_file_opens_completely(published, written, capsys):
    name, make, layout = PUBLISHED[published]
    model, content = make()
    file = written(content)
    assert find_encoder(Path(file), model, name).layout.name == layout
    opened = load_backbone(f"{name}@{file}", img_size=size_of(name))
    assert torch.allclose(features(opened, name), features(model, name), atol=1e-5)
    count = len(model.state_dict())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].endswith(f"loaded {count} of the {count} tensors of {name}")


def test_every_layout_is_tested():
    tested = {layout for _, _, layout in PUBLISHED.values()}
    assert tested - {""} == {layout.name for layout in LAYOUTS if not layout.refusal}


@pytest.mark.parametrize("published", ["MoCo v3", "DINOv2"])
def test_positions_of_another_image_size_are_resized_as_timm_does(published, written):
    name, make, _ = PUBLISHED[published]
    model, content = make()
    side = 2 * size_of(name)
    opened = load_backbone(f"{name}@{written(content)}", img_size=side)
    expected = resample_abs_pos_embed(model.pos_embed, opened.patch_embed.grid_size)
    assert torch.allclose(opened.pos_embed, expected, atol=1e-6)
    assert opened.pos_embed.shape[1] > model.pos_embed.shape[1]


def test_a_head_that_was_fine_tuned_comes_with_its_pooling(written):
    _, content = mae_finetuned()
    content["model"]["head.bias"] += torch.arange(1000.0)
    opened = load_classifier(f"{VIT_S}@{written(content)}", img_size=64)
    assert opened.num_classes == 1000 and opened.model_args["global_pool"] == "avg"
    assert torch.equal(features(opened, VIT_S)[0], torch.arange(1000.0))


def test_the_control_of_a_file_has_its_heads_and_not_its_weights(written):
    file = written(moco()[1])
    trained, control = (
        load_backbone(f"{VIT_S}@{file}", random_init=random, img_size=64)
        for random in (False, True)
    )
    assert control.blocks[0].attn.num_heads == trained.blocks[0].attn.num_heads == 12
    assert control.model_args == trained.model_args
    weights = (model.blocks[0].mlp.fc1.weight for model in (trained, control))
    assert not torch.equal(*weights)


def test_the_heads_of_moco_are_part_of_the_arguments(written):
    """So a fine-tuned or exported model of it is built with them again."""
    opened = load_backbone(f"{VIT_S}@{written(moco()[1])}", img_size=64)
    assert opened.blocks[0].attn.num_heads == 12 and opened.model_args["num_heads"] == 12
    assert opened.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_only_the_order_of_the_axes_tells_moco_from_mae(written):
    model = encoder(VIT_S)
    model.pos_embed.data[0] = torch.cat([torch.zeros(1, 384), sincos_positions(384, 4)])
    opened = load_backbone(f"{VIT_S}@{written({'model': model.state_dict()})}", img_size=64)
    assert opened.blocks[0].attn.num_heads == 6


def without(content: dict, name: str) -> dict:
    return {key: value for key, value in content.items() if key != name}


DIT = {
    "x_embedder.proj.weight": torch.zeros(8, 4, 2, 2),
    "blocks.0.attn.qkv.weight": torch.zeros(24, 8),
    "final_layer.linear.weight": torch.zeros(32, 8),
}
DDAE = {
    "MODEL": {},
    "EMA": {
        "initted": torch.tensor(True), "step": torch.tensor(9),
        **{f"{who}.nn_model.{name}": torch.zeros(2) for who in ("online_model", "ema_model")
           for name in ("image_proj.weight", "time_emb.lin1.weight", "down.0.res.conv1.weight")},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (VIT_S, lambda: dinov2(VIT_S_14)[1],
         "does not fit NAME: its patches have 14 pixels a side, and those of the model 16"),
        (VIT_S, lambda: dict(encoder("vit_small_patch8_224").state_dict()),  # a layout of no method
         "does not fit NAME: its patches have 8 pixels a side, and those of the model 16"),
        (VIT_S_14, lambda: dinov2(REGISTERS)[1],
         "does not fit NAME: timm cannot convert it"),
        (VIT_S_14, lambda: without(dinov2(VIT_S_14)[1], "norm.bias"),
         "is a checkpoint of DINOv2 and no NAME: not in the file (1): norm.bias"),
        (VIT_S, lambda: {"model": mae()[1]["model"] | {"extra": torch.zeros(1)}},
         "is a checkpoint of MAE and no NAME: not in the model, left out (1): extra"),
        ("test_resnet", lambda: dinov2(VIT_S_14)[1],
         "is a checkpoint of DINOv2, a ViT, and NAME is none"),
        (VIT_S, lambda: DIT, "is a DiT, which is no timm model: make a run of it"),
        (VIT_S, lambda: {"model": DIT, "ema": DIT, "opt": {}}, "is a DiT, which is no timm model"),
        (VIT_S, lambda: DDAE, "is a U-Net of DDAE, which is neither a timm model nor the U-Net of"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_the_named_encoder_is_refused(
    name, content, sentence, written, monkeypatch
):
    if name == "test_resnet":
        monkeypatch.undo()
    file = written(content())
    with pytest.raises(InputError) as caught:
        load_backbone(f"{name}@{file}", img_size=None if name == "test_resnet" else size_of(name))
    assert str(caught.value).startswith(f"{file} {sentence.replace('NAME', name)}")
