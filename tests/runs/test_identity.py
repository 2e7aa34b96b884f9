"""A run knows its images: by the names of files, else by the fingerprint of the source."""

import os

import numpy as np

from ldae.commands.cache import cache
from ldae.data.open import open_source
from ldae.runs.identity import images_hashes, labels_hash


def hashes(spec) -> dict[str, str]:
    return images_hashes(open_source(str(spec), "train"))


def test_images_with_only_numbers_are_known_by_their_content(tmp_path):
    made = [hashes("scattered-digits:20:0"), hashes("scattered-digits:20:7")]
    cache("scattered-digits:20:0", tmp_path / "crops.safetensors", side=32, workers=0)
    assert hashes(tmp_path / "crops.safetensors") == made[0] != made[1]
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    np.savez(tmp_path / "b.npz", arr_0=pixels + 1)
    found = hashes(tmp_path / "a.npz")
    assert found != hashes(tmp_path / "b.npz")
    os.rename(tmp_path / "a.npz", tmp_path / "moved.npz")
    assert hashes(tmp_path / "moved.npz") == found


def test_named_files_are_known_wherever_they_lie(tmp_path):
    open_source("digits", "train").image(0).save(tmp_path / "000000.png")
    before = hashes(tmp_path)
    os.utime(tmp_path / "000000.png", (1, 1))
    assert hashes(tmp_path) == before
    os.rename(tmp_path / "000000.png", tmp_path / "000001.png")
    assert hashes(tmp_path) != before


def test_labels_are_known_by_their_classes():
    source = open_source("digits", "train")
    found = [labels_hash(source)]
    source.classes = [*source.classes[:-1], "nine"]
    found.append(labels_hash(source))
    source.labels[3] = 0
    assert len({*found, labels_hash(source)}) == 3
