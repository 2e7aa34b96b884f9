"""Batches from a cache are those from its source, byte for byte."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from ldae.backbones.preprocessing import EvalTransform
from ldae.commands.cache import cache
from ldae.data import loader
from ldae.data.cached import CachedSource
from ldae.data.loader import train_batches
from ldae.data.open import open_source, open_splits
from ldae.data.transforms import CropTransform
from ldae.errors import InputError

SIDE = 24


@pytest.fixture
def photos(tmp_path):
    """A folder of images in many sizes and modes, in splits; a turned one too."""
    rng = np.random.default_rng(0)
    for number in range(150):
        split = "train" if number % 3 else "val"
        path = tmp_path / "photos" / split / f"größe {number % 4}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(SIDE, 70, 2)
        pixels = rng.integers(0, 256, (height, width, 4), np.uint8)
        image = Image.fromarray(pixels).convert(("RGB", "L", "RGBA", "P")[number % 4])
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation
        image.save(path, exif=exif if number % 5 == 0 else None)
    return tmp_path / "photos"


def cached(folder, **settings) -> str:
    out = folder.with_name("cache.safetensors")
    cache(str(folder), out, **({"side": SIDE, "workers": 0} | settings))
    return str(out)


def stream(spec, transform, **settings) -> list[loader.Batch]:
    how = {"seed": 3, "start": 0, "stop": 220, "batch_size": 12} | settings
    return list(train_batches(open_source(spec, "train"), transform, **how))


def assert_equal(batches, others) -> None:
    assert len(batches) == len(others) > 0
    for one, other in zip(batches, others, strict=True):
        for part, same in zip(one[:3], other[:3], strict=True):
            assert torch.equal(part, same)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_source(photos, in_chans, workers):
    """On any ranks, after a resume, and mirrored."""
    out = cached(photos, in_chans=in_chans, workers=workers)
    center = CropTransform(SIDE, in_chans, flip=True)
    assert not open_source(out, "train").resizes_twice(center)
    for how in ({}, {"start": 96}, {"rank": 1, "world_size": 3, "micro_batches": 2}):
        assert_equal(
            stream(out, center, **how, workers=workers), stream(str(photos), center, **how)
        )


def test_arrays_of_any_number_of_channels_are_cached(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 30, 40, 5), np.uint8)
    for number, array in enumerate(pixels):
        (tmp_path / "arrays").mkdir(exist_ok=True)
        np.save(tmp_path / "arrays" / f"{number}.npy", array)
    out = cached(tmp_path / "arrays", in_chans=5)
    assert open_source(out, "eval").labels is None
    for transform in (CropTransform(SIDE, 5), CropTransform(30, 5)):
        assert_equal(stream(out, transform), stream(out, transform, workers=2))
    same = CropTransform(SIDE, 5)
    assert_equal(stream(out, same), stream(str(tmp_path / "arrays"), same))


def test_the_source_is_the_same_in_all_but_the_pixels(photos):
    out = cached(photos)
    for one, other in zip(open_splits(out, None), open_splits(str(photos), None), strict=True):
        for copy in (one, pickle.loads(pickle.dumps(one))):
            assert isinstance(copy, CachedSource) and len(copy) == len(other) and copy.spec == out
            assert [copy.name(i) for i in range(len(copy))] == [
                other.name(i) for i in range(len(other))
            ]
            assert copy.classes == other.classes and copy.split == other.split
            assert copy.labels.tolist() == other.labels.tolist()
            assert copy.fingerprint() == other.fingerprint()
        assert len(pickle.dumps(one)) < 5000


def test_an_image_is_a_view_of_the_file(photos):
    image = open_source(cached(photos), "train").image(5)
    assert image.shape == (SIDE, SIDE, 3)
    assert not image.flags.owndata and not image.flags.writeable


def test_other_transforms_see_the_crops_as_images(photos):
    """They say that these are resized twice."""
    source, crop = open_source(cached(photos), "train"), CropTransform(SIDE)
    original = open_source(str(photos), "train")
    other = {"interpolation": "bicubic", "crop_mode": "center", "mean": 3 * (0.5,), "std": 3 * (1,)}
    for transform in (
        CropTransform(SIDE, crop="random"),
        CropTransform(SIDE - 4),
        CropTransform(SIDE, 1),
        EvalTransform((3, SIDE, SIDE), crop_pct=0.9, **other),
        EvalTransform((3, SIDE, SIDE), crop_pct=1.0, **other),
    ):
        assert source.resizes_twice(transform) and not original.resizes_twice(transform)
        for i in range(4):
            pixels = crop(original.image(i), np.random.default_rng(0)).permute(1, 2, 0).numpy()
            expected = transform(Image.fromarray(pixels), np.random.default_rng(i))
            assert torch.equal(transform(source.image(i), np.random.default_rng(i)), expected)


def test_a_file_of_another_kind_or_version_or_size_is_refused(photos, tmp_path):
    whole = open(cached(photos), "rb").read()
    for content, message in {
        whole[:-1]: "is truncated or damaged: it has",
        whole[:200]: "is no file of `ldae cache`, or its header is truncated",
        whole.replace(b'"version": "1"', b'"version": "2"'): "is a cache of version 2, and this",
        b"": "is no file of `ldae cache`",
        b"text" * 100: "is no file of `ldae cache`",
        (2).to_bytes(8, "little") + b"{}": "is no file of `ldae cache`",
        (2).to_bytes(8, "little") + b"[]": "is no file of `ldae cache`",
        whole.replace(b'"data_offsets"', b'"data_offsetz"', 1): "is damaged: its header does not",
        whole.replace(b'"train.labels"', b'"train.lebals"'): "is damaged: its header does not",
        whole.replace(b'\\"index\\"', b'\\"indes\\"'): "is damaged: its header does not",
        whole.replace(
            "größe 1/".encode(), "größe 2/".encode(), 1
        ): "is damaged: its names or labels",
    }.items():
        (tmp_path / "other.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=f"other.safetensors {message}"):
            open_source(str(tmp_path / "other.safetensors"), "train")


def test_safetensors_reads_the_file(photos):
    from safetensors.numpy import load_file

    out = cached(photos)
    arrays, source = load_file(out), open_source(out, "eval")
    assert np.array_equal(arrays["eval.images"][3], source.image(3).transpose(2, 0, 1))
    assert np.array_equal(arrays["eval.labels"], source.labels)
