"""The laws of every tokenizer of the registry."""

import pytest
import torch
from torch.testing import assert_close

from ldae import tokenizers
from ldae.distributed import process_group, rank
from ldae.errors import InputError
from ldae.method import build_tokenizer
from ldae.patches import patchify
from ldae.tokenizers import TOKENIZERS, PatchTokenizer

GIVEN = [name for name, kind in TOKENIZERS.items() if not kind.trained]
PATCH_WISE = [name for name, kind in TOKENIZERS.items() if issubclass(kind, PatchTokenizer)]


@pytest.fixture
def made(tiny):
    """made(name, scale): an unfitted tokenizer of 16 patches of 8 x 8, in float64."""

    def make(name, scale="per-axis", **changes):
        config = tiny(tokenizer__name=name, tokenizer__scale=scale, **changes)
        return build_tokenizer(config).double()

    return make


@pytest.mark.parametrize("name", TOKENIZERS)
def test_images_become_tokens_and_images_again(name, made, fitted, images):
    tokenizer = fitted(made(name))
    x = tokenizer.normalize(images)
    assert_close(tokenizer.denormalize(x), images / 255.0, check_dtype=False)
    z = tokenizer.encode(x)
    assert z.shape == (8, tokenizer.num_tokens, tokenizer.dim)
    assert tokenizer.decode(z).shape == x.shape


@pytest.mark.parametrize("scale", ["raw", "global", "per-axis"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_scales(name, scale, made, fitted, images):
    """Draws have the variance that the scale asks for; raw latents are as they come."""
    tokenizer = fitted(made(name, scale), images.split([3, 1, 4]))
    x = tokenizer.normalize(images)
    z = tokenizer.encode(x)
    spread = z.flatten(0, 1).var(0, unbiased=False)
    if tokenizer.stochastic:
        log_variance = tokenizer.posterior(x).log_variance
        spread = spread + log_variance.exp().flatten(0, 1).mean(0) * tokenizer.scales**2
    if scale == "raw":
        assert not tokenizer.trained or torch.equal(z, tokenizer.posterior(x).mean)
        return
    assert z.flatten(0, 1).mean(0).abs().max() < 1e-6
    if scale == "global":
        spread = spread.mean()
    assert_close(spread, torch.ones_like(spread), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_streaming_in_any_batches_fits_the_same(name, made, fitted, images):
    whole = fitted(made(name)).state_dict()
    stream = fitted(made(name), images.split([3, 1, 4])).state_dict()
    for part, value in whole.items():
        assert_close(stream[part], value)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_two_ranks_fit_what_one_fits(name, made, fitted, images, on_ranks):
    whole = fitted(made(name)).state_dict()

    def work():
        with process_group(torch.device("cpu")):
            own = fitted(made(name), [images[rank() :: 2]]).state_dict()
            for part, value in whole.items():
                assert_close(own[part], value)

    assert on_ranks(work) == ["", ""]


@pytest.mark.parametrize("name", GIVEN)
def test_given_pixel_statistics_are_kept(name, made, images):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    tokenizer = made(name)
    tokenizer.fit([images], mean, std)
    for found, wanted in ((tokenizer.pixel_mean, mean), (tokenizer.pixel_std, std)):
        assert_close(found, torch.tensor(wanted).double())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_nothing_to_fit_on_is_told(name, made, fitted):
    with pytest.raises(InputError, match="no image"):
        fitted(made(name), [])
    with pytest.raises(InputError, match="channel 0 is the same"):
        fitted(made(name), [torch.full((2, 3, 32, 32), 7, dtype=torch.uint8)])


@pytest.mark.parametrize("name", PATCH_WISE)
def test_a_patch_is_mapped_affinely_and_by_itself(name, made, fitted, images):
    """What the export folds, and what lets a network see and predict images."""
    tokenizer = fitted(made(name))
    x = tokenizer.normalize(images)
    z = tokenizer.project(patchify(x, 8))
    assert_close(tokenizer.encode(x), z)
    assert_close(patchify(tokenizer.decode(z), 8), tokenizer.inverse(z), rtol=0, atol=1e-12)
    a, b = torch.randn(2, 5, 192, dtype=torch.double)
    c, d = torch.randn(2, 5, tokenizer.dim, dtype=torch.double)
    for affine, (one, other) in ((tokenizer.project, (a, b)), (tokenizer.inverse, (c, d))):
        middle = 0.3 * affine(one) + 0.7 * affine(other)
        assert_close(affine(0.3 * one + 0.7 * other), middle)
    if not tokenizer.trained:
        assert_close(tokenizer.project(tokenizer.inverse(c)), c)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_saved_tokenizer_loads_as_it_was(name, made, fitted, images, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    saved = fitted(made(name))
    tokenizers.save(saved, path)
    described = tokenizers.describe(saved)
    loaded = tokenizers.create(**described).double()
    assert type(loaded) is TOKENIZERS[name] and tokenizers.describe(loaded) == described
    tokenizers.load(loaded, path)
    x = saved.normalize(images)
    assert torch.equal(loaded.decode(loaded.encode(x)), saved.decode(saved.encode(x)))
    larger = made(name, data__img_size=64)
    if isinstance(saved, PatchTokenizer):  # a patch is the same in an image of every size
        tokenizers.load(larger, path)
        parts = larger.encode(x.repeat(1, 1, 2, 2)).unflatten(1, (8, 8))
        assert_close(parts[:, :4, 4:].flatten(1, 2), saved.encode(x))
    else:
        with pytest.raises(InputError, match="tokenizer.safetensors has img_size 32, this run 64"):
            tokenizers.load(larger, path)
    with pytest.raises(InputError, match="tokenizer.safetensors has patch_size 8, this run 16"):
        tokenizers.load(made(name, model__patch_size=16), path)
    for other in set(TOKENIZERS) - {name}:
        with pytest.raises(InputError, match=f"has name {name}, this run {other}"):
            tokenizers.load(made(other), path)
