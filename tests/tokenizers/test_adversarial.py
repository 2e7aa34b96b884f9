import pytest
import torch

from ldae.errors import InputError
from ldae.tokenizers.adversarial import PatchDiscriminator, adaptive_weight, hinge


def test_sizes_are_those_of_ldm():
    """Three layers of stride 2, then two of stride 1, 4 x 4 each: 70 x 70 pixels a logit."""
    discriminator = PatchDiscriminator(3, 256)
    assert discriminator(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    kernels = [p.shape for p in discriminator.parameters() if p.ndim == 4]
    assert kernels == [
        (64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)
    ]  # fmt: skip


@pytest.mark.parametrize("side", [6, 8, 12, 16, 28, 32])
def test_small_images_fit_too(side):
    logits = PatchDiscriminator(1, side)(torch.zeros(2, 1, side, side))
    assert logits.shape[:2] == (2, 1) and logits.numel() > 0


def test_too_small_an_image_is_told():
    with pytest.raises(InputError, match="6 x 6 pixels, data.img_size is 5"):
        PatchDiscriminator(3, 5)


def test_an_images_logits_depend_on_no_other_image(images):
    discriminator = PatchDiscriminator(3, 32).double()
    x = images.double() / 255
    alone = torch.cat([discriminator(x[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(discriminator(x), alone)


def test_frozen_gives_the_same_logits_and_gradients_to_the_images_alone(images):
    discriminator = PatchDiscriminator(3, 32).double()
    x = (images.double() / 255).requires_grad_()
    frozen = discriminator.frozen(x)
    assert torch.equal(frozen, discriminator(x))
    (wanted,) = torch.autograd.grad(discriminator(x).mean(), x)
    frozen.mean().backward()
    torch.testing.assert_close(x.grad, wanted)
    assert all(p.grad is None for p in discriminator.parameters())


def test_hinge_is_its_equation():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.25])
    assert hinge(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.25) / 2))


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    weight = torch.tensor([3.0, -4.0], dtype=torch.double, requires_grad=True)
    other = torch.tensor([5.0], dtype=torch.double, requires_grad=True)
    reconstruction = weight.square().sum() + other.sum()  # gradient 2 w, of norm 10
    adversarial = (weight * torch.tensor([0.3, 0.4])).sum()  # norm 0.5
    found = adaptive_weight(reconstruction, adversarial, weight)
    assert found.item() == pytest.approx(10 / (0.5 + 1e-4), rel=1e-6) and not found.requires_grad
    assert weight.grad is None and other.grad is None
    assert adaptive_weight(1e6 * reconstruction, adversarial, weight).item() == 1e4


def test_its_gradients_are_those_of_all_ranks_together(monkeypatch):
    """Ranks whose gradients point apart weigh the mean of them, as the step will take it."""
    weight = torch.tensor([1.0, 2.0], dtype=torch.double, requires_grad=True)
    other_rank = torch.tensor([[0.0, 9.0], [-3.0, 0.0]])
    monkeypatch.setattr(
        "ldae.tokenizers.adversarial.all_reduce_sum", lambda gradients: gradients + other_rank
    )
    found = adaptive_weight(weight[0] * 12, weight[0] * 7, weight)  # (12, 9) over (4, 0)
    assert found.item() == pytest.approx(15 / (4 + 1e-4), rel=1e-6)
