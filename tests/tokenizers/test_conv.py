import sys

import diffusers
import pytest
import torch

from ldae import tokenizers
from ldae.errors import InputError
from ldae.pretraining.reconstruction import measure_reconstruction
from ldae.tokenizers.conv import ConvTokenizer


def make_tokenizer(patch_size=8, dim=8, in_chans=3, scale="per-axis", **kind):
    torch.manual_seed(0)
    return ConvTokenizer(32, patch_size, in_chans, dim, scale, **({"width": 8} | kind))


@pytest.fixture
def published(tmp_path):
    """published(kind, **config): a network that downsamples by 2, and its diffusers folder."""

    def write(kind=diffusers.AutoencoderKL, **config):
        torch.manual_seed(3)
        sizes = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
            "latent_channels": 4,
            "norm_num_groups": 4,
        }
        network = kind(**sizes | config)
        network.save_pretrained(tmp_path / kind.__name__)
        return network.eval(), str(tmp_path / kind.__name__)

    return write


@pytest.mark.parametrize("codes", [0, 16])
@pytest.mark.parametrize("patch_size, dim, in_chans", [(2, 4, 3), (4, 8, 1), (8, 16, 4)])
def test_there_is_one_token_per_patch_for_all_sizes(patch_size, dim, in_chans, codes):
    tokenizer = make_tokenizer(patch_size, dim, in_chans, codes=codes)
    x = torch.randn(2, in_chans, 32, 32)
    z = tokenizer.encode(x)
    assert z.shape == (2, (32 // patch_size) ** 2, dim) == (2, tokenizer.num_tokens, dim)
    assert tokenizer.decode(z).shape == x.shape
    assert tokenizer.stochastic == (not codes) and tokenizer.quantised == bool(codes)


def test_a_token_is_two_by_two_latents(images):
    tokenizer = make_tokenizer(scale="raw")
    x = tokenizer.normalize(images)
    latents = tokenizer.network.encode(x).latent_dist.mean  # (8, 2, 8, 8)
    z = tokenizer.encode(x).reshape(8, 4, 4, 2, 2, 2)  # row, column, channel, row, column within
    for row, column, channel in ((0, 0, 0), (3, 5, 1), (7, 2, 0)):
        actual = z[:, row // 2, column // 2, channel, row % 2, column % 2]
        torch.testing.assert_close(actual, latents[:, channel, row, column])


def test_network_sizes_match_ldm():
    """Compared to the published f8 autoencoder, at a sixteenth of its width."""
    config = make_tokenizer(16, 16).network.config
    assert config.block_out_channels == (8, 16, 32, 32) and config.layers_per_block == 2
    assert config.latent_channels == 4 and config.mid_block_add_attention
    assert make_tokenizer(2, 4).network.config.block_out_channels == (8,)
    assert make_tokenizer(32, 4).network.config.block_out_channels == (8, 16, 32, 32, 32)
    assert make_tokenizer(4, 4, width=48).network.config.norm_num_groups == 16


def test_posterior_samples_match_diffusers(images, fitted):
    tokenizer = fitted(make_tokenizer().double())
    x = tokenizer.normalize(images)
    eps = torch.randn(8, 16, 8, dtype=torch.double)
    reference = tokenizer.network.encode(x).latent_dist
    ones = tokenizer.posterior(x).sample(torch.ones_like(eps))
    torch.testing.assert_close(
        ones.square().sum(), (reference.mean + reference.std).square().sum()
    )  # the same numbers in another order
    torch.testing.assert_close(tokenizer.reconstruct(x, eps).kl, reference.kl())
    h = tokenizer.posterior(x).sample(eps)
    z = (h - tokenizer.latent_mean) * tokenizer.scales
    torch.testing.assert_close(tokenizer.encode(x, eps), z)
    torch.testing.assert_close(tokenizer.decode(z), tokenizer.reconstruct(x, eps).images)


def test_quantisation_passes_gradients_straight_through(images):
    """d loss / d latents = d loss / d codes, as if the latent were its nearest code."""
    tokenizer = make_tokenizer(codes=16).double()
    x = tokenizer.normalize(images)
    h = tokenizer.posterior(x).mean.detach().requires_grad_()
    decoded, _ = tokenizer.decode_raw(h)
    direction = torch.randn_like(decoded)
    (actual,) = torch.autograd.grad((decoded * direction).sum(), h)
    codebook = tokenizer.network.quantize.embedding.weight
    latents = h.reshape(8, 16, 2, 4).transpose(2, 3)  # (B, N, 4 places, 2 channels)
    nearest = (latents[..., None, :] - codebook).square().sum(-1).argmin(-1)
    codes = codebook[nearest].transpose(2, 3).reshape(h.shape).detach().requires_grad_()
    grid = codes.reshape(8, 4, 4, 2, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(8, 2, 8, 8)
    network = tokenizer.network
    by_hand = network.decoder(network.post_quant_conv(grid))
    torch.testing.assert_close(decoded, by_hand)
    (expected,) = torch.autograd.grad((by_hand * direction).sum(), codes)
    torch.testing.assert_close(actual, expected)
    used = tokenizer.code_indices(x)
    assert used.shape == (8, 64) and torch.equal(
        used.sort().values, nearest.flatten(1).sort().values
    )


def test_commitment_weighs_the_encoder_term(images):
    """codebook: |sg[h] - e|^2, encoder: beta |h - sg[e]|^2 with beta 0.25 (van den Oord 2017)."""
    tokenizer = make_tokenizer(codes=16).double()
    codebook = tokenizer.network.quantize.embedding.weight
    assert codebook.abs().max() <= 1 / 16
    h = tokenizer.posterior(tokenizer.normalize(images)).mean.detach().requires_grad_()
    _, loss = tokenizer.decode_raw(h)
    to_encoder, to_codebook = torch.autograd.grad(loss, (h, codebook))
    latents = h.detach().reshape(8, 16, 2, 4).transpose(2, 3)
    nearest = (latents[..., None, :] - codebook).square().sum(-1).argmin(-1)
    difference = latents - codebook[nearest]
    count = difference.numel()
    expected = (0.25 * 2 * difference / count).transpose(2, 3).reshape(h.shape)
    torch.testing.assert_close(to_encoder, expected)
    expected = torch.zeros_like(codebook)
    for code in range(16):
        expected[code] = (-2 * difference[nearest == code] / count).sum(0)
    torch.testing.assert_close(to_codebook, expected)
    expected = 1.25 * difference.square().mean().item()
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("codes", [0, 16])
@pytest.mark.parametrize("scale", ["raw", "global", "per-axis"])
def test_latents_have_the_variance_of_their_scale(scale, codes, images, fitted):
    tokenizer = fitted(make_tokenizer(scale=scale, codes=codes).double(), images.split([3, 1, 4]))
    posterior = tokenizer.posterior(tokenizer.normalize(images))
    variance = posterior.mean.flatten(0, 1).var(0, unbiased=False)
    if not codes:
        variance = variance + posterior.log_variance.exp().flatten(0, 1).mean(0)
    spread = variance * tokenizer.scales**2
    if scale == "raw":
        assert torch.equal(tokenizer.scales, torch.ones(8).double())
        assert not tokenizer.latent_mean.any()
    elif scale == "global":
        assert spread.mean().item() == pytest.approx(1, rel=1e-6)
        assert len(tokenizer.scales.unique()) == 1
    else:
        torch.testing.assert_close(spread, torch.ones(8).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("codes", [0, 16])
def test_saved_tokenizer_loads_unchanged(codes, images, fitted, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    saved = fitted(make_tokenizer(codes=codes))
    tokenizers.save(saved, path)
    torch.manual_seed(9)
    loaded = ConvTokenizer(32, 8, 3, 8, "per-axis", 8, codes)
    tokenizers.load(loaded, path)
    x = saved.normalize(images)
    assert torch.equal(loaded.decode(loaded.encode(x)), saved.decode(saved.encode(x)))
    with pytest.raises(InputError, match="tokenizer.safetensors has width 8, this run 16"):
        tokenizers.load(make_tokenizer(width=16, codes=codes), path)
    with pytest.raises(InputError, match=f"has codes {codes}, this run 7"):
        tokenizers.load(make_tokenizer(codes=7), path)


def test_published_autoencoder_is_used_unchanged(images, published):
    network, folder = published(scaling_factor=0.5, shift_factor=0.25)
    tokenizer = make_tokenizer(4, 16, scale="raw", pretrained=folder)
    x = tokenizer.normalize(images)
    torch.testing.assert_close(x, images / 127.5 - 1)
    tokenizer.fit_latents([images])
    with torch.no_grad():
        latents = (network.encode(x).latent_dist.mean - 0.25) * 0.5
        z = tokenizer.encode(x)
        torch.testing.assert_close(z.square().sum(), latents.square().sum())
        torch.testing.assert_close(z[:, 0, :4], latents[:, 0, :2, :2].flatten(1))
        torch.testing.assert_close(tokenizer.decode(z), network.decode(2 * latents + 0.25).sample)
    default = make_tokenizer(4, 16, scale="auto", pretrained=folder)
    axes = make_tokenizer(4, 16, scale="per-axis", pretrained=folder)
    for other in (default, axes):
        other.fit_latents([images])
    assert torch.equal(default.scales, torch.full((16,), 0.5))
    assert torch.equal(default.latent_mean, torch.full((16,), 0.25))
    assert not torch.equal(axes.scales, tokenizer.scales)


def test_published_vq_model_brings_its_codebook(images, published):
    network, folder = published(diffusers.VQModel, num_vq_embeddings=12, vq_embed_dim=3)
    tokenizer = make_tokenizer(4, 12, pretrained=folder, scale="raw")
    x = tokenizer.normalize(images)
    with torch.no_grad():
        expected = network.decode(network.encode(x).latents).sample
        torch.testing.assert_close(tokenizer.decode(tokenizer.encode(x)), expected)
    assert tokenizer.quantised and not tokenizer.stochastic
    assert tokenizer.network.quantize.legacy is False
    measured = measure_reconstruction(tokenizer, [images])
    assert tokenizer.codes == 12 and 0 < measured["codes_used"] <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_chans": 1}, "needs data.in_chans 3, not 1"),
        ({"dim": 8}, "needs tokenizer.dim 16, not 8"),
        ({"patch_size": 8}, "needs model.patch_size 4, not 8"),
        ({"codes": 7}, "needs tokenizer.codes 0, not 7"),
    ],
)
def test_published_network_of_other_sizes_is_refused(arguments, message, published):
    _, folder = published()
    with pytest.raises(InputError, match=message):
        make_tokenizer(**{"patch_size": 4, "dim": 16, "pretrained": folder} | arguments)


def test_published_network_that_cannot_be_opened_is_refused(published, tmp_path):
    _, folder = published(diffusers.VQModel)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="tokenizer.pretrained .*empty cannot be opened"):
        make_tokenizer(4, 16, pretrained=str(tmp_path / "empty"))
    config = tmp_path / "VQModel" / "config.json"
    config.write_text(config.read_text().replace('"VQModel"', '"UNet2DModel"'))
    with pytest.raises(InputError, match="is a UNet2DModel, but must be an AutoencoderKL or"):
        make_tokenizer(4, 16, pretrained=folder)
    config.write_text("{}")
    with pytest.raises(InputError, match="is a model, but must be an AutoencoderKL or a VQModel"):
        make_tokenizer(4, 16, pretrained=folder)
    with pytest.raises(
        InputError, match="there is no folder none; a network on the hub is USER/NAME"
    ):
        make_tokenizer(4, 16, pretrained="none")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"patch_size": 1}, "model.patch_size 1 .* power of two"),
        ({"dim": 6}, "tokenizer.dim 6 is not a multiple of 4"),
        ({"patch_size": 64}, "data.img_size 32 .* model.patch_size 64"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_tokenizer(**arguments)


def test_patch_size_must_be_a_power_of_two():
    with pytest.raises(InputError, match="model.patch_size 6 .* power of two"):
        ConvTokenizer(36, 6, 3, 8, "raw", 8)


def test_missing_diffusers_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"pip install 'ldae\[conv\]'"):
        make_tokenizer()
