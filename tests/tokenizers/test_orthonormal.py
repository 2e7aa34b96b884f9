import pytest
import torch
from sklearn.decomposition import PCA

from ldae import tokenizers
from ldae.errors import InputError
from ldae.patches import patchify
from ldae.tokenizers import PatchPCA, PixelTokenizer


def fitted(images, kind=PatchPCA, dim=6, scale="per-axis", patch_size=4):
    tokenizer = kind(32, patch_size, 3, dim, scale).double()
    tokenizer.fit([images])
    return tokenizer


def patches_of(tokenizer, images):
    return patchify(tokenizer.normalize(images), tokenizer.patch_size)


@pytest.mark.parametrize("kind, dim", [(PatchPCA, 6), (PixelTokenizer, 12), (PixelTokenizer, 48)])
def test_basis_is_orthonormal(images, kind, dim):
    basis = fitted(images, kind, dim).basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(48).double(), atol=1e-6, rtol=0)


def test_axes_match_scikit_learn(images):
    tokenizer = fitted(images)
    patches = patches_of(tokenizer, images).flatten(0, 1)
    reference = PCA().fit(patches.numpy())
    alignment = (tokenizer.basis * torch.from_numpy(reference.components_)).sum(1).abs()
    torch.testing.assert_close(alignment[:20], torch.ones(20).double(), atol=1e-6, rtol=0)
    share = (len(patches) - 1) / len(patches)
    expected = torch.from_numpy(reference.explained_variance_) * share
    torch.testing.assert_close(tokenizer.variances, expected, atol=1e-6, rtol=1e-6)


def test_the_signs_of_the_axes_are_not_those_that_the_eigensolver_chose(images, monkeypatch):
    tokenizer, eigh = fitted(images), torch.linalg.eigh

    def negated(matrix):
        values, vectors = eigh(matrix)
        return torch.return_types.linalg_eigh((values, -vectors))

    monkeypatch.setattr(torch.linalg, "eigh", negated)
    torch.testing.assert_close(fitted(images).basis, tokenizer.basis)


def test_reconstruction_error_is_the_variance_of_dropped_axes(images):
    tokenizer = fitted(images)
    patches = patches_of(tokenizer, images)
    error = patches - tokenizer.inverse(tokenizer.project(patches))
    actual = error.square().sum(-1).mean()
    torch.testing.assert_close(actual, tokenizer.variances[6:].sum(), rtol=1e-6, atol=1e-9)


def test_whitened_patches_are_uncorrelated_with_unit_variance(images):
    """The first d are the latents of scale per-axis."""
    tokenizer = fitted(images)
    patches = patches_of(tokenizer, images)
    whitened = tokenizer.whiten(patches)
    covariance = whitened.flatten(0, 1).T.cov(correction=0)
    torch.testing.assert_close(covariance, torch.eye(48).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer.unwhiten(whitened), patches)
    torch.testing.assert_close(whitened[..., :6], tokenizer.project(patches))


def test_axes_without_variance_stay_small_when_whitened(images):
    """Rounding errors are not scaled up: the left half of each patch is of one colour."""
    images[..., torch.arange(32) % 4 < 2] = 100
    tokenizer = PatchPCA(32, 4, 3, 6, "per-axis")
    tokenizer.fit([images])
    patches = patches_of(tokenizer, images)
    whitened = tokenizer.whiten(patches)
    assert whitened[..., 24:].abs().max() < 1e-2
    spread = whitened[..., :24].flatten(0, 1).std(0)
    torch.testing.assert_close(spread, torch.ones(24), atol=1e-2, rtol=0)
    torch.testing.assert_close(tokenizer.unwhiten(whitened), patches, atol=1e-4, rtol=0)
    rounding = torch.rand(20_000, 48, generator=torch.Generator().manual_seed(0)) - 0.5
    level = (1 / (255 * tokenizer.pixel_std)).repeat_interleave(16)  # a grey level
    rounded = tokenizer.whiten(tokenizer.patch_mean + level * rounding)[:, 24:]
    torch.testing.assert_close(rounded.std(0), torch.ones(24), atol=2e-2, rtol=0)


@pytest.mark.parametrize("kind, dim", [(PatchPCA, 6), (PixelTokenizer, 12)])
def test_latents_have_the_variance_of_their_scale(images, kind, dim):
    """raw changes nothing, global gives unit mean variance, per-axis gives unit variance."""
    spread = {}
    for scale in ("raw", "global", "per-axis"):
        tokenizer = fitted(images, kind, dim, scale)
        z = tokenizer.encode(tokenizer.normalize(images)).flatten(0, 1)
        assert z.mean(0).abs().max() < 1e-5 or (kind, scale) == (PixelTokenizer, "raw")
        spread[scale] = z.var(0, unbiased=False)
    ones = torch.ones(dim).double()
    torch.testing.assert_close(spread["per-axis"], ones, rtol=1e-5, atol=0)
    torch.testing.assert_close(spread["global"].mean(), ones[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        spread["global"] / spread["global"].sum(), spread["raw"] / spread["raw"].sum()
    )


def test_pixel_statistics_match_the_images(images):
    tokenizer = fitted(images)
    pixels = images.double() / 255
    torch.testing.assert_close(tokenizer.pixel_mean, pixels.mean((0, 2, 3)), atol=1e-6, rtol=0)
    std = pixels.std((0, 2, 3), unbiased=False)
    torch.testing.assert_close(tokenizer.pixel_std, std, atol=1e-6, rtol=0)


def test_keeping_all_pixels_is_the_identity(images):
    tokenizer = fitted(images, PixelTokenizer, 48, "raw")
    x = tokenizer.normalize(images)
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(x)), x)
    torch.testing.assert_close(tokenizer.encode(x), patchify(x, 4))


def test_raw_pixels_are_the_image_in_the_range_of_the_given_statistics(images):
    """As DDPM's network sees them: one token for each pixel, with numbers in [-1, 1]."""
    tokenizer = PixelTokenizer(32, 1, 3, 3, "raw")
    tokenizer.fit([images], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    z = tokenizer.encode(tokenizer.normalize(images))
    torch.testing.assert_close(z, (images / 127.5 - 1).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("scale", ["global", "per-axis"])
def test_images_that_are_all_the_same_are_refused(scale):
    """Given statistics, no channel is found to be constant."""
    images = torch.full((8, 3, 32, 32), 77, dtype=torch.uint8)
    tokenizer = PatchPCA(32, 4, 3, 6, scale)
    with pytest.raises(InputError, match="^the images are all the same, so nothing can be learned"):
        tokenizer.fit([images], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_fewer_pixels_downsample_the_image(images):
    """Latents are the pixels of the averaged image, and decoding repeats them."""
    tokenizer = fitted(images, PixelTokenizer, 12, "raw")
    x = tokenizer.normalize(images)
    small = torch.nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(tokenizer.encode(x), patchify(small, 2))
    enlarged = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(x)), enlarged)


def test_damaged_file_or_file_of_another_tokenizer_is_refused(images, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    saved = fitted(images)
    tokenizers.save(saved, path)
    with pytest.raises(InputError, match="tokenizer.safetensors has dim 6, this run 7"):
        tokenizers.load(PatchPCA(32, 4, 3, 7, "per-axis"), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="tokenizer.safetensors is damaged"):
        tokenizers.load(saved, path)


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        (PatchPCA, (30, 4, 3, 6, "raw"), "data.img_size 30 .* model.patch_size 4"),
        (PatchPCA, (32, 4, 3, 49, "raw"), "tokenizer.dim 49 .* 48 dimensions"),
        (PatchPCA, (32, 4, 3, 0, "raw"), "tokenizer.dim 0"),
        (PixelTokenizer, (32, 4, 3, 7, "raw"), "tokenizer.dim 7 .* one of 3, 12, 48"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kind, arguments, message):
    with pytest.raises(InputError, match=message):
        kind(*arguments)
