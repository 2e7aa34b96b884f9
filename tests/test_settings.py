import dataclasses
import re
import time
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import yaml

import ldae
from ldae import tree
from ldae.errors import InputError
from ldae.models import DENOISERS
from ldae.models.activations import ACTIVATIONS
from ldae.models.vit import ViTParts
from ldae.noise import SCHEDULES
from ldae.objective import TARGETS, WEIGHTS
from ldae.runs import kinds
from ldae.sampling.samplers import SAMPLERS
from ldae.sampling.settings import SamplingSettings
from ldae.settings import Config
from ldae.tokenizers import TOKENIZERS


def test_a_saved_configuration_loads_unchanged(tmp_path):
    config = ldae.config("patch_pca", scale="small")
    path = tmp_path / "config.yaml"
    path.write_text(kinds.to_yaml(config, "pretraining"))
    assert kinds.load(path, "pretraining") == config


def test_a_file_may_hold_only_changes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("tokenizer: {dim: 7}\noptim:\n  blr: 3e-4\n")
    loaded = kinds.load(path, "pretraining")
    assert tree.difference(Config(), loaded) == {
        "tokenizer.dim": (32, 7),
        "optim.blr": (1e-4, 3e-4),
    }


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("tokenizer: {dims: 7}", "'tokenizer.dim'"),
        ("tokenizer: {dim: much}", "tokenizer.dim.*takes int"),
        ("noise: {schedule: linear}", "noise.schedule.*ddpm or cosine.*nearest is 'linear_"),
        ("noise: {schedule: 3}", "noise.schedule.*takes str"),
        ("data: {crop: centre}", "data.crop.*takes center or random"),
        ("optim: {epochs: -1}", "optim.epochs must be above 0"),
        ("optim: {blr: fast}", "optim.blr.*takes float"),
        ("system: {device_batch: all}", "system.device_batch.*takes int or auto"),
        ("system: {device_batch: -1}", "system.device_batch must be at least 0, not -1"),
        ("data: {flip: 3}", "data.flip.*takes bool"),
        ("- 1", "holds no settings"),
        ("{", "not a YAML file"),
    ],
)
def test_the_refusal_of_a_wrong_file_names_it(tmp_path, text, sentence):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"mine.yaml.*{sentence}"):
        kinds.load(path, "pretraining")


# Each line has the line before it twice, so the last has 2^30 values.
LAUGHS = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 31))


@pytest.mark.parametrize(
    "text, sentence",
    [
        pytest.param("license: 2001-99-99", "is not a YAML file", id="no date"),
        pytest.param("optim: {epochs: !!int many}", "is not a YAML file", id="no number"),
        pytest.param("[" * 5000, "is not a YAML file", id="deep"),
        pytest.param("data: &a {model: *a}", "holds more than 10,000 values", id="endless"),
        pytest.param(LAUGHS, "holds more than 10,000 values", id="large"),
        pytest.param(f"seed: '{9 * 10**400}'", r"takes int, not '90{79}\.\.\.'", id="digits"),
        pytest.param("optim: {blr: 1" + "0" * 400 + "}", "takes float, not", id="beyond floats"),
        pytest.param("x" * 900 + ": 1", r"no setting 'x{80}\.\.\.'", id="long name"),
    ],
)
def test_a_hostile_file_is_refused_at_once(tmp_path, text, sentence):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    start = time.perf_counter()
    with pytest.raises(InputError, match=f"mine.yaml.*{sentence}") as caught:
        kinds.load(path, "pretraining")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("optim.epochs", -1.0, "optim.epochs must be above 0, not -1.0"),
        ("system.explosion", 0.5, "system.explosion must be 0 or above 1, not 0.5"),
        ("optim.epochs", float("inf"), "optim.epochs must be above 0, not inf"),
        ("optim.blr", float("nan"), "optim.blr must be above 0, not nan"),
        ("optim.batch_size", 0, "optim.batch_size must be at least 1, not 0"),
        ("optim.betas", (0.9, 2.0), "optim.betas must be at least 0 and below 1, not 2.0"),
        ("data.std", (0.2, 0.0), "data.std must be above 0, not 0.0"),
        ("model.depth", 0, "model.depth must be at least 1, not 0"),
        ("system.log_every", 0, "system.log_every must be at least 1, not 0"),
        ("system.device_batch", -1, "system.device_batch must be at least 0, not -1"),
        ("seed", -1, "seed must be at least 0, not -1"),
    ],
)
def test_a_number_out_of_range_is_refused(name, value, sentence):
    tree.check(Config())
    with pytest.raises(InputError, match=re.escape(sentence)):
        tree.check(tree.replace(Config(), {name: value}))


@pytest.mark.parametrize("kind", kinds.pretrainings())
def test_every_number_has_a_range(kind):
    """Without a range a wrong number would pass silently or end in a traceback."""
    config = kinds.KINDS[kind].defaults()
    for name, value in tree.flatten(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if name in ("data.mean", "data.std", "model.depth") or any(
            isinstance(number, int | float) and not isinstance(number, bool) for number in numbers
        ):
            kind_of_number = int if value is None else type(value)
            wrong = (-1e9,) if isinstance(value, tuple) else kind_of_number(-1e9)
            with pytest.raises(InputError, match=re.escape(name)):
                tree.check(tree.replace(config, {name: wrong}))


def test_paths_and_numbers_of_numpy_are_taken(tmp_path):
    changes = {"data.source": tmp_path, "optim.blr": np.float64(1e-4), "seed": np.int64(3)}
    config = ldae.config("l_dae", init_from=tmp_path, changes=changes)
    assert (config.init_from, config.data.source) == (str(tmp_path), str(tmp_path))
    assert config.optim.blr == 1e-4 and type(config.seed) is int
    assert "seed: 3\n" in kinds.to_yaml(config, "pretraining")
    with pytest.raises(InputError, match="takes int, not"):
        ldae.config(changes={"seed": np.float64(0.5)})


def test_a_start_among_the_changes_decides_the_sizes(tmp_path):
    start = str(tmp_path)
    among = ldae.config("l_dae", changes={"init_from": start, "optim.epochs": 3})
    assert among == ldae.config("l_dae", init_from=start, changes={"optim.epochs": 3})


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing.yaml cannot be read"):
        kinds.load(tmp_path / "nothing.yaml", "pretraining")


@pytest.mark.parametrize("kind", kinds.pretrainings())
def test_every_setting_is_read(kind):
    assert unread(kinds.KINDS[kind].defaults()) == []


def unread(config) -> list[str]:
    """Return the settings that no code names and no entry of a registry takes."""
    package = Path(ldae.__file__).parent
    code = "\n".join(
        path.read_text() for path in package.rglob("*.py") if path.name != "settings.py"
    )
    by_entries = taken("noise.", SCHEDULES) | taken("tokenizer.", TOKENIZERS)
    by_entries |= taken("model.vit.", {"dit": ViTParts})
    for name, denoiser in DENOISERS.items():
        by_entries |= taken(f"{name if hasattr(config, name) else 'model'}.", {name: denoiser})
    return [
        name
        for name in tree.flatten(config).keys() - by_entries
        if not re.search(rf"(?<![\w\"']){re.escape(_attribute(name))}\b", code)
    ]


def taken(prefix: str, registry: dict) -> set[str]:
    """Return the parameters of the entries of a registry, as names of settings."""
    return {prefix + name for entry in registry.values() for name in signature(entry).parameters}


def test_the_parts_of_a_vit_are_settings_with_the_same_defaults():
    assert ViTParts(**dataclasses.asdict(Config().model.vit)) == ViTParts()


def test_the_parameters_of_entries_are_settings():
    known = tree.flatten(Config())
    assert taken("noise.", SCHEDULES) <= known.keys()
    sizes = {"tokenizer.img_size", "tokenizer.patch_size", "tokenizer.in_chans"}
    assert taken("tokenizer.", TOKENIZERS) - sizes <= known.keys()
    given = {"denoise", "z", "levels", "gamma", "sigma", "draw"}
    assert taken("", SAMPLERS) - given <= tree.flatten(SamplingSettings()).keys()


CHOICES = [
    (Config(), "model.denoiser", DENOISERS),
    (Config(), "model.vit.act_layer", ACTIVATIONS),
    (Config(), "noise.schedule", SCHEDULES),
    (Config(), "objective.target", TARGETS),
    (Config(), "objective.weight", WEIGHTS),
    (Config(), "tokenizer.name", TOKENIZERS),
    (SamplingSettings(), "sampler", SAMPLERS),
]


@pytest.mark.parametrize("config, name, registry", CHOICES)
def test_a_choice_takes_the_names_of_its_registry(config, name, registry, monkeypatch):
    for entry in registry:
        tree.check(tree.replace(config, {name: entry}))
    monkeypatch.setitem(registry, "my_own", None)
    tree.check(tree.replace(config, {name: "my_own"}))
    sentence = rf"^{name} must be {' or '.join(registry)}, not 'myown'; the nearest is 'my_own'$"
    with pytest.raises(InputError, match=sentence):
        tree.replace(config, {name: "myown"})
    with pytest.raises(InputError, match=sentence):
        tree.check(tree.put(config, {name: "myown"}))


def _attribute(name: str) -> str:
    """Return a setting as code reads it: the variable of its group, and its field."""
    name = name.removeprefix("tokenizer.") if name.count(".") == 2 else name
    return name if "." in name else f"config.{name}"


def test_settings_are_plain_values():
    """Of types that YAML and a checkpoint opened with weights_only can hold."""
    assert yaml.safe_load(tree.to_yaml(Config())) is not None
    for value in tree.flatten(Config()).values():
        assert isinstance(value, bool | int | float | str | tuple | None)
    assert dataclasses.is_dataclass(Config().system)
