"""Inception's features are torch-fidelity's, from weights that are read without running code."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldae.errors import InputError
from ldae.evals.features import Encoder
from ldae.evals.inception import Inception, InceptionTransform

fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file of random weights, as torch-fidelity names them."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_features_are_torch_fidelitys(weights, images):
    wanted = fidelity.FeatureExtractorInceptionV3(
        "own", ["2048"], feature_extractor_weights_path=str(weights)
    )
    encoder = Encoder(Inception(weights), torch.device("cpu"), transform=InceptionTransform(32))
    found = encoder(images[:3])
    assert found.shape == (3, 2048) and found.std() > 0
    assert torch.equal(found, wanted(images[:3])[0])


def test_the_file_is_named_by_its_hash(weights):
    network = Inception(weights)
    assert network.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert network.file == "random.pth"


def test_weights_may_be_safetensors(weights, images, tmp_path):
    save_file(torch.load(weights, weights_only=True), tmp_path / "a.safetensors")
    found, wanted = (Inception(file)(images[:1]) for file in (tmp_path / "a.safetensors", weights))
    assert torch.equal(found, wanted)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Bomb()}, "bomb.pth")
    with pytest.raises(InputError, match="bomb.pth holds pickled code, which is not run here"):
        Inception(Path("bomb.pth"))
    assert not Path("exploded").exists()


def test_torch_fidelity_never_opens_the_file(weights, monkeypatch):
    calls, load = [], torch.load

    def spy(file, *args, weights_only, **kwargs):
        calls.append((isinstance(file, (str, Path)), weights_only))
        return load(file, *args, weights_only=weights_only, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    Inception(weights)
    assert calls == [(True, True), (False, False)]


@pytest.mark.parametrize("content", [{"a": torch.ones(2)}, [1, 2], torch.ones(3), {}])
def test_other_weights_are_told(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth does not hold the weights of torch-fidelity"):
        Inception(tmp_path / "other.pth")


def test_missing_file_is_told(tmp_path):
    with pytest.raises(InputError, match="no checkpoint file .*none.pth"):
        Inception(tmp_path / "none.pth")


def test_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # makes the import fail
    with pytest.raises(InputError, match=r"pip install 'ldae\[fid\]'"):
        Inception(None)


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("invalid hash value")])
def test_failed_download_is_told_with_the_way_around(error, tmp_path, monkeypatch):
    def fail(url, file, hash_prefix, progress):
        assert hash_prefix == "6726825d" and file.startswith(str(tmp_path))
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(InputError, match=f"cannot be downloaded .{error}.: .*--weights"):
        Inception(None)


def test_downloaded_file_is_read_as_carefully(weights, tmp_path, monkeypatch):
    def download(url, file, hash_prefix, progress):
        Path(file).write_bytes(weights.read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    first = Inception(None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # the file is there now
    assert Inception(None).sha256 == first.sha256
    torch.save({"weight": Bomb()}, tmp_path / "hub" / "checkpoints" / first.file)
    with pytest.raises(InputError, match="pickled code"):
        Inception(None)
