"""Images and labels in a .npz file are read as they were written."""

import pickle
import zipfile

import numpy as np
import pytest

from ldae.data.open import open_source
from ldae.errors import InputError


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("chans", [1, 3, 5])
def test_images_and_labels_equal_the_arrays(save, chans, tmp_path):
    arrays, labels = pixels(7, 6, 8, chans), np.array([3, 1, 1, 9, 3, 3, 9])
    save(tmp_path / "a.npz", arrays, labels)
    source = open_source(str(tmp_path / "a.npz"), "train")
    for opened in (source, pickle.loads(pickle.dumps(source))):
        assert len(opened) == 7 and opened.split == "all"
        for i in range(7):
            assert np.array_equal(np.asarray(opened.image(i)).reshape(6, 8, chans), arrays[i])
    assert source.classes == ["1", "3", "9"] and source.labels.tolist() == [1, 0, 0, 2, 1, 1, 2]


def test_files_from_savez_are_read_in_place(tmp_path):
    """Also behind other arrays and in Fortran order; a pickled source has no pixels."""
    arrays = pixels(5, 16, 16, 3)
    np.savez(
        tmp_path / "a.npz", arr_1=np.arange(5), other=np.zeros(100), arr_0=np.asfortranarray(arrays)
    )
    source = open_source(str(tmp_path / "a.npz"), "eval")
    assert isinstance(source._open(), np.memmap)
    assert np.array_equal(np.stack([np.asarray(source.image(i)) for i in range(5)]), arrays)
    assert len(pickle.dumps(source)) < 1000


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3)}, "no array arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"float64 \(2, 4, 4, 3\), not uint8"),
        ({"arr_0": pixels(2, 4, 4)}, r"uint8 \(2, 4, 4\), not uint8 \(N, H, W, C\)"),
        ({"arr_0": pixels(0, 4, 4, 3)}, "not uint8"),
        ({"arr_0": np.array([{}], object)}, "not a readable .npz file"),
        ({"arr_0": pixels(2, 4, 4, 3), "arr_1": np.zeros(3, int)}, "not one label for each"),
    ],
)
def test_other_arrays_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path / "a.npz"), "train")


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "valid.npz", pixels(50, 8, 8, 3))
    valid = (tmp_path / "valid.npz").read_bytes()
    for number, content in enumerate([b"", b"text", valid[: len(valid) // 2]]):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{number}.npz is not a readable .npz file"):
            open_source(str(path), "train")
    np.savez_compressed(tmp_path / "packed.npz", pixels(50, 8, 8, 3))
    packed = (tmp_path / "packed.npz").read_bytes()
    method = packed.index(b"PK\1\2") + 10  # of packing, in the directory at the end
    for at, other in ((90, b"\xff" * 9), (method, b"\x63")):
        content = packed[:at] + other + packed[at + len(other) :]
        (tmp_path / "packed.npz").write_bytes(content)
        with pytest.raises(InputError, match="packed.npz is not a readable .npz file"):
            open_source(str(tmp_path / "packed.npz"), "train")
    np.savez(tmp_path / "labels.npz", pixels(3, 8, 8, 3), np.arange(3))
    with zipfile.ZipFile(tmp_path / "labels.npz") as file:
        arrays = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "labels.npz", "w") as file:
        for name, content in arrays.items():
            file.writestr(name, content if "0" in name else b"x" + content[1:])
    with pytest.raises(InputError, match="arr_1 of .*labels.npz is not one label for each"):
        open_source(str(tmp_path / "labels.npz"), "train")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(InputError, match="folder.npz contains no images"):
        open_source(str(tmp_path / "folder.npz"), "train")
