"""The functions of ``ldae`` are the commands: the same results, and nothing left behind."""

import importlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

import ldae
from ldae import cli
from ldae.cli.commands import COMMANDS
from ldae.machine.timing import TrainingStep
from ldae.method import LDAE
from ldae.runs import kinds
from ldae.runs.checkpoints import Checkpoints
from ldae.train.interrupt import SIGNALS

COMMANDS = {name: name.replace("-", "_") for name in COMMANDS}
PUBLIC = [name for name in ldae.__all__ if not name.startswith("__")]
FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(ldae, name))]
DATA = "scattered-digits:120"


@pytest.mark.parametrize("name", COMMANDS.values())
def test_every_command_is_a_public_function(name):
    module = importlib.import_module(f"ldae.commands.{name}")
    assert getattr(ldae, name) is getattr(module, name)


def test_names_are_found_without_importing_anything_heavy():
    code = (
        "import sys, ldae; names = {*dir(ldae), *ldae.__all__}; from ldae import InputError; "
        "assert {'knn', 'load_run'} <= names; "
        "print('loaded', *{'torch', 'timm', 'numpy', 'tyro'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "loaded\n"


def test_no_public_name_is_a_file_of_the_package():
    """It would be the function or the module, as the imports before it decide."""
    assert not {*PUBLIC} & {path.stem for path in Path(ldae.__file__).parent.iterdir()}
    with pytest.raises(AttributeError, match="load_rum"):
        _ = ldae.load_rum


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_has_types_and_an_example(name):
    function = getattr(ldae, name)
    hints = typing.get_type_hints(inspect.unwrap(function))
    assert hints.keys() == {*inspect.signature(function).parameters, "return"}
    assert f"ldae.{name}(" in inspect.getdoc(function).split("Examples:")[1]


def described(record: dict) -> dict:
    """Return a record without its context, which has the command and the time of the machine."""
    return {name: value for name, value in record.items() if name != "environment"}


@pytest.fixture
def both(tmp_path):
    """both(command, words, call): run a command, and call Python; their files, as JSON, are equal.

    ``call(out)`` returns what the function returns, which must be the content of its file.
    """

    def run(command: str, words: list[str], call, file: str = "results.json") -> dict:
        outs = tmp_path / "command", tmp_path / "python"
        flag = "--run" if command in ("finetune", "fit-tokenizer") else "--out"
        assert cli.main([command, *words, flag, str(outs[0])]) == 0
        returned = call(outs[1])
        by_command, by_python = (json.loads((out / file).read_text()) for out in outs)
        assert returned == by_python
        assert described(by_python) == described(by_command)
        return returned

    return run


HOW = ["--data", DATA, "--workers", "0"]


def setup(out: Path) -> ldae.Setup:
    return ldae.Setup(out=out, workers=0)


def test_knn(both):
    protocol = ldae.KNNProtocol(k=(1, 5), shots=(2,), draws=2)
    words = ["pixels:8", *HOW, "--k", "1", "5", "--shots", "2", "--draws", "2"]
    both("knn", words, lambda out: ldae.knn("pixels:8", DATA, protocol=protocol, setup=setup(out)))


def test_linear(both):
    protocol = ldae.CachedProtocol(epochs=2, learning_rates=(0.1,))
    words = ["pixels:8", *HOW, "--epochs", "2", "--learning-rates", "0.1"]
    both(
        "linear",
        words,
        lambda out: ldae.linear("pixels:8", DATA, protocol=protocol, setup=setup(out)),
    )


def test_logreg(both):
    protocol = ldae.LogregProtocol(C=(0.1, 1.0))
    words = ["pixels:8", *HOW, "--C", "0.1", "1"]
    both(
        "logreg",
        words,
        lambda out: ldae.logreg("pixels:8", DATA, protocol=protocol, setup=setup(out)),
    )


def test_retrieve(both):
    protocol = ldae.RetrievalProtocol(k=(3,))
    words = ["pixels:8", *HOW, "--k", "3"]
    both(
        "retrieve",
        words,
        lambda out: ldae.retrieve("pixels:8", DATA, protocol=protocol, setup=setup(out)),
    )


def test_segment(both, run):
    folder = run()
    protocol = ldae.SegmentProtocol(steps=3)
    words = [str(folder), *HOW, "--steps", "3"]
    both(
        "segment",
        words,
        lambda out: ldae.segment(folder, DATA, protocol=protocol, setup=setup(out)),
    )


def test_validate(both, run, tmp_path):
    classifier = tmp_path / "classifier"
    sweep = ldae.CachedProtocol(epochs=1, learning_rates=(0.1,))
    ldae.linear(run(), DATA, protocol=sweep, save=classifier, setup=setup(tmp_path / "probe"))
    protocol = ldae.ValidationProtocol(corruption=("contrast",), severity=(1, 5))
    words = [str(classifier), *HOW, "--corruption", "contrast", "--severity", "1", "5"]
    record = both(
        "validate",
        words,
        lambda out: ldae.validate(classifier, DATA, protocol=protocol, setup=setup(out)),
    )
    assert record["results"]["cells"]["contrast"].keys() == {"1", "5"}  # as in the file


def test_grid(both, run):
    folder = run()
    protocol = ldae.GridProtocol(timesteps=(10,), leading=(1,), epochs=1, learning_rates=(0.1,))
    words = [str(folder), *HOW, "--timesteps", "10", "--leading", "1", "--epochs", "1"]
    both(
        "grid",
        [*words, "--learning-rates", "0.1"],
        lambda out: ldae.grid(folder, DATA, protocol=protocol, setup=setup(out)),
    )


def test_evaluate(both, tmp_path):
    suite = tmp_path / "suite.toml"
    suite.write_text(f'[data.digits]\ntrain = "{DATA}"\n[protocols.knn]\nk = [1]\n')
    both(
        "evaluate",
        ["pixels:4", "--suite", str(suite), "--workers", "0"],
        lambda out: ldae.evaluate("pixels:4", suite=suite, setup=setup(out)),
        "table.json",
    )


def test_fid(tmp_path):
    names = {name: tmp_path / f"{name}.json" for name in ("command", "python")}
    words = ["fid", DATA, "scattered-digits:160", "--features", "pixels:4", "--workers", "0"]
    assert cli.main([*words, "--out", str(names["command"])]) == 0
    settings = ldae.FIDSettings(features="pixels:4", workers=0, out=str(names["python"]))
    returned = ldae.fid(DATA, "scattered-digits:160", setup=settings)
    by_command, by_python = (json.loads(path.read_text()) for path in names.values())
    assert returned == by_python and described(by_python) == described(by_command)


@pytest.fixture
def settings_file(tmp_path):
    """settings_file(config, kind): the path of a YAML file with these settings."""

    def write(config, kind: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(kinds.to_yaml(config, kind))
        return str(path)

    return write


def test_fit_tokenizer(both, tiny, settings_file):
    config = tiny("patch_ae")
    path = settings_file(config, "tokenizer")
    both(
        "fit-tokenizer",
        [path],
        lambda out: ldae.fit_tokenizer(config, out, path),
        "reconstruction.json",
    )


def test_pretrain_and_resume_by_the_folder_alone(tiny, settings_file, tmp_path, interrupts):
    config = tiny(optim__epochs=2)
    path = settings_file(config, "pretraining")
    assert cli.main(["pretrain", path, "--run", str(tmp_path / "command")]) == 0
    interrupts(LDAE, 5)
    with pytest.raises(ldae.Interrupted, match="stopped at image 40 of 128"):
        ldae.pretrain(config, tmp_path / "python")
    run = ldae.pretrain(tmp_path / "python")
    assert run.images_seen == 128 and run.row == "l_dae"
    one, other = (Checkpoints(tmp_path / name).load()["model"] for name in ("command", "python"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_finetune(both, run):
    folder = str(run())
    changes = {
        "data.source": DATA, "augment.mix_images": 4, "optim.batch_size": 60, "optim.epochs": 1.0,
        "optim.warmup_epochs": 0.5, "system.workers": 0, "system.precision": "fp32",
    }  # fmt: skip
    config = ldae.finetune_config(folder, "mae", changes)
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    record = both(
        "finetune", [folder, "--recipe", "mae", *words], lambda out: ldae.finetune(config, out)
    )
    assert record["results"]["top1"] >= 0


def test_files_are_those_of_the_command(run, tmp_path):
    """Of cache, embed, export and sample, whose result is a path."""
    folder = run()

    def call(*words: str) -> None:
        assert cli.main([*map(str, words)]) == 0

    call("cache", DATA, tmp_path / "a.safetensors", "--side", 16, "--workers", 0)
    cached = ldae.cache(DATA, tmp_path / "b.safetensors", side=16, workers=0)
    call("embed", folder, DATA, "--out", tmp_path / "a.npy", "--workers", 0)
    embedded = ldae.embed(folder, DATA, out=tmp_path / "b.npy", setup=ldae.EncoderSetup(workers=0))
    call("export", folder, tmp_path / "a")
    exported = ldae.export(folder, tmp_path / "b") / "model.safetensors"
    call("sample", folder, "--images", 2, "--out", tmp_path / "a.npz", "--steps", 3)
    how = ldae.SamplingSettings(steps=3)
    sampled = ldae.sample(folder, 2, tmp_path / "b.npz", sampling=how)
    for file in (cached, embedded, exported, sampled):
        other = tmp_path / "a" / file.name if file == exported else tmp_path / f"a{file.suffix}"
        assert file.read_bytes() == other.read_bytes(), file


def test_diff_and_jobs_return_what_they_print(capsys):
    assert ldae.diff("patch_pca", "predict_latent") == {
        "objective.target": ("eps", "latent"),
        "objective.weight": ("uniform", "gamma2"),
    }
    assert len(capsys.readouterr().out.splitlines()) == 2


def state_of_the_process() -> dict:
    """Return what a call could leave behind in the process of a notebook."""
    return {
        "signals": [signal.getsignal(number) for number in SIGNALS],
        "threads": {thread.name for thread in threading.enumerate()},
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "environ": dict(os.environ),
        "folder": os.getcwd(),
        "settings": (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_grad_enabled(),
        ),
    }


def test_calls_leave_the_process_as_it_was(tiny, classifier, tmp_path):
    """They can be repeated, with the same result."""
    knn = {"protocol": ldae.KNNProtocol(k=(1,)), "setup": ldae.Setup(workers=1, out=tmp_path)}
    ldae.knn("pixels:4", DATA, **knn)  # starts what torch and faiss start once
    before = state_of_the_process()
    run = ldae.pretrain(tiny(), tmp_path / "run")
    run.denoise(run.images(2), 3)
    run.sample(2, ldae.SamplingSettings(steps=2))
    exported = ldae.export(run.folder, tmp_path / "exported")
    ldae.load_backbone(exported)
    ldae.load_classifier(classifier)
    linear = ldae.CachedProtocol(epochs=1, learning_rates=(0.1,))
    ldae.linear(exported, DATA, protocol=linear, save=tmp_path / "probe", setup=setup(tmp_path))
    results = [ldae.knn(run.folder, DATA, **knn)["results"] for _ in range(2)]
    with pytest.raises(ldae.InputError, match="nowhere"):
        ldae.knn("pixels:4", "nowhere")
    assert state_of_the_process() == before
    assert results[0] == results[1]
    again = ldae.pretrain(tiny(), tmp_path / "again")
    one, other = (found.method.state_dict() for found in (run, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_compiled_training_leaves_the_compiler_as_it_was(tiny, tmp_path, monkeypatch):
    def settings() -> tuple:
        dynamo, functorch = torch._dynamo.config, torch._functorch.config
        return dynamo.optimize_ddp, dynamo.recompile_limit, functorch.activation_memory_budget

    seen, before = [], settings()

    def compile_eagerly(part, **how):
        return torch._dynamo.optimize(lambda graph, _: seen.append(settings()) or graph)(part)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    ldae.pretrain(tiny(system__compile="on", system__memory_budget=0.25), tmp_path / "run")
    assert settings() == before
    assert {*seen} == {(False, 64, 0.25)}  # while parts are compiled, at their first calls
    TrainingStep(tiny(system__compile="on"), torch.device("cpu"), 2)()
    assert settings() == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_train_where_gradients_are_off(mode, tiny, short_tuning, tmp_path):
    """As in a notebook that switches them off in its first cell."""
    with mode():
        run = ldae.pretrain(tiny(), tmp_path / "run")
        backbone = ldae.load_backbone(run.folder)
        ldae.finetune(short_tuning(run.folder, DATA), tmp_path / "tuned")
        ldae.segment(
            run.folder, DATA, protocol=ldae.SegmentProtocol(steps=2), setup=setup(tmp_path / "out")
        )
        own = run.backbone()
        assert not torch.is_grad_enabled()
    assert run.images_seen == 64
    for network in (backbone, own):
        network(torch.zeros(1, 3, 32, 32)).sum().backward()


def test_a_thread_can_call(tiny, tmp_path):
    """Only the main thread may set handlers of signals; a server calls from another one."""
    ended = []
    thread = threading.Thread(
        target=lambda: ended.append(ldae.pretrain(tiny(), tmp_path / "run").images_seen)
    )
    thread.start()
    thread.join()
    assert ended == [64]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_notebook_can_use_data_workers(start, tmp_path):
    """As in one, no file holds the code, and there is no guard of __main__."""
    if start == "fork" and sys.platform == "darwin":
        pytest.skip("macOS' frameworks do not survive a fork")
    code = (
        "import ldae, ldae.data.workers\n"
        f"ldae.data.workers._START = {start!r}\n"
        "protocol = ldae.KNNProtocol(k=(1,))\n"
        f"setup = ldae.Setup(workers=2, out={str(tmp_path)!r})\n"
        f"ldae.knn('pixels:4', {DATA!r}, protocol=protocol, setup=setup)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "top1_k1" in done.stdout, done.stderr
    assert (tmp_path / "results.json").is_file()


def test_wrong_input_is_a_sentence(tiny, tmp_path):
    for call, message in (
        (lambda: ldae.load_run(tmp_path), "is not a run folder"),
        (lambda: ldae.pretrain(tmp_path), "is not a run folder"),
        (lambda: ldae.pretrain("l_dae", tmp_path), "'l_dae' is not settings"),
        (lambda: ldae.pretrain(tiny()), "need a run folder"),
        (lambda: ldae.pretrain(3, tmp_path), "settings of a denoising .* not int"),
        (lambda: ldae.finetune(tiny(), tmp_path), "settings of a fine-tuning run, not Config"),
        (lambda: ldae.config(changes={"optim.epoch": 3}), "the nearest is 'optim.epochs'"),
        (lambda: ldae.knn("pixels:4"), "no images"),
    ):
        with pytest.raises(ldae.InputError, match=message):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, call", [("doctor", ldae.doctor), ("fid", lambda: ldae.fid(DATA, DATA))]
)
def test_what_draws_inside_leaves_the_generator_of_the_caller(name, call, monkeypatch):
    """Of two commands that take long; others are called above."""

    def draw(device: str) -> torch.device:
        raise ldae.InputError(f"drawn {torch.rand(1)}")

    monkeypatch.setattr(f"ldae.commands.{name}.device_for", draw)
    before = torch.get_rng_state()
    with pytest.raises(ldae.InputError, match="drawn"):
        call()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_value_of_another_type_is_refused_before_images_are_opened(tmp_path):
    for call, message in (
        (lambda: ldae.KNNProtocol(k=20), "'k' takes a list of int, not 20"),
        (lambda: ldae.Setup(workers="0"), "'workers' takes int, not '0'"),
        (lambda: ldae.EncoderSetup(batch_size=0), "batch_size must be at least 1"),
        (lambda: ldae.EncoderSetup(precision="fp8"), "'precision' takes fp32 or"),
    ):
        with pytest.raises(ldae.InputError, match=message):
            call()
    assert ldae.Setup(seeds=[1, 2]).seeds == (1, 2)


def test_a_path_may_begin_with_the_home(run, tmp_path, monkeypatch):
    """As in a notebook, where no shell expands it."""
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    shutil.copytree(run(), home / "run")
    (home / "suite.toml").write_text(f'[data.d]\ntrain = "{DATA}"\n[protocols.knn]\nk = [1]\n')
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    ldae.embed("pixels:4", DATA, out="~/features.npy", setup=ldae.EncoderSetup(workers=0))
    ldae.knn("~/features.npy", protocol=ldae.KNNProtocol(k=(1,)), setup=setup(home / "knn"))
    assert ldae.rerun("~/knn", out="~/again")["verdict"] == "equal"
    linear = ldae.CachedProtocol(epochs=1, learning_rates=(0.1,))
    ldae.linear("~/run", DATA, protocol=linear, save="~/probe", setup=setup(home / "linear"))
    ldae.cache(DATA, "~/images.safetensors", side=16, workers=0)
    ldae.cache("~/images.safetensors", check=True)
    files = {"save_stats": "~/statistics.npz", "out": "~/fid.json"}
    ldae.fid(DATA, DATA, setup=ldae.FIDSettings(features="pixels:4", workers=0, **files))
    ldae.evaluate("pixels:4", suite="~/suite.toml", setup=setup(home / "suite"))
    with pytest.raises(ldae.InputError, match=f"{home}/missing.pth"):
        ldae.load_backbone("vit_tiny_patch16_224@~/missing.pth")
    with pytest.raises(ldae.InputError, match=f"{home}/run"):
        ldae.load_detector("~/run")
    assert ldae.finetune_config("~/run", "mae", run="~/run").recipe == "mae"
    written = {path.name for path in home.iterdir()}
    assert written >= {"features.npy", "again", "probe", "images.safetensors", "fid.json"}
    assert not list(work.iterdir())
