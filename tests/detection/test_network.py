"""The detector around plain ViTs: its maps, its losses, its parameter groups and its boxes."""

import pytest
import timm
import torch

from ldae.detection.network import DetectionLoss, Detector, plain_vit
from ldae.detection.settings import DetectModelSettings
from ldae.errors import InputError
from ldae.tree import replace

TINY = DetectModelSettings(
    drop_path=0.0, dim=8, rpn_convs=1, box_convs=1, box_dim=16, mask_convs=1, proposals=20, rois=8
)
SHAPE = dict(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=0)
SIDE = 64


def vit(name: str = "vit_tiny_patch16_224", **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **SHAPE | changes)


@pytest.fixture
def detector():
    """detector(**changes): a tiny detector of 64 x 64 pixels and three classes."""

    def make(backbone: torch.nn.Module | None = None, **changes) -> Detector:
        torch.manual_seed(1)
        model = replace(TINY, changes)
        plain = plain_vit(backbone or vit(), "the ViT", SIDE, model.drop_path)
        return Detector(plain, SIDE, 3, (0.5,) * 3, (0.5,) * 3, model)

    return make


def targets() -> list[dict[str, torch.Tensor]]:
    """One image with two instances, and one without any."""
    masks = torch.zeros(2, SIDE, SIDE, dtype=torch.uint8)
    masks[0, 4:24, 8:30], masks[1, 40:60, 30:50] = 1, 1
    boxes = torch.tensor([[8.0, 4, 30, 24], [30, 40, 50, 60]])
    some = {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}
    return [some, {name: part[:0] for name, part in some.items()}]


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_anchors_and_strides_grow_with_the_patches(patch, detector):
    model = detector(vit(patch_size=patch, img_size=32)).eval()
    maps = model.backbone(torch.zeros(1, 3, SIDE, SIDE))
    sides = [part.shape[-1] for part in maps.values()]
    assert sides[:4] == [4 * SIDE // patch * 2**-level for level in range(4)]
    sizes = [size for (size,) in model.rpn.anchor_generator.sizes]
    assert sizes == [8 * SIDE / sides[0] * 2**level for level in range(5)]


@pytest.mark.parametrize(
    "name, changes",
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": True}),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 14, "img_size": 28}),
        ("vit_small_patch16_dinov3", {}),
        ("beit_base_patch16_224", {}),
        ("eva02_tiny_patch14_224", {"patch_size": 14, "img_size": 28}),
    ],
)
def test_plain_vits_of_timm_train_completely(name, changes, detector):
    """Every parameter has a gradient, as DDP requires, also where an image has no instance.

    Patches of 14 pixels become those of 16.
    """
    model = detector(vit(name, **changes))
    assert model.backbone.vit.patch_embed.patch_size[0] in (8, 16)
    loss, parts = DetectionLoss(model)(torch.rand(2, 3, SIDE, SIDE), torch.arange(2), targets())
    loss.backward()
    assert torch.equal(loss.detach(), sum(parts.values())) and len(parts) == 5
    assert [n for n, part in model.named_parameters() if part.grad is None] == []


def test_a_batch_without_instances_trains_completely(detector):
    model = detector()
    empty = [targets()[1]] * 2
    DetectionLoss(model)(torch.rand(2, 3, SIDE, SIDE), torch.arange(2), empty)[0].backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in model.parameters())


def test_a_frozen_vit_stays_as_it_is(detector):
    model = detector(frozen=True, drop_path=0.5).train()
    assert not model.backbone.vit.training and model.backbone.pyramid.training
    images = torch.rand(1, 3, SIDE, SIDE)
    assert torch.equal(model.backbone(images)["0"], model.backbone(images)["0"])
    DetectionLoss(model)(torch.rand(2, 3, SIDE, SIDE), torch.arange(2), targets())[0].backward()
    assert all(part.grad is None for part in model.backbone.vit.parameters())
    groups = DetectionLoss(model, 0.5).parameter_groups(0.1)
    assert {group["lr_scale"] for group in groups} == {1.0}


def test_the_rate_falls_from_block_to_block(detector):
    model = detector()
    groups = DetectionLoss(model, layer_decay=0.5).parameter_groups(0.1)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    plain = model.backbone.vit
    assert len(scale) == len(list(model.parameters()))
    for part, wanted in (
        (plain.patch_embed.proj.weight, 0.5**4),
        (plain.pos_embed, 0.5**4),
        (plain.blocks[0].mlp.fc1.weight, 0.5**3),
        (plain.blocks[2].mlp.fc1.weight, 0.5),
        (plain.norm.weight, 0.5),
        (model.backbone.pyramid.levels[2][0].weight, 1),
        (model.roi_heads.mask_predictor.mask_fcn_logits.weight, 1),
    ):
        assert scale[id(part)] == wanted
    assert decay[id(plain.pos_embed)] == decay[id(plain.norm.weight)] == 0
    assert decay[id(plain.patch_embed.proj.weight)] == 0.1


def test_drop_path_rises_from_block_to_block(detector):
    blocks = detector(drop_path=0.4).backbone.vit.blocks
    rates = [getattr(block.drop_path1, "rate", 0) for block in blocks]
    assert rates == pytest.approx([0, 0.2, 0.4])


def test_without_masks_nothing_of_them_is_left(detector):
    model = detector(masks=False)
    boxes = [{k: v for k, v in part.items() if k != "masks"} for part in targets()]
    _, parts = DetectionLoss(model)(torch.rand(2, 3, SIDE, SIDE), torch.arange(2), boxes)
    assert "loss_mask" not in parts and not any("mask" in name for name in model.state_dict())
    assert model.eval().find(torch.rand(1, 3, SIDE, SIDE), [(64, 64)])[0].keys() == {
        "boxes",
        "labels",
        "scores",
    }


@torch.inference_mode()
def test_boxes_and_masks_come_in_the_pixels_of_the_image(detector):
    """Of an image of 128 x 32 pixels, which is 64 x 16 in the input, with a border below."""
    model = detector().eval()
    model.roi_heads.score_thresh = 0.0
    images = torch.rand(1, 3, SIDE, SIDE)
    whole, wide = model.find(images, [(64, 64)])[0], model.find(images, [(128, 32)])[0]
    inside = whole["boxes"][:, 1] < 16 - 1e-2
    wanted = 2 * whole["boxes"][inside]
    wanted[:, 3].clamp_(max=32)
    torch.testing.assert_close(wide["boxes"], wanted)
    assert wide["masks"].shape == (len(wanted), 1, 32, 128) and len(wanted)
    assert torch.equal(wide["scores"], whole["scores"][inside])
    assert wide["labels"].min() >= 1 and wide["labels"].max() <= 3


@torch.inference_mode()
def test_a_mask_keeps_its_place_where_its_box_reaches_beyond_the_image(detector, monkeypatch):
    """The mask is the upper half of a box of rows 4 to 24, of which the wide image has 16."""
    model, mask = detector().eval(), torch.zeros(1, 1, 28, 28)
    mask[:, :, :14] = 1
    found = {"boxes": torch.tensor([[10.0, 4, 30, 24]]), "masks": mask}
    monkeypatch.setattr(model.roi_heads, "forward", lambda *_: ([dict(found)], {}))
    images = torch.rand(1, 3, SIDE, SIDE)
    whole, wide = (model.find(images, [size])[0] for size in ((64, 64), (64, 16)))
    assert whole["masks"][0, 0, 4:13, 20].gt(0.5).all()
    assert torch.equal(wide["masks"], whole["masks"][:, :, :16])
    assert wide["boxes"].tolist() == [[10, 4, 30, 16]]


def test_others_than_plain_vits_are_refused():
    for model in (
        timm.create_model("resnet18", num_classes=0),
        timm.create_model("swin_tiny_patch4_window7_224", num_classes=0),
        torch.nn.Flatten(),
    ):
        with pytest.raises(InputError, match="x is no plain ViT of timm"):
            plain_vit(model, "x", SIDE, 0.0)
    with pytest.raises(InputError, match="data.img_size 40 must be a multiple of 16, two patches"):
        plain_vit(vit(), "x", 40, 0.0)


def test_by_default_an_input_has_64_patches_a_side():
    assert plain_vit(vit(), "x", None, 0.0).patch_embed.img_size == (512, 512)
