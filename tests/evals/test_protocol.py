"""A constant is written once, in a protocol, for the command line, suites and Python."""

import functools
import inspect
import json
import re
from dataclasses import asdict, fields
from importlib import import_module

import pytest
from graders import GRADERS

from ldae import cli
from ldae.cli.protocols import graders
from ldae.commands.grid import GridProtocol
from ldae.commands.knn import knn
from ldae.errors import InputError
from ldae.evals.evaluation import Evaluation, Setup
from ldae.evals.naming import changes, shortened
from ldae.evals.neighbours import KNNProtocol
from ldae.evals.protocol import flags
from ldae.evals.suite import read_suite

KINDS = [(verb, kind) for verb, grader in GRADERS.items() for kind in grader.protocols.values()]

# For every flag a value that is not its default.
OTHER = {
    "k": (3, 7), "temperature": 0.5, "leave_one_out": True, "shots": (2,), "draws": 3,
    "only_shots": True,
    "C": (0.5, 2.0),
    "learning_rates": (0.3, 3.0), "weight_decays": (0.1,), "epochs": 70, "total_batch": 1024,
    "blocks": (0, -1), "pools": ("cls",), "blr": 0.25, "warmup_epochs": 2, "optimizer": "adamw",
    "classes": 20, "steps": 5, "learning_rate": 0.5, "class_map": "imagenet-a", "real_labels": True,
    "corruption": ("fog", "snow"), "severity": (2, 4), "timesteps": (1, 3), "leading": (1, 2),
    "inputs": ("clean", "noisy"), "whiten": True, "whiten_shrinkage": 0.5,
}  # fmt: skip
NEEDS = {
    "severity": {"corruption": ("fog",)},
    "whiten_shrinkage": {"whiten": True},
    "only_shots": {"shots": (2,)},
}


def named(verb: str, kind: type) -> dict[str, str]:
    return {"protocol": kind.name} if len(GRADERS[verb].protocols) > 1 else {}


def as_flags(given: dict) -> list[str]:
    argv = []
    for name, value in given.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        argv += ["--" + name.replace("_", "-"), *map(str, values)]
    return argv


@pytest.mark.parametrize(("verb", "kind"), KINDS)
def test_flags_are_the_fields_of_the_protocol_and_of_the_setup(verb, kind, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb, *as_flags(named(verb, kind)), "--help"])
    found = re.findall(r"^[│ ] --([A-Za-z][\w-]*) ", capsys.readouterr().out, re.M)
    parameters = inspect.signature(GRADERS[verb].function).parameters.values()
    own = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY} - {"protocol", "setup"}
    setup = {part.name for part in fields(Setup)}
    wanted = [*own, *setup, *named(verb, kind), *flags(kind)]
    assert sorted(found) == sorted(name.replace("_", "-") for name in wanted)
    assert {"name", "version", "seed"}.isdisjoint(flags(kind)) and flags(kind)


@pytest.mark.parametrize(("verb", "kind"), KINDS)
def test_a_grader_reads_shared_features_if_its_protocol_says_so(verb, kind, monkeypatch, tmp_path):
    """Otherwise it opens the encoder for itself."""

    class ReadsFeatures(Exception): ...

    class OpensEncoder(Exception): ...

    def read(*_):
        raise ReadsFeatures

    def open_encoder(*_):
        raise OpensEncoder

    monkeypatch.setattr(Evaluation, "features", read)
    monkeypatch.setattr(Evaluation, "encoder", open_encoder)
    if verb in ("grid", "validate"):  # need a run and a classifier, and learn from no features
        assert not kind.shares_features
        return
    data = "scattered-digits:64" if verb == "segment" else "digits"
    setup = Setup(in_chans=1, workers=0, device="cpu", out=tmp_path)
    protocol = kind(k=(1,)) if verb == "knn" else kind()
    with pytest.raises(ReadsFeatures if kind.shares_features else OpensEncoder):
        GRADERS[verb].function("pixels:8", data, protocol=protocol, setup=setup)


@pytest.mark.parametrize(("verb", "kind"), KINDS)
def test_command_line_suite_and_python_make_the_same_protocol(verb, kind, tmp_path, monkeypatch):
    given = {name: OTHER[name] for name in flags(kind)}
    given.pop("class_map" if "real_labels" in given else "", None)  # which exclude each other
    called, original = [], GRADERS[verb].function

    @functools.wraps(original)
    def record(*args, protocol, setup, **options):
        called.append(protocol)

    monkeypatch.setattr(import_module(original.__module__), verb, record)
    settings = named(verb, kind) | given
    assert cli.main([verb, "backbone", "--data", "images", *as_flags(settings)]) == 0
    wanted = asdict(kind(**given))
    assert [asdict(found) for found in called] == [wanted]
    assert set(given) <= {change.partition("=")[0] for change in changes(*called)}
    if verb in graders():  # those that a suite may name
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        head = f"[data.d]\ntrain = 'images'\n[protocols.p]\nverb = '{verb}'\n"
        suite = tmp_path / "suite.toml"
        suite.write_text(head + "\n".join(lines))
        (cell,) = read_suite(suite, ("backbone",), Setup(out=tmp_path), graders())
        cell.run()
        assert [asdict(found) for found in called] == [wanted] * 2


@pytest.mark.parametrize(
    ("verb", "kind", "flag"), [(*k, flag) for k in KINDS for flag in flags(k[1])]
)
def test_a_changed_constant_is_recorded_as_modified(verb, kind, flag):
    needs = NEEDS.get(flag, {})
    before, after = changes(kind(**needs)), changes(kind(**needs, **{flag: OTHER[flag]}))
    assert [change for change in after if change.startswith(f"{flag}=")] and before != after
    assert changes(kind()) == []


def test_results_do_not_depend_on_how_a_grader_is_called(tmp_path, monkeypatch):
    """The record and the folder's name have the seed of the setup."""
    monkeypatch.chdir(tmp_path)
    how = ["--in-chans", "1", "--workers", "0", "--device", "cpu", "--seed", "3"]
    own = ["--k", "2", "5", "--shots", "1"]
    assert cli.main(["knn", "pixels:8", "--data", "digits", *own, *how]) == 0
    (by_flags,) = tmp_path.glob("evals/pixels-8/knn-digits-shots=1-seed=3-k=2-5-*/results.json")
    suite = tmp_path / "suite.toml"
    suite.write_text("[data.d]\ntrain='digits'\n[protocols.knn]\nk = [2, 5]\nshots = [1]")
    assert cli.main(["evaluate", "pixels:8", "--suite", str(suite), "--out", "out", *how]) == 0
    by_suite = tmp_path / "out" / "pixels-8" / "d" / "knn" / "results.json"
    setup = Setup(in_chans=1, workers=0, device="cpu", seed=3, out=tmp_path / "python")
    protocol = KNNProtocol(k=[2, 5], shots=[1])
    knn("pixels:8", "digits", protocol=protocol, setup=setup)
    paths = (by_flags, by_suite, tmp_path / "python" / "results.json")
    one, two, three = (json.loads(path.read_text()) for path in paths)
    for key in ("protocol", "data", "results"):
        assert one[key] == two[key] == three[key]
    assert one["protocol"]["seed"] == 3 and one["protocol"]["k"] == [2, 5]
    assert one["protocol"]["modified"] == ["shots=1", "seed=3", "k=2-5"]


def test_lists_are_tuples_and_must_not_be_empty():
    assert KNNProtocol(k=[1, 2]) == KNNProtocol(k=(1, 2))
    assert changes(GridProtocol(timesteps=list(GridProtocol.timesteps))) == []
    with pytest.raises(InputError, match="k must name at least one"):
        KNNProtocol(k=[])


def test_a_long_name_of_a_folder_is_cut_and_stays_its_own():
    names = [f"logreg-C={'-'.join(map(str, range(n)))}" for n in (200, 201)]
    short = [shortened(name) for name in names]
    assert len(set(short)) == 2 and all(len(name) <= 200 for name in short)
    assert [shortened("é" * n) == "é" * n for n in (100, 101)] == [True, False]
