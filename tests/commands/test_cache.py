"""A cache is written whole, from wherever the last start ended, and a damaged one is found."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from ldae import tokenizers
from ldae.commands.cache import cache
from ldae.commands.knn import knn
from ldae.commands.pretrain import pretrain
from ldae.data.cache_file import BLOCK, CacheFile, open_cache
from ldae.data.image import BadImage
from ldae.data.loader import train_batches
from ldae.data.open import open_source
from ldae.data.transforms import CropTransform
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.neighbours import KNNProtocol
from ldae.method import LDAE, build_tokenizer
from ldae.runs import lock
from ldae.runs.checkpoints import Checkpoints
from ldae.train.interrupt import Interrupted

HOW = {"side": 16, "workers": 0}
SOURCE = "scattered-digits:300"


@pytest.fixture
def folder(tmp_path):
    """A folder with 150 images of two classes."""
    source = open_source("scattered-digits:150", "train")
    for i in range(150):
        path = tmp_path / "folder" / str(i % 2) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.image(i).save(path)
    return tmp_path / "folder"


def partial_of(out):
    return out.with_name(out.name + ".partial")


def blocks_written(monkeypatch, stop_after: int | None = None) -> list[tuple[str, int]]:
    """Return the list of the blocks that are written from now on; then Ctrl-C, if asked for."""
    written, original = [], CacheFile.write_block

    def write_block(self, file, split, first, bad, images):
        if len(written) == stop_after:
            raise KeyboardInterrupt
        original(self, file, split, first, bad, images)
        written.append((split, first))

    monkeypatch.setattr(CacheFile, "write_block", write_block)
    return written


@pytest.mark.parametrize("stop_after", [0, 1, 4, 7])
def test_the_same_command_resumes_and_writes_the_same_file(stop_after, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    cache(SOURCE, whole, **HOW)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        blocks_written(patch, stop_after)
        cache(SOURCE, parts, **HOW)
    assert not parts.exists() and partial_of(parts).exists()
    written = blocks_written(monkeypatch)
    cache(SOURCE, parts, **HOW)
    assert parts.read_bytes() == whole.read_bytes() and not partial_of(parts).exists()
    assert len(written) == -(-300 // BLOCK) + -(-5000 // BLOCK) - stop_after


KILLED = """
import os, signal, sys
from ldae import cli
from ldae.data import cache_file
count, original = 0, cache_file.CacheFile.write_block

def write_block(*args):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    original(*args)

cache_file.CacheFile.write_block = write_block
cli.main(sys.argv[1:])
"""


def test_a_killed_command_resumes_at_once(tmp_path):
    """Its workers live on for some seconds."""
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    cache(SOURCE, whole, **HOW)
    argv = [sys.executable, "-c", KILLED, "cache", SOURCE, str(parts), "--side", "16"]
    done = subprocess.run([*argv, "--workers", "2"], capture_output=True)
    assert done.returncode == -signal.SIGKILL and not parts.exists()
    assert 0 <= open_cache(partial_of(parts)).arrays["train"]["checksums"][1]
    cache(SOURCE, parts, side=16, workers=2)
    assert parts.read_bytes() == whole.read_bytes()


def test_an_index_that_was_not_written_to_the_end_is_written_again(tmp_path):
    out = tmp_path / "a.safetensors"
    cache(SOURCE, out, **HOW)
    whole = out.read_bytes()
    out.unlink()
    partial_of(out).write_bytes(bytes(8) + whole[8:300])
    cache(SOURCE, out, **HOW)
    assert out.read_bytes() == whole


def test_a_finished_block_that_the_disk_lost_is_written_again(folder, tmp_path, monkeypatch):
    out = tmp_path / "a.safetensors"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        blocks_written(patch, 2)
        cache(str(folder), out, **HOW)
    held = open_cache(partial_of(out))
    flip(partial_of(out), held._places["all", "images"] + BLOCK * 3 * 16 * 16)
    written = blocks_written(monkeypatch)
    cache(str(folder), out, **HOW)
    assert written == [("all", BLOCK), ("all", 2 * BLOCK)]


@pytest.fixture
def tokenizer(tiny, images, fitted, tmp_path):
    """The run folder of a conv tokenizer of 32 x 32 images."""
    path = tmp_path / "fit" / "tokenizer.safetensors"
    tokenizers.save(fitted(build_tokenizer(tiny("dit"))), path)
    return path.parent


@pytest.mark.parametrize("stop_after", [0, 2])
def test_latents_resume_too(stop_after, tokenizer, tmp_path, monkeypatch, capsys):
    how = {"latents": tokenizer, "workers": 0}
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    cache("scattered-digits:150", whole, **how)
    assert "150 latents (train) of 2 x 16 x 8" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        blocks_written(patch, stop_after)
        cache("scattered-digits:150", parts, **how)
    assert not parts.exists() and partial_of(parts).exists()
    written = blocks_written(monkeypatch)
    cache("scattered-digits:150", parts, **how)
    assert parts.read_bytes() == whole.read_bytes() and len(written) == 3 - stop_after
    cache(str(whole), check=True)
    flip(whole, open_cache(whole)._places["train", "latents"] + 149 * 2 * 16 * 8 * 2)
    with pytest.raises(InputError, match="differs for images 128 to 149 of train"):
        cache(str(whole), check=True)
    before = parts.read_bytes()
    cache("scattered-digits:150", parts, **how)
    assert parts.read_bytes() == before and "done before" in capsys.readouterr().out


def test_other_latents_are_refused(tokenizer, tiny, fitted, tmp_path):
    latents, crops = tmp_path / "latents.safetensors", tmp_path / "crops.safetensors"
    other = tmp_path / "other.safetensors"
    for row, seed in (("dit", 1), ("l_dae", 0)):
        path = tmp_path / f"{row}.safetensors"
        tokenizers.save(fitted(build_tokenizer(tiny(row, seed=seed))), path)
    cache("scattered-digits:150", latents, latents=tokenizer / "tokenizer.safetensors", workers=0)
    cache("scattered-digits:150", crops, split="train", **HOW)
    how = {"latents": tokenizer, "workers": 0}
    for source, out, changes, message in (
        (150, latents, {"latents": tmp_path / "dit.safetensors"}, "other latents: tokenizer is"),
        (150, crops, {}, "crops.safetensors holds images, not latents: delete it or name another"),
        (150, latents, {"latents": None}, "latents.safetensors holds latents, not images: delete"),
        (151, latents, {}, "was written from other images than scattered-digits:151 has now"),
        (150, other, {"latents": tmp_path / "l_dae.safetensors"}, "needs tokenizer.name conv_vae"),
        (150, other, {"latents": tmp_path}, "there is no tokenizer file .*/tokenizer.safetensors"),
        (150, other, {"side": 32}, "--side, --in-chans and --split cannot be set beside --latents"),
        (150, other, {"latents": None, "device": "cpu"}, "--device is where latents are computed"),
        (150, other, {"device": "gpu"}, "device"),
    ):
        with pytest.raises(InputError, match=message):
            cache(f"scattered-digits:{source}", out, **how | changes)
    assert not other.exists() and not partial_of(other).exists()


def flip(path, place) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_check_finds_a_changed_bit_anywhere(folder, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    cache(str(folder), out, **HOW)
    cache(str(out), check=True)
    assert "150 images of 3 x 16 x 16" in capsys.readouterr().out
    held, places = open_cache(out), open_cache(out)._places
    for name, array in held.arrays["all"].items():
        for place in (places["all", name], places["all", name] + array.nbytes - 1):
            flip(out, place)
            with pytest.raises(InputError, match=r"a\.safetensors is damaged .* of all"):
                cache(str(out), check=True)
            flip(out, place)
    flip(out, places["all", "images"] + 149 * 3 * 16 * 16)
    with pytest.raises(InputError, match="differs for images 128 to 149 of all"):
        cache(str(out), check=True)


def test_a_finished_cache_stays_as_it_is(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.safetensors"
    cache(str(folder), out, **HOW)
    written = blocks_written(monkeypatch)
    cache(str(folder), out, **HOW)
    assert not written and "done before" in capsys.readouterr().out


@pytest.mark.parametrize("stop_after", [1, None])
def test_other_images_or_crops_are_refused(stop_after, folder, tmp_path, monkeypatch):
    """Beside a finished cache, and beside one that was begun."""
    out = tmp_path / "a.safetensors"
    with monkeypatch.context() as patch:
        blocks_written(patch, stop_after)
        with pytest.raises(KeyboardInterrupt) if stop_after else monkeypatch.context():
            cache(str(folder), out, **HOW)
    before = [path.read_bytes() for path in sorted(tmp_path.glob("a.*"))]
    with pytest.raises(InputError, match="holds other crops: side is 16 there, 8 here"):
        cache(str(folder), out, side=8, workers=0)
    with pytest.raises(InputError, match="holds other crops: in_chans is 3 there, 1 here"):
        cache(str(folder), out, in_chans=1, **HOW)
    with pytest.raises(InputError, match="holds other crops: split is all there, train and eval"):
        cache(SOURCE, out, **HOW)
    (folder / "0" / "000.png").unlink()
    with pytest.raises(InputError, match="was written from other images than .*folder has now"):
        cache(str(folder), out, **HOW)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("a.*"))] == before


def test_wrong_arguments_are_refused(folder, tmp_path):
    out = tmp_path / "a.safetensors"
    for arguments, settings, message in (
        ((SOURCE,), {}, "name the file to write, which ends in .safetensors"),
        ((SOURCE, tmp_path / "a.cache"), {}, "name the file to write, which ends in .safetensors"),
        ((SOURCE, out), {"check": True}, "--check takes only the cache"),
        ((SOURCE,), {"check": True, "side": 64}, "--check takes only the cache .* not --side"),
        ((SOURCE, out), {"workers": -1}, "workers must be at least 0"),
        ((SOURCE, out), {"side": 0}, "img_size and in_chans must be at least 1"),
        ((str(tmp_path / "no"),), {"check": True}, "no cannot be read: No such file"),
    ):
        with pytest.raises(InputError, match=message):
            cache(*arguments, **settings)
    cache(SOURCE, out, split="train", **HOW)
    assert list(open_cache(out).splits) == ["train"]
    with pytest.raises(InputError, match="is a cache: name the source"):
        cache(str(out), tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="has no evaluation split"):
        knn("pixels", str(out), setup=Setup(device="cpu"))


def test_a_bad_image_stops_or_is_bad_in_the_cache_too(folder, tmp_path):
    (folder / "1" / "101.png").write_bytes(b"bad")
    out = tmp_path / "a.safetensors"
    with pytest.raises(BadImage, match=r"folder/1/101\.png cannot be decoded"):
        cache(str(folder), out, **HOW)
    cache(str(folder), out, bad_images="skip", side=16, workers=2)
    how = {"seed": 0, "start": 0, "stop": 300, "batch_size": 50, "bad_images": "skip"}
    for one, other in zip(
        *(
            train_batches(open_source(str(s), "train"), CropTransform(16), **how)
            for s in (out, folder)
        )
    ):
        assert one.images.equal(other.images) and one.positions.equal(other.positions)
        assert [name for name, _ in one.bad] == [name for name, _ in other.bad]
    with pytest.raises(BadImage, match="101.png could not be decoded when the cache was written"):
        list(train_batches(open_source(str(out), "train"), CropTransform(16), **how | STOP))


STOP = {"bad_images": "stop"}


def test_a_full_disk_is_one_sentence(folder, tmp_path, monkeypatch):
    out = tmp_path / "a.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(
            InputError, match="a.safetensors needs .* MB more, and its disk has 0 MB"
        ):
            cache(str(folder), out, **HOW)

    def full(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(CacheFile, "write_block", full)
        with pytest.raises(InputError, match="a.safetensors cannot be written: No space left"):
            cache(str(folder), out, **HOW)
    cache(str(folder), out, **HOW)


def test_another_process_may_not_write_the_same_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "try_lock", lambda fd: False)
    with pytest.raises(InputError, match="a.safetensors is being written by another process"):
        cache(str(folder), tmp_path / "a.safetensors", **HOW)


def test_a_run_resumes_with_the_cache_in_place_of_the_folder(folder, tmp_path, tiny, interrupts):
    """It ends with the weights of a run on the folder, and its record says what it saw."""
    out = tmp_path / "a.safetensors"
    cache(str(folder), out, side=32, workers=0)
    begun = {"data.source": str(folder), "data.flip": True}
    pretrain(tiny(**begun), tmp_path / "whole", "l_dae")
    interrupts(LDAE, 5)
    with pytest.raises(Interrupted):
        pretrain(tiny(**begun), tmp_path / "parts", "l_dae")
    pretrain(tiny(**begun | {"data.source": str(out)}), tmp_path / "parts", "l_dae")
    whole, parts = (Checkpoints(tmp_path / run).load() for run in ("whole", "parts"))
    assert all(whole["model"][name].equal(parts["model"][name]) for name in whole["model"])
    assert parts["describe"]["resized twice"] is False


def test_a_run_does_not_go_on_with_images_that_are_resized_twice(
    folder, tmp_path, tiny, interrupts, capsys
):
    out = tmp_path / "a.safetensors"
    cache(str(folder), out, side=32, workers=0)
    random = {"data.source": str(folder), "data.crop": "random"}
    interrupts(LDAE, 5)
    with pytest.raises(Interrupted):
        pretrain(tiny(**random), tmp_path / "run", "l_dae")
    random["data.source"] = str(out)
    with pytest.raises(InputError, match="resized twice was False then, and is True now"):
        pretrain(tiny(**random), tmp_path / "run", "l_dae")
    pretrain(tiny(**random), tmp_path / "other", "l_dae")
    assert "images, resized twice, in" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "other").load()["describe"]["resized twice"] is True


def test_the_record_of_a_grading_says_that_images_were_resized_twice(folder, tmp_path):
    out = tmp_path / "a.safetensors"
    cache(str(folder), out, **HOW)
    records = {
        source: knn(
            "pixels:8",
            str(source),
            protocol=KNNProtocol(k=(5,), leave_one_out=True),
            setup=Setup(device="cpu", workers=0, out=tmp_path / "knn" / source.name),
        )["data"]
        for source in (folder, out)
    }
    assert [record["resized_twice"] for record in records.values()] == [False, True]
    assert records[folder]["fingerprint"] == records[out]["fingerprint"]
