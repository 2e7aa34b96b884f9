import pytest
import torch

from ldae.errors import InputError
from ldae.tokenizers.adversarial import PatchDiscriminator, adaptive_weight, hinge_loss


def test_layers_match_ldm():
    """4 x 4 kernels, three of stride 2, then two of stride 1: a logit sees 70 x 70 pixels."""
    discriminator = PatchDiscriminator(3, 256)
    assert discriminator(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    kernels = [p.shape for p in discriminator.parameters() if p.ndim == 4]
    assert kernels == [
        (64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)
    ]  # fmt: skip


@pytest.mark.parametrize("side", [6, 8, 12, 16, 28, 32])
def test_small_images_get_fewer_strided_layers(side):
    logits = PatchDiscriminator(1, side)(torch.zeros(2, 1, side, side))
    assert logits.shape[:2] == (2, 1) and logits.numel() > 0


def test_images_below_6_pixels_are_refused():
    with pytest.raises(InputError, match="at least 6 x 6 pixels, but data.img_size is 5"):
        PatchDiscriminator(3, 5)


def test_logits_of_an_image_do_not_depend_on_other_images(images):
    discriminator = PatchDiscriminator(3, 32).double()
    x = images.double() / 255
    one_by_one = torch.cat([discriminator(x[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(discriminator(x), one_by_one)


def test_frozen_forward_gives_equal_logits_and_gradients_only_for_images(images):
    discriminator = PatchDiscriminator(3, 32).double()
    x = (images.double() / 255).requires_grad_()
    frozen = discriminator.forward_frozen(x)
    assert torch.equal(frozen, discriminator(x))
    (expected,) = torch.autograd.grad(discriminator(x).mean(), x)
    frozen.mean().backward()
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is None for p in discriminator.parameters())


def test_hinge_loss_matches_its_equation():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.25])
    assert hinge_loss(real, fake).item() == pytest.approx(
        0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.25) / 2)
    )


def test_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_layer():
    weight = torch.tensor([3.0, -4.0], dtype=torch.double, requires_grad=True)
    other = torch.tensor([5.0], dtype=torch.double, requires_grad=True)
    reconstruction = weight.square().sum() + other.sum()  # gradient 2 w, of norm 10
    adversarial = (weight * torch.tensor([0.3, 0.4])).sum()  # norm 0.5
    actual = adaptive_weight(reconstruction, adversarial, weight)
    assert actual.item() == pytest.approx(10 / (0.5 + 1e-4), rel=1e-6) and not actual.requires_grad
    assert weight.grad is None and other.grad is None
    assert adaptive_weight(1e6 * reconstruction, adversarial, weight).item() == 1e4


def test_adaptive_weight_sums_gradients_over_ranks_first(monkeypatch):
    """The weight balances the gradient that the optimizer will use, not each rank's gradient."""
    weight = torch.tensor([1.0, 2.0], dtype=torch.double, requires_grad=True)
    other_rank = torch.tensor([[0.0, 9.0], [-3.0, 0.0]])
    monkeypatch.setattr(
        "ldae.tokenizers.adversarial.all_reduce_sum", lambda gradients: gradients + other_rank
    )
    actual = adaptive_weight(weight[0] * 12, weight[0] * 7, weight)  # (12, 9) over (4, 0)
    assert actual.item() == pytest.approx(15 / (4 + 1e-4), rel=1e-6)
