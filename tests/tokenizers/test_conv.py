import builtins

import diffusers
import pytest
import torch

from ldae import tokenizers
from ldae.errors import InputError
from ldae.pretraining.reconstruction import measure_reconstruction
from ldae.tokenizers.conv import ConvTokenizer


def made(patch_size=8, dim=8, in_chans=3, scale="per-axis", **kind):
    torch.manual_seed(0)
    return ConvTokenizer(32, patch_size, in_chans, dim, scale, **({"width": 8} | kind))


@pytest.fixture
def published(tmp_path):
    """published(kind, **config): a folder as diffusers writes it, of downsampling 2."""

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
def test_a_token_is_a_patch_whatever_the_sizes(patch_size, dim, in_chans, codes):
    tokenizer = made(patch_size, dim, in_chans, codes=codes)
    x = torch.randn(2, in_chans, 32, 32)
    z = tokenizer.encode(x)
    assert z.shape == (2, (32 // patch_size) ** 2, dim) == (2, tokenizer.tokens, dim)
    assert tokenizer.decode(z).shape == x.shape
    assert tokenizer.stochastic == (not codes) and tokenizer.quantised == bool(codes)


def test_a_token_holds_two_by_two_latents(images):
    tokenizer = made(scale="raw")
    x = tokenizer.normalize(images)
    latents = tokenizer.network.encode(x).latent_dist.mean  # (8, 2, 8, 8)
    z = tokenizer.encode(x).reshape(8, 4, 4, 2, 2, 2)  # row, column, channel, row, column within
    for row, column, channel in ((0, 0, 0), (3, 5, 1), (7, 2, 0)):
        found = z[:, row // 2, column // 2, channel, row % 2, column % 2]
        torch.testing.assert_close(found, latents[:, channel, row, column])


def test_sizes_are_those_of_ldm():
    """The published f8 autoencoder, at a sixteenth of its width."""
    config = made(16, 16).network.config
    assert config.block_out_channels == (8, 16, 32, 32) and config.layers_per_block == 2
    assert config.latent_channels == 4 and config.mid_block_add_attention
    assert made(2, 4).network.config.block_out_channels == (8,)
    assert made(32, 4).network.config.block_out_channels == (8, 16, 32, 32, 32)
    assert made(4, 4, width=48).network.config.norm_num_groups == 16


def test_draws_are_those_of_diffusers(images):
    tokenizer = made().double()
    tokenizer.fit_pixels([images])
    tokenizer.fit_latents([images])
    x = tokenizer.normalize(images)
    eps = torch.randn(8, 16, 8, dtype=torch.double)
    found = tokenizer.network.encode(x).latent_dist
    ones = tokenizer.posterior(x).draw(torch.ones_like(eps))
    torch.testing.assert_close(
        ones.square().sum(), (found.mean + found.std).square().sum()
    )  # the same numbers in another order
    torch.testing.assert_close(tokenizer.reconstruct(x, eps).kl, found.kl())
    h = tokenizer.posterior(x).draw(eps)
    z = (h - tokenizer.latent_mean) * tokenizer.scales
    torch.testing.assert_close(tokenizer.encode(x, eps), z)
    torch.testing.assert_close(tokenizer.decode(z), tokenizer.reconstruct(x, eps).images)


def test_quantisation_passes_gradients_straight_through(images):
    """d loss / d latents = d loss / d codes, as if the nearest code were the latent itself."""
    tokenizer = made(codes=16).double()
    x = tokenizer.normalize(images)
    h = tokenizer.posterior(x).mean.detach().requires_grad_()
    made_images, _ = tokenizer.generate(h)
    direction = torch.randn_like(made_images)
    (found,) = torch.autograd.grad((made_images * direction).sum(), h)
    codebook = tokenizer.network.quantize.embedding.weight
    latents = h.reshape(8, 16, 2, 4).transpose(2, 3)  # (B, N, 4 places, 2 channels)
    nearest = (latents[..., None, :] - codebook).square().sum(-1).argmin(-1)
    codes = codebook[nearest].transpose(2, 3).reshape(h.shape).detach().requires_grad_()
    grid = codes.reshape(8, 4, 4, 2, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(8, 2, 8, 8)
    network = tokenizer.network
    by_hand = network.decoder(network.post_quant_conv(grid))
    torch.testing.assert_close(made_images, by_hand)
    (wanted,) = torch.autograd.grad((by_hand * direction).sum(), codes)
    torch.testing.assert_close(found, wanted)
    used = tokenizer.code_indices(x)
    assert used.shape == (8, 64) and torch.equal(
        used.sort().values, nearest.flatten(1).sort().values
    )


def test_commitment_is_on_the_encoders_term(images):
    """codebook: |sg[h] - e|^2, encoder: beta |h - sg[e]|^2 with beta 0.25 (van den Oord 2017)."""
    tokenizer = made(codes=16).double()
    codebook = tokenizer.network.quantize.embedding.weight
    assert codebook.abs().max() <= 1 / 16
    h = tokenizer.posterior(tokenizer.normalize(images)).mean.detach().requires_grad_()
    _, loss = tokenizer.generate(h)
    to_encoder, to_codebook = torch.autograd.grad(loss, (h, codebook))
    latents = h.detach().reshape(8, 16, 2, 4).transpose(2, 3)
    nearest = (latents[..., None, :] - codebook).square().sum(-1).argmin(-1)
    apart = latents - codebook[nearest]
    count = apart.numel()
    wanted = (0.25 * 2 * apart / count).transpose(2, 3).reshape(h.shape)
    torch.testing.assert_close(to_encoder, wanted)
    pulled = torch.zeros_like(codebook)
    for code in range(16):
        pulled[code] = (-2 * apart[nearest == code] / count).sum(0)
    torch.testing.assert_close(to_codebook, pulled)
    wanted = 1.25 * apart.square().mean().item()
    assert loss.item() == pytest.approx(wanted)


@pytest.mark.parametrize("codes", [0, 16])
@pytest.mark.parametrize("scale", ["raw", "global", "per-axis"])
def test_scales(scale, codes, images):
    tokenizer = made(scale=scale, codes=codes).double()
    tokenizer.fit_pixels([images])
    tokenizer.fit_latents(images.split([3, 1, 4]))
    found = tokenizer.posterior(tokenizer.normalize(images))
    variance = found.mean.flatten(0, 1).var(0, unbiased=False)
    if not codes:
        variance = variance + found.log_variance.exp().flatten(0, 1).mean(0)
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
def test_a_saved_tokenizer_loads_as_it_was(codes, images, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    saved = made(codes=codes)
    saved.fit_pixels([images])
    saved.fit_latents([images])
    tokenizers.save(saved, path)
    torch.manual_seed(9)
    loaded = ConvTokenizer(32, 8, 3, 8, "per-axis", 8, codes)
    tokenizers.load(loaded, path)
    x = saved.normalize(images)
    assert torch.equal(loaded.decode(loaded.encode(x)), saved.decode(saved.encode(x)))
    with pytest.raises(InputError, match="tokenizer.safetensors has width 8, this run 16"):
        tokenizers.load(made(width=16, codes=codes), path)
    with pytest.raises(InputError, match=f"has codes {codes}, this run 7"):
        tokenizers.load(made(codes=7), path)


def test_a_published_autoencoder_is_used_as_it_is(images, published):
    network, folder = published(scaling_factor=0.5, shift_factor=0.25)
    tokenizer = made(4, 16, scale="raw", pretrained=folder)
    x = tokenizer.normalize(images)
    torch.testing.assert_close(x, images / 127.5 - 1)
    tokenizer.fit_latents([images])
    with torch.no_grad():
        latents = (network.encode(x).latent_dist.mean - 0.25) * 0.5
        z = tokenizer.encode(x)
        torch.testing.assert_close(z.square().sum(), latents.square().sum())
        torch.testing.assert_close(z[:, 0, :4], latents[:, 0, :2, :2].flatten(1))
        torch.testing.assert_close(tokenizer.decode(z), network.decode(2 * latents + 0.25).sample)
    axes = made(4, 16, pretrained=folder)
    axes.fit_latents([images])
    assert not torch.equal(axes.scales, tokenizer.scales)


def test_a_published_vq_model_brings_its_codebook(images, published):
    network, folder = published(diffusers.VQModel, num_vq_embeddings=12, vq_embed_dim=3)
    tokenizer = made(4, 12, pretrained=folder, scale="raw")
    x = tokenizer.normalize(images)
    with torch.no_grad():
        wanted = network.decode(network.encode(x).latents).sample
        torch.testing.assert_close(tokenizer.decode(tokenizer.encode(x)), wanted)
    assert tokenizer.quantised and not tokenizer.stochastic
    assert tokenizer.network.quantize.legacy is False
    found = measure_reconstruction(tokenizer, [images])
    assert tokenizer.codes == 12 and 0 < found["codes_used"] <= 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"in_chans": 1}, "needs data.in_chans 3, not 1"),
        ({"dim": 8}, "needs tokenizer.dim 16, not 8"),
        ({"patch_size": 8}, "needs model.patch_size 4, not 8"),
        ({"codes": 7}, "needs tokenizer.codes 0, not 7"),
    ],
)
def test_a_published_one_that_does_not_fit_is_told(arguments, sentence, published):
    _, folder = published()
    with pytest.raises(InputError, match=sentence):
        made(**{"patch_size": 4, "dim": 16, "pretrained": folder} | arguments)


def test_what_can_not_be_opened_is_told(published, tmp_path):
    _, folder = published(diffusers.VQModel)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="tokenizer.pretrained .*empty can not be opened"):
        made(4, 16, pretrained=str(tmp_path / "empty"))
    config = tmp_path / "VQModel" / "config.json"
    config.write_text(config.read_text().replace('"VQModel"', '"UNet2DModel"'))
    with pytest.raises(InputError, match="is a UNet2DModel, and neither an AutoencoderKL nor"):
        made(4, 16, pretrained=folder)
    config.write_text("{}")
    with pytest.raises(InputError, match="is a model, and neither an AutoencoderKL nor a VQModel"):
        made(4, 16, pretrained=folder)
    with pytest.raises(InputError, match="there is no folder none, and on the hub"):
        made(4, 16, pretrained="none")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"patch_size": 1}, "model.patch_size 1 .* power of two"),
        ({"dim": 6}, "tokenizer.dim 6 is no multiple of 4"),
        ({"patch_size": 64}, "data.img_size 32 .* model.patch_size 64"),
    ],
)
def test_sizes_that_do_not_fit_are_told(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        made(**arguments)


def test_a_patch_that_is_no_power_of_two_is_told():
    with pytest.raises(InputError, match="model.patch_size 6 .* power of two"):
        ConvTokenizer(36, 6, 3, 8, "raw", 8)


def test_without_diffusers_the_extra_is_named(monkeypatch):
    original = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "diffusers":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"pip install 'ldae\[conv\]'"):
        made()
