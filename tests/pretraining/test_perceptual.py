import pytest
import timm
import torch
import torchvision
from torch import nn

from ldae.errors import InputError
from ldae.pretraining.perceptual import lpips_is_cached, open_lpips, open_perceptual


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file of random VGG16 weights, in torchvision's format."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network = torchvision.models.vgg16(weights=None, init_weights=False)
    features = network.features.to_empty(device="cpu")
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.uniform_(layer.bias, -0.1, 0.1)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    return path


def pair(images, side=32):
    x = images[:3, :, :side, :side] / 255
    return x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1)


def test_lpips_matches_torchmetrics(vgg, images):
    metrics = pytest.importorskip("torchmetrics.functional.image.lpips")
    reference = metrics._LPIPS(net="vgg", pnet_rand=True)
    state = {name[9:]: value for name, value in torch.load(vgg, weights_only=True).items()}
    for name, value in reference.net.state_dict().items():
        value.copy_(state[name.partition(".")[2]])
    distance = open_perceptual(f"vgg16@{vgg}", 3)
    x, y = pair(images)
    expected = reference(x, y, normalize=True).flatten()
    torch.testing.assert_close(distance(x, y), expected, rtol=1e-5, atol=1e-7)
    assert distance.name == "LPIPS" and (expected > 0).all()
    assert not distance(x, x).any()


def test_gradients_reach_only_the_images(vgg, images):
    distance = open_lpips(str(vgg))
    x, y = pair(images)
    x.requires_grad_()
    distance(x, y).sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    assert not any(p.requires_grad for p in distance.network.parameters())
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance(flat, flat.detach()).sum().backward()
    assert flat.grad.isfinite().all()


@pytest.fixture
def backbone(tmp_path):
    """backbone(name, **args): the folder of a timm model with random weights."""

    def write(name="resnet10t", **args):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0, **args)
        timm.models.save_for_hf(model, str(tmp_path / name), model_args=args)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    "name, args, side",
    [
        ("resnet10t", {}, 32),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}, 32),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}, 16),
    ],
)
def test_distance_of_a_backbone_matches_its_feature_maps(name, args, side, backbone, images):
    spec = backbone(name, **args)
    distance = open_perceptual(spec, 3)
    assert distance.name == f"perceptual({spec})"
    model = timm.create_model(f"local-dir:{spec}", pretrained=True, num_classes=0).eval()
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    x, y = pair(images, side)
    layers = []
    for picture in (x, y):
        if name.startswith("vit") and side != 32:  # it takes one size only
            picture = nn.functional.interpolate(picture, (32, 32), mode="bicubic", antialias=True)
        with torch.no_grad():
            layers.append(model.forward_intermediates((picture - mean) / std)[1])
    expected = torch.zeros(3)
    for x_map, y_map in zip(*layers, strict=True):
        x_map, y_map = (nn.functional.normalize(part, dim=1) for part in (x_map, y_map))
        expected += (x_map - y_map).square().sum(1).mean((1, 2)) / len(layers[0])
    torch.testing.assert_close(distance(x, y), expected, rtol=1e-4, atol=1e-6)


def test_absent_or_unfitting_weights_are_refused(monkeypatch, vgg, tmp_path):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    assert not lpips_is_cached()
    with pytest.raises(InputError, match="VGG16 cannot be downloaded .no route.*vgg16@FILE"):
        open_perceptual("vgg16", 3)
    with pytest.raises(InputError, match="there is no checkpoint file .*nowhere.pth"):
        open_perceptual(f"vgg16@{tmp_path / 'nowhere.pth'}", 3)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth does not hold torchvision's VGG16"):
        open_perceptual(f"vgg16@{tmp_path / 'other.pth'}", 3)
    with pytest.raises(InputError, match="no timm model of that name"):
        open_perceptual("nonsense", 3)
    with pytest.raises(InputError, match="takes 3 channels, but data.in_chans is 1"):
        open_perceptual(f"vgg16@{vgg}", 1)
    with pytest.raises(InputError, match="pixels has no forward_intermediates"):
        open_perceptual("pixels", 3)


def test_missing_torchmetrics_names_the_extra_to_install(monkeypatch, vgg):
    monkeypatch.setattr("ldae.pretraining.perceptual.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'ldae\[conv\]'"):
        open_perceptual(f"vgg16@{vgg}", 3)
