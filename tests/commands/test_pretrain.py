"""A pre-training is the same when interrupted, killed or divided over ranks."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from written import assert_equal, lines, weights

import ldae
from ldae import cli, distributed, tree
from ldae.commands.knn import knn
from ldae.commands.pretrain import pretrain
from ldae.data.loader import epoch_order
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.neighbours import KNNProtocol
from ldae.method import LDAE
from ldae.runs import kinds
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.identity import FINGERPRINT
from ldae.train.interrupt import Interrupted


@pytest.fixture
def folder(tmp_path):
    """A flat folder of 24 images."""
    path = tmp_path / "images"
    path.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 36, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{number:02}.png")
    return path


@pytest.mark.parametrize(
    "row", ["l_dae", "l_dae_single", "patch_pca", "predict_latent", "l_dae_masked"]
)
def test_a_run_writes_its_files(row, tiny, tmp_path, capsys):
    run = tmp_path / "run"
    config = tiny(row, system__log_every=4, optim__epochs=3)
    pretrain(config, run, row)
    left = {path.name for path in run.iterdir()}
    assert left == {
        "config.yaml", "environment.json", "tokenizer.safetensors", "metrics.jsonl",
        "checkpoints", "filters.png", "denoised.png", "reconstruction.json", "reconstructed.png",
    }  # fmt: skip
    resolved = tree.replace(config, {"tokenizer.scale": "per-axis"})  # auto of patch_pca
    assert kinds.settings_of(run, "pretraining") == resolved
    records = lines(run)
    assert records[-1]["images"] == 192
    if row.startswith("l_dae"):  # predicting eps better than by 0 takes longer
        assert records[-1]["loss"] < records[0]["loss"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == metadata.version("torch")
    assert environment["device"] == "cpu" and "git" in environment
    assert Image.open(run / "denoised.png").size[1] > 3 * 64
    before = weights(run)
    capsys.readouterr()
    pretrain(config, run, row)  # a finished run stays as it is
    assert_equal(weights(run), before)
    assert lines(run) == records


def test_a_flat_folder_without_labels_trains(folder, tiny, tmp_path):
    pretrain(tiny(data__source=str(folder)), tmp_path / "run", "l_dae")
    assert lines(tmp_path / "run")[-1]["images"] == 24


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        ("l_dae", {}),
        ("l_dae_masked", {}),
        ("l_dae_masked", {"features__share": 0.5}),
        ("ddpm", {"unet__dropout": 0.1}),
    ],
)
def test_interrupted_equals_uninterrupted(row, changes, tiny, tmp_path, interrupts):
    """The run gets Ctrl-C after a few steps, twice."""
    config = tiny(row, optim__epochs=2, system__log_every=3, optim__ema=0.9, **changes)
    pretrain(config, tmp_path / "whole", row)
    run = tmp_path / "parts"
    interrupts(LDAE, 4, 9)
    for seen in (32, 72):
        with pytest.raises(Interrupted, match=f"stopped at image {seen} of 128") as stopped:
            pretrain(config, run, row)
        assert stopped.value.exit_status == 130
    pretrain(config, run, row)
    whole, parts = (Checkpoints(path).load() for path in (tmp_path / "whole", run))
    assert_equal(parts["model"], whole["model"])
    assert_equal(parts["average"], whole["average"])
    assert [line["images"] for line in lines(run)] == [
        line["images"] for line in lines(tmp_path / "whole")
    ]


def command(run, *launcher, **changes):
    """Return the command line of a tiny run; its settings lie beside the run folder."""
    given = TINY | {"optim.epochs": 4, "system.save_minutes": 0, "system.log_every": 1} | changes
    config = tree.replace(ldae.config("l_dae"), given)
    file = run.with_suffix(".yaml")
    file.write_text(tree.to_yaml(config))
    python = [sys.executable, "-m", *launcher]
    return [*python, "ldae", "pretrain", str(file), "--run", str(run)]


# Without --, torchrun takes --run for an abbreviation of its own option.
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--")


def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(tiny, fork, tmp_path):
    """The run gets kill -9 while it trains or saves, with data workers."""
    config = tiny(
        data__source="scattered-digits:100",
        optim__epochs=4,
        system__workers=1,
        system__save_minutes=0,
        system__log_every=1,
    )
    whole, run = tmp_path / "whole", tmp_path / "killed"
    pretrain(config, whole, "l_dae")
    for _ in range(2):
        begun = (Checkpoints(run).load() or {"images_seen": 0})["images_seen"]
        process = fork.Process(target=pretrain, args=(config, run, "l_dae"))
        process.start()
        while process.is_alive() and seen(run) <= begun:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.join()
    pretrain(config, run, "l_dae")
    assert_equal(weights(run), weights(whole))
    for name in ("images", "loss", "lr"):
        assert [line[name] for line in lines(run)] == [line[name] for line in lines(whole)]


def seen(run):
    """Return the images seen in the last line of the metrics."""
    return lines(run)[-1]["images"] if (run / "metrics.jsonl").exists() and lines(run) else 0


def assert_close(run, other):
    one, two = weights(run), weights(other)
    for state in (one, two):  # grey digits: axes without variance are any basis of their space
        state["tokenizer.basis"] = state["tokenizer.basis"][:6]
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5, msg=name)
    for alone, shared in zip(lines(run), lines(other), strict=True):
        assert shared["images"] == alone["images"]
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def half(run, to):
    """Copy a run and delete the checkpoints of the second half."""
    shutil.copytree(run, to)
    for path in Checkpoints(to).paths():
        if path.name > "images-000000000032.pt":
            path.unlink()
    return to


def test_two_gloo_ranks_equal_one_and_resume_each_other(tiny, tmp_path, on_ranks):
    """To fp32 tolerance. First replicas by torchrun, to which --devices is equal bit for bit; then
    shards with accumulation, which resume the run of one rank."""
    changes = {"optim.epochs": 1, "optim.blr": 1e-3, "tokenizer.fit_images": 32, "system.keep": 0}
    one, two, devices = (tmp_path / name for name in ("one", "two", "devices"))
    subprocess.run(command(two, *TORCHRUN, **changes), check=True, capture_output=True)
    same = [*command(devices, **changes), "--devices", "2"]
    subprocess.run(same, check=True, capture_output=True)
    assert_equal(weights(devices), weights(two))
    config = kinds.settings_of(two, "pretraining")
    pretrain(config, one, "l_dae")
    assert_close(one, two)
    pretrain(config, half(two, tmp_path / "two then one"), "l_dae")
    assert_close(one, tmp_path / "two then one")
    shares = {"system.fsdp": True, "system.device_batch": 2, "system.knn_every": 1}
    resumed = half(one, tmp_path / "one then two")
    assert on_ranks(lambda: pretrain(tree.replace(config, shares), resumed, "l_dae")) == ["", ""]
    assert 0 < lines(resumed)[-1].pop("top1_k20") < 100
    assert_close(one, resumed)
    assert (resumed / "denoised.png").read_bytes()


def test_ctrl_c_stops_two_ranks_as_it_stops_one(tmp_path):
    """The launcher alone gets it, as from `kill`. All is saved, and one sentence says so."""
    run = tmp_path / "run"
    argv = [*command(run, **{"optim.epochs": 1000}), "--devices", "2"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and seen(run) < 16:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    saved = Checkpoints(run).load()["images_seen"]
    assert process.returncode == 130 and saved == seen(run)
    said = [line for line in err.splitlines() if line.strip() and "statistics:" not in line]
    assert said == [
        f"ldae: stopped at image {saved:,} of 64,000; all progress is saved, and the same command "
        "resumes here"
    ]


def test_two_ranks_equal_one_with_a_feature_target(tiny, tmp_path, on_ranks):
    """As replicas, then as shards with accumulation, which resume the run of one rank."""
    config = tiny("l_dae_masked", features__share=0.5, optim__blr=1e-3, system__keep=0)
    changes = {"tokenizer.fit_images": 32, "system.save_minutes": 0, "system.log_every": 1}
    config = tree.replace(config, changes)
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain(config, one, "l_dae_masked")
    assert on_ranks(lambda: pretrain(config, two, "l_dae_masked")) == ["", ""]
    assert_close(one, two)
    shards = tree.replace(config, {"system.fsdp": True, "system.device_batch": 2})
    resumed = half(one, tmp_path / "one then two")
    assert on_ranks(lambda: pretrain(shards, resumed, "l_dae_masked")) == ["", ""]
    assert_close(one, resumed)
    average = {name for name in weights(one) if name.startswith("feature_target.")}
    assert average and lines(one)[-1].keys() >= {"denoising", "features"}


@pytest.mark.parametrize("row", ["l_dae", "l_dae_masked"])
def test_accumulation_equals_the_full_batch(row, tiny, tmp_path):
    pretrain(tiny(row, optim__blr=1e-3), tmp_path / "whole", row)
    pretrain(tiny(row, optim__blr=1e-3, system__device_batch=2), tmp_path / "parts", row)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-5, msg=name)


def test_an_incomplete_launch_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="incomplete, missing .*MASTER_ADDR"):
        with distributed.process_group(torch.device("cpu")):
            pass


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny, tmp_path, capsys):
    pretrain(tiny(), tmp_path / "run", "l_dae", dry_run=True)
    out = capsys.readouterr().out
    for part in (
        "blr: 0.01",
        "parameters",
        "tokens per image  16",
        "8 of 8 images, 64 images seen",
    ):
        assert part in out
    assert not (tmp_path / "run").exists()


def test_a_bad_image_stops_the_run_or_is_skipped_and_counted(folder, tiny, tmp_path):
    config = tiny(data__source=str(folder), tokenizer__fit_images=8, system__log_every=1)
    pretrain(config, tmp_path / "fits", "l_dae")
    tokenizer = str(tmp_path / "fits" / "tokenizer.safetensors")
    good = (folder / "11.png").read_bytes()
    (folder / "11.png").write_bytes(good[:100])
    config = tree.replace(config, {"tokenizer.path": tokenizer})
    with pytest.raises(InputError, match="11.png"):
        pretrain(config, tmp_path / "stops", "l_dae")
    skips = tree.replace(config, {"data.bad_images": "skip"})
    pretrain(skips, tmp_path / "skips", "l_dae")
    assert sum(line["skipped"] for line in lines(tmp_path / "skips")) == 1
    assert lines(tmp_path / "skips")[-1]["images"] == 24
    # Once the image is mended, the stopped run goes on.
    (folder / "11.png").write_bytes(good)
    pretrain(config, tmp_path / "stops", "l_dae")
    assert lines(tmp_path / "stops")[-1]["images"] == 24


def test_skipped_images_are_named_once_over_epochs_stops_and_ranks(
    folder, tiny, tmp_path, interrupts, on_ranks
):
    config = tiny(data__source=str(folder), tokenizer__scale="per-axis", optim__epochs=2)
    pretrain(config, tmp_path / "fits", "l_dae")
    tokenizer = str(tmp_path / "fits" / "tokenizer.safetensors")
    config = tree.replace(config, {"tokenizer.path": tokenizer, "data.bad_images": "skip"})
    run, order = tmp_path / "run", epoch_order(config.seed, 0, 24)
    early, late = (f"{order[place]:02}.png" for place in (3, 12))
    for name in (early, late):
        (folder / name).write_bytes(b"")
    interrupts(LDAE, 1)
    with pytest.raises(Interrupted, match="at image 8 of 48"):
        pretrain(config, run, "l_dae")
    skipped = json.loads((run / "skipped.json").read_text())
    assert skipped.keys() == {early} and f"{folder}/{early} cannot be" in skipped[early]
    assert on_ranks(lambda: pretrain(config, run, "l_dae")) == ["", ""]
    resumed = json.loads((run / "skipped.json").read_text())
    assert resumed.keys() == {early, late} and resumed[early] == skipped[early]
    assert sum(line["skipped"] for line in lines(run)) == 4  # both in each epoch


def test_a_bad_evaluation_image_stops_the_run_or_is_skipped_and_named(folder, tiny, tmp_path):
    """It is read after the fit of the tokenizer, which is not lost."""
    for split, numbers in (("train", range(18)), ("val", range(18, 24))):
        (folder / split).mkdir()
        for number in numbers:
            (folder / f"{number:02}.png").rename(folder / split / f"{number:02}.png")
    (folder / "val" / "20.png").write_bytes(b"")
    config, run = tiny(data__source=str(folder)), tmp_path / "run"
    with pytest.raises(InputError, match="val/20.png"):
        pretrain(config, run, "l_dae")
    assert not (run / "reconstruction.json").exists()
    pretrain(tree.replace(config, {"data.bad_images": "skip"}), run, "l_dae")
    assert json.loads((run / "skipped.json").read_text()).keys() == {"val/20.png"}


def test_evaluation_images_are_looked_for_before_anything_is_fitted(folder, tiny, tmp_path):
    config = tiny("patch_ae", data__source=str(folder), data__eval_source="nowhere")
    with pytest.raises(InputError, match="nowhere"):
        pretrain(config, tmp_path / "run", "patch_ae")
    assert not (tmp_path / "run").exists()


def test_the_metrics_hold_online_knn(tiny, tmp_path):
    config = tiny(system__knn_every=1, optim__epochs=2)
    config = tree.replace(config, {"data.source": "scattered-digits:64"})
    pretrain(config, tmp_path / "run", "l_dae")
    graded = [line for line in lines(tmp_path / "run") if "top1_k20" in line]
    assert [line["images"] for line in graded] == [64, 128]
    assert all(0 < line["top1_k20"] < 100 for line in graded)


@pytest.mark.parametrize("eval_source", ["", "scattered-digits:40"])
def test_online_knn_of_a_run_without_labels_has_labelled_images_of_its_own(
    eval_source, tiny, pictures, tmp_path
):
    source, unlabelled = pictures(24), tmp_path / "unlabelled"
    for i in range(24):
        path = unlabelled / ("train" if i < 16 else "val") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.image(i).save(path)
    config = tiny(data__source=str(unlabelled), data__eval_source=eval_source, system__knn_every=1)
    with pytest.raises(InputError, match="unlabelled .* has no labels: .* by system.knn_source"):
        pretrain(config, tmp_path / "run", "l_dae")
    pretrain(
        tree.replace(config, {"system.knn_source": "scattered-digits:64"}),
        tmp_path / "run",
        "l_dae",
    )
    setup = Setup(workers=0, device="cpu")
    images = ("scattered-digits:64", eval_source or None)
    record = knn(str(tmp_path / "run"), *images, protocol=KNNProtocol(k=(20,)), setup=setup)
    expected = record["results"]["top1_k20"]
    assert lines(tmp_path / "run")[-1]["top1_k20"] == pytest.approx(expected)


def test_online_knn_refuses_images_that_it_cannot_grade_on(tiny, data, tmp_path):
    whole = str(data / "train")
    config = tiny(data__source=whole, data__eval_source=whole, system__knn_every=1)
    with pytest.raises(InputError, match="are those to learn from: .* data.eval_source"):
        pretrain(config, tmp_path / "run", "l_dae")
    skips = tree.replace(config, {"data.bad_images": "skip"})
    with pytest.raises(InputError, match="set system.knn_source to images that can all be decoded"):
        pretrain(skips, tmp_path / "run", "l_dae")


def test_a_run_folder_of_another_run_is_refused(tiny, tmp_path):
    run = tmp_path / "run"
    pretrain(tiny(), run, "l_dae")
    with pytest.raises(InputError, match="tokenizer.dim is 6 there, 7 here"):
        pretrain(tiny(tokenizer__dim=7), run, "l_dae")
    pretrain(tiny(system__log_every=3), run, "l_dae")  # settings of the execution may change
    pretrain(tiny(data__bad_images="skip"), run, "l_dae")
    with pytest.raises(InputError, match="images was 64 then, and is 65 now"):
        moved = tmp_path / "moved"
        shutil.copytree(run, moved)
        config = tiny(data__source="scattered-digits:65", tokenizer__scale="per-axis")
        (moved / "config.yaml").write_text(kinds.to_yaml(config, "pretraining"))
        pretrain(config, moved, "l_dae")
    (run / "config.yaml").write_text("")
    with pytest.raises(InputError, match="run is damaged: its config.yaml is empty"):
        pretrain(tiny(), run, "l_dae")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="full holds other files and no run: name an empty"):
        pretrain(tiny(), tmp_path / "full", "l_dae")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        pretrain(tiny(), tmp_path / "file", "l_dae")


def test_a_refused_run_goes_on_in_another_folder_with_its_own_network(tiny, tmp_path):
    run, longer = tmp_path / "run", tmp_path / "longer"
    pretrain(tiny(), run, "l_dae")
    advice = f"{run}/config.yaml in the place of the row with --init-from {run} to go on"
    with pytest.raises(InputError, match=f"here; name another --run, and {advice}"):
        pretrain(tiny(optim__epochs=2), run, "l_dae")
    start = ["pretrain", f"{run}/config.yaml", "--init-from", str(run), "--run", str(longer)]
    assert cli.main([*start, "--optim.epochs", "2"]) == 0
    settings = [kinds.settings_of(folder, "pretraining") for folder in (run, longer)]
    given = {"data.mean", "data.std", "model.mlp_ratio"}  # by the start, where the run had defaults
    assert tree.difference(*settings).keys() == given | {"init_from", "optim.epochs"}


def test_a_run_that_began_with_other_classes_is_refused_in_a_short_sentence(tiny, tmp_path):
    pretrain(tiny(), tmp_path / "run", "l_dae")
    (path,) = Checkpoints(tmp_path / "run").paths()
    state = torch.load(path, weights_only=True)
    state["describe"]["classes"] = [f"class {number}" for number in range(1000)]
    torch.save(state, path)
    message = (
        "began with other images or labels: classes was .* then, and is .* now; .* --init-from"
    )
    with pytest.raises(InputError, match=message) as refused:
        pretrain(tiny(), tmp_path / "run", "l_dae")
    assert len(str(refused.value)) < 700


def test_a_run_folder_in_use_is_refused(tiny, tmp_path, on_ranks):
    """Two processes are started on one run folder."""
    run = tmp_path / "run"

    def start():  # not as ranks of one run
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name)
        pretrain(tiny(optim__epochs=10), run, "l_dae")

    errors = on_ranks(start)
    assert "" in errors
    if errors != ["", ""]:  # else one had ended before the other began
        (refused,) = filter(None, errors)
        # The holder may not have written its name yet.
        holder = r"(process \d+ on \S+, since|another process; stop it first)"
        assert re.match(rf"InputError: run folder {run} is in use by {holder}", refused)
    assert lines(run)[-1]["images"] == 10 * 64
    assert not list(run.rglob("*.partial"))


def test_the_images_of_a_run_may_move_but_not_change(folder, tiny, tmp_path, interrupts):
    """On another machine, the path and the times of the files are new."""
    config = tiny(data__source=str(folder), optim__epochs=2, tokenizer__scale="per-axis")
    pretrain(config, tmp_path / "whole", "l_dae")
    interrupts(LDAE, 1)
    with pytest.raises(Interrupted, match="at image 8 of 48"):
        pretrain(config, tmp_path / "run", "l_dae")
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / "config.yaml", (0, 0))
    config = tree.replace(config, {"data.source": str(moved)})
    pretrain(config, tmp_path / "copy", "l_dae")
    assert_equal(weights(tmp_path / "copy"), weights(tmp_path / "whole"))
    (moved / "05.png").rename(moved / "99.png")
    other = tree.replace(config, {"data.source": str(moved) + "/"})
    with pytest.raises(InputError, match="data.source is .* here, the hash of the images' names"):
        pretrain(other, tmp_path / "copy", "l_dae")
    with pytest.raises(InputError, match="the hash of the images' names was"):
        pretrain(config, tmp_path / "copy", "l_dae")
    (moved / "99.png").unlink()
    with pytest.raises(InputError, match="here, the number of images is 24 there, 23 here; name"):
        pretrain(other, tmp_path / "copy", "l_dae")
    assert kinds.settings_of(tmp_path / "copy", "pretraining") == config


def test_a_run_does_not_go_on_with_other_images_of_the_same_numbers(tiny, tmp_path):
    """Their names are only numbers. A run of an older version knows these alone."""
    config = tiny(data__source="scattered-digits:64:0")
    pretrain(config, tmp_path / "run", "l_dae")
    other = tree.replace(config, {"data.source": "scattered-digits:64:7"})
    with pytest.raises(InputError, match="holds another run: data.source is"):
        pretrain(other, tmp_path / "run", "l_dae")
    (path,) = Checkpoints(tmp_path / "run").paths()
    state = torch.load(path, weights_only=True)
    state["describe"].pop(FINGERPRINT)
    torch.save(state, path)
    pretrain(config, tmp_path / "run", "l_dae")
    with pytest.raises(InputError, match="holds another run: data.source is"):
        pretrain(other, tmp_path / "run", "l_dae")


def test_a_run_without_a_checkpoint_fits_its_tokenizer_to_the_images_that_are_there_now(
    folder, tiny, tmp_path
):
    """As when it was killed while the images were still copied."""
    run, config = tmp_path / "run", tiny(data__source=str(folder))
    pretrain(config, run, "l_dae")
    shutil.rmtree(run / "checkpoints")
    before = (run / "tokenizer.safetensors").read_bytes()
    pretrain(config, run, "l_dae")
    assert (run / "tokenizer.safetensors").read_bytes() == before
    shutil.rmtree(run / "checkpoints")
    shutil.copyfile(folder / "00.png", folder / "99.png")
    pretrain(config, run, "l_dae")
    assert (run / "tokenizer.safetensors").read_bytes() != before


def test_a_run_among_its_images_is_refused(folder, tiny):
    """Its pictures would be images at the next start."""
    with pytest.raises(InputError, match="--run .* lies among the images"):
        pretrain(tiny(data__source=str(folder)), folder / "runs" / "mine", "l_dae")
    assert not (folder / "runs").exists()


def test_a_run_without_a_checkpoint_may_start_again_with_other_settings(tiny, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InputError, match="loss is nan|loss is inf"):
        pretrain(tiny(optim__blr=1e30, optim__warmup_epochs=0), run, "l_dae")
    assert not (run / "checkpoints").exists()
    pretrain(tiny(tokenizer__dim=5), run, "l_dae")
    assert weights(run)["tokenizer.scales"].shape == (5,)


def test_a_warm_up_as_long_as_the_run_is_refused_but_a_half_done_run_resumes(
    tiny, tmp_path, capsys
):
    """Older versions began such runs."""
    with pytest.raises(InputError, match="^optim.warmup_epochs 1 must be fewer .*optim.epochs 1$"):
        pretrain(tiny(optim__warmup_epochs=1), tmp_path / "run", "l_dae", dry_run=True)
    assert not (tmp_path / "run").exists()
    pretrain(tiny(system__keep=0, system__save_minutes=0), tmp_path / "whole", "l_dae")
    run = half(tmp_path / "whole", tmp_path / "half")
    config = tree.replace(kinds.settings_of(run, "pretraining"), {"optim.warmup_epochs": 4})
    (run / "config.yaml").write_text(kinds.to_yaml(config, "pretraining"))
    capsys.readouterr()
    pretrain(config, run, "l_dae", dry_run=True)
    assert "7.81e-05 at its peak" in capsys.readouterr().out  # a quarter of lr = 1e-2 * 8 / 256
    pretrain(config, run, "l_dae")
    assert lines(run)[-1]["images"] == 64
    assert lines(run)[-1]["lr"] == pytest.approx(1e-2 * 8 / 256 * 56 / 256)


def test_the_death_of_a_data_worker_is_reported(tiny, tmp_path, monkeypatch):
    """The main process notices in the middle of the forward pass."""
    original, calls = LDAE.forward, []

    def forward(self, *args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(1)
        return original(self, *args)

    monkeypatch.setattr(LDAE, "forward", forward)
    with pytest.raises(InputError, match="a data worker was killed"):
        pretrain(tiny(system__workers=1, optim__epochs=20), tmp_path / "run", "l_dae")
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"data__source": ""}, "--data SOURCE"),
        ({"data__img_size": 30}, "data.img_size 30 .* model.patch_size 8"),
        ({"tokenizer__dim": 193}, "tokenizer.dim 193"),
        ({"system__device": "cuda:7"}, "cuda:7 was asked for"),
        ({"data__mean": (0.5,)}, "data.mean needs one number for each of 3 channels"),
        ({"data__mean": (0.5, 0.5, 0.5)}, "data.std needs one number"),
    ],
)
def test_wrong_settings_are_refused(changes, sentence, tiny, tmp_path):
    if "device" in str(changes) and torch.cuda.is_available():
        changes, sentence = {"system__device": "meta:1"}, "meta"
    with pytest.raises(InputError, match=sentence):
        pretrain(tiny(**changes), tmp_path / "run", "l_dae")


def test_a_wrong_init_from_is_refused_before_the_tokenizer_is_fitted(tiny, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="model holds neither a run nor the config.json"):
        pretrain(tiny(init_from=str(tmp_path / "model")), tmp_path / "run", "l_dae")
    assert not (tmp_path / "run").exists()


def test_grey_images_and_given_statistics(folder, tiny, tmp_path):
    config = tiny(
        data__source=str(folder), data__in_chans=1, data__mean=(0.4,), data__std=(0.3,),
        data__crop="random", data__flip=True,
    )  # fmt: skip
    pretrain(config, tmp_path / "run", "l_dae")
    state = weights(tmp_path / "run")
    assert state["tokenizer.pixel_mean"].tolist() == pytest.approx([0.4])
    assert state["denoiser.embed.weight"].shape == (32, 64)
