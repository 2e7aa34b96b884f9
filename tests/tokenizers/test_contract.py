"""Laws for every tokenizer of the registry."""

import pytest
import torch
from torch.testing import assert_close

from ldae import tokenizers
from ldae.distributed import process_group, rank
from ldae.errors import InputError
from ldae.method import build_tokenizer
from ldae.patches import patchify
from ldae.tokenizers import TOKENIZERS, PatchTokenizer

UNTRAINED = [name for name, kind in TOKENIZERS.items() if not kind.trained]
PATCH_WISE = [name for name, kind in TOKENIZERS.items() if issubclass(kind, PatchTokenizer)]


@pytest.fixture
def unfitted(tiny):
    """unfitted(name, scale): a float64 tokenizer of 16 patches of 8 x 8 pixels, not fitted."""

    def make(name, scale="per-axis", **changes):
        config = tiny(tokenizer__name=name, tokenizer__scale=scale, **changes)
        return build_tokenizer(config).double()

    return make


@pytest.mark.parametrize("name", TOKENIZERS)
def test_images_become_tokens_and_images_again(name, unfitted, fitted, images):
    tokenizer = fitted(unfitted(name))
    x = tokenizer.normalize(images)
    assert_close(tokenizer.denormalize(x), images / 255.0, check_dtype=False)
    z = tokenizer.encode(x)
    assert z.shape == (8, tokenizer.num_tokens, tokenizer.dim)
    assert tokenizer.decode(z).shape == x.shape


@pytest.mark.parametrize("scale", ["raw", "global", "per-axis"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_latents_have_the_variance_of_their_scale(name, scale, unfitted, fitted, images):
    """Samples have the variance of their scale; raw latents are unchanged."""
    tokenizer = fitted(unfitted(name, scale), images.split([3, 1, 4]))
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
def test_tokenizer_describes_itself_by_the_scale_that_auto_means(name, unfitted, fitted, images):
    scale = "per-axis" if name in PATCH_WISE else "global"
    default, named = fitted(unfitted(name, "auto")), fitted(unfitted(name, scale))
    assert tokenizers.describe(default) == tokenizers.describe(named)
    assert tokenizers.describe(default)["scale"] == scale
    assert torch.equal(default.scales, named.scales)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_fit_does_not_depend_on_the_batches(name, unfitted, fitted, images):
    expected = fitted(unfitted(name)).state_dict()
    stream = fitted(unfitted(name), images.split([3, 1, 4])).state_dict()
    for part, value in expected.items():
        assert_close(stream[part], value)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_two_ranks_fit_the_same_as_one(name, unfitted, fitted, images, on_ranks):
    expected = fitted(unfitted(name)).state_dict()

    def work():
        with process_group(torch.device("cpu")):
            actual = fitted(unfitted(name), [images[rank() :: 2]]).state_dict()
            for part, value in expected.items():
                assert_close(actual[part], value)

    assert on_ranks(work) == ["", ""]


@pytest.mark.parametrize("name", UNTRAINED)
def test_given_pixel_statistics_are_kept(name, unfitted, images):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    tokenizer = unfitted(name)
    tokenizer.fit([images], mean, std)
    for actual, expected in ((tokenizer.pixel_mean, mean), (tokenizer.pixel_std, std)):
        assert_close(actual, torch.tensor(expected).double())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_fitting_on_no_or_constant_images_is_refused(name, unfitted, fitted):
    with pytest.raises(InputError, match="no image"):
        fitted(unfitted(name), [])
    with pytest.raises(InputError, match="channel 0 is the same"):
        fitted(unfitted(name), [torch.full((2, 3, 32, 32), 7, dtype=torch.uint8)])


@pytest.mark.parametrize("name", PATCH_WISE)
def test_project_and_inverse_are_affine_and_equal_encode_and_decode(name, unfitted, fitted, images):
    """The export relies on it, and so do networks that take or predict images."""
    tokenizer = fitted(unfitted(name))
    x = tokenizer.normalize(images)
    z = tokenizer.project(patchify(x, 8))
    assert_close(tokenizer.encode(x), z)
    assert_close(patchify(tokenizer.decode(z), 8), tokenizer.inverse(z), rtol=0, atol=1e-12)
    a, b = torch.randn(2, 5, 192, dtype=torch.double)
    c, d = torch.randn(2, 5, tokenizer.dim, dtype=torch.double)
    for affine, (p, q) in ((tokenizer.project, (a, b)), (tokenizer.inverse, (c, d))):
        middle = 0.3 * affine(p) + 0.7 * affine(q)
        assert_close(affine(0.3 * p + 0.7 * q), middle)
    if not tokenizer.trained:
        assert_close(tokenizer.project(tokenizer.inverse(c)), c)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_saved_tokenizer_loads_unchanged(name, unfitted, fitted, images, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    saved = fitted(unfitted(name))
    tokenizers.save(saved, path)
    described = tokenizers.describe(saved)
    loaded = tokenizers.create(**described).double()
    assert type(loaded) is TOKENIZERS[name] and tokenizers.describe(loaded) == described
    tokenizers.load(loaded, path)
    x = saved.normalize(images)
    assert torch.equal(loaded.decode(loaded.encode(x)), saved.decode(saved.encode(x)))
    larger = unfitted(name, data__img_size=64)
    if isinstance(saved, PatchTokenizer):  # a patch is the same in an image of every size
        tokenizers.load(larger, path)
        parts = larger.encode(x.repeat(1, 1, 2, 2)).unflatten(1, (8, 8))
        assert_close(parts[:, :4, 4:].flatten(1, 2), saved.encode(x))
    else:
        with pytest.raises(InputError, match="tokenizer.safetensors has img_size 32, this run 64"):
            tokenizers.load(larger, path)
    with pytest.raises(InputError, match="tokenizer.safetensors has patch_size 8, this run 16"):
        tokenizers.load(unfitted(name, model__patch_size=16), path)
    for other in set(TOKENIZERS) - {name}:
        with pytest.raises(InputError, match=f"has name {name}, this run {other}"):
            tokenizers.load(unfitted(other), path)
