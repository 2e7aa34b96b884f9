"""The kind of a run is written, read back, and inferred from older folders."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ldae import cli
from ldae.cluster.settings import SlurmSettings, folder_of
from ldae.data.open import open_source
from ldae.errors import InputError
from ldae.finetuning.settings import FinetuneConfig
from ldae.runs import kinds
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.folder import open_run
from ldae.settings import Config, DataSettings, ExecutionSettings
from ldae.tree import flatten

# The kinds are the names of its folders.
BEFORE = Path(__file__).parent / "written_before"
NOUNS = {
    "pretraining": "a denoising pre-training run",
    "tokenizer": "a tokenizer run",
    "fine-tuning": "a fine-tuning run",
}
PAIRS = [(own, other) for own in NOUNS for other in NOUNS if own != other]


def older_run(kind: str) -> Path:
    """Return the folder of a run of this kind that was written before runs had a kind."""
    return BEFORE / kind.replace("-", "")


def open_as(run: Path, kind: str, config: object) -> None:
    with open_run(run, kind, config, open_source("scattered-digits:64", "train"), "cpu"):
        pass


def settings(kind: str) -> object:
    return FinetuneConfig() if kind == "fine-tuning" else Config()


def refusal(own: str, other: str) -> str:
    return f"holds {NOUNS[own]}, not {NOUNS[other]}"


@pytest.mark.parametrize("kind", NOUNS)
def test_a_kind_is_written_and_read_back(kind, tmp_path):
    open_as(tmp_path, kind, settings(kind))
    assert (tmp_path / "config.yaml").read_text().splitlines()[0] == f"kind: {kind}"
    assert kinds.kind_of(tmp_path) == kind
    assert kinds.settings_of(tmp_path, kind) == settings(kind)
    open_as(tmp_path, kind, settings(kind))


@pytest.mark.parametrize("own, other", PAIRS)
def test_a_run_of_another_kind_is_refused(own, other, tmp_path):
    open_as(tmp_path, own, settings(own))
    written = (tmp_path / "config.yaml").read_text()
    with pytest.raises(InputError, match=refusal(own, other)):
        open_as(tmp_path, other, settings(other))
    with pytest.raises(InputError, match=refusal(own, other)):
        kinds.settings_of(tmp_path, other)
    assert (tmp_path / "config.yaml").read_text() == written


@pytest.mark.parametrize("kind", NOUNS)
def test_the_kind_of_an_older_folder_is_inferred_and_written(kind, tmp_path):
    run = shutil.copytree(older_run(kind), tmp_path / "run")
    assert "kind" not in (run / "config.yaml").read_text()
    assert kinds.kind_of(run) == kind
    for other in NOUNS.keys() - {kind}:
        with pytest.raises(InputError, match=refusal(kind, other)):
            open_as(run, other, settings(other))
    open_as(run, kind, kinds.settings_of(run, kind))
    assert (run / "config.yaml").read_text().splitlines()[0] == f"kind: {kind}"
    assert kinds.settings_of(run, kind) == kinds.settings_of(older_run(kind), kind)


@pytest.mark.parametrize("kind", NOUNS)
def test_the_kind_of_an_older_folder_without_a_checkpoint_follows_from_its_settings(kind, tmp_path):
    shutil.copy(older_run(kind) / "config.yaml", tmp_path)
    same_settings = {"pretraining", "tokenizer"}
    for asked in NOUNS:
        if asked == kind or {asked, kind} == same_settings:
            assert kinds.settings_of(tmp_path, asked)
        else:
            with pytest.raises(InputError, match=f"not {NOUNS[asked]}"):
                kinds.settings_of(tmp_path, asked)
    open_as(tmp_path, kind, kinds.settings_of(tmp_path, kind))
    assert kinds.kind_of(tmp_path) == kind


COMMANDS = [
    ["sample", "RUN"],
    ["export", "RUN", "out"],
    ["grid", "RUN", "--data", "digits"],
    ["fid", "RUN"],
    ["knn", "RUN", "--data", "digits"],
]


@pytest.mark.parametrize("kind", ["tokenizer", "fine-tuning"])
@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: argv[0])
def test_a_command_for_pretrainings_names_the_kind_of_another_run(
    argv, kind, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    run = str(older_run(kind))
    assert cli.main([run if word == "RUN" else word for word in argv]) == 2
    err = capsys.readouterr().err
    asked = "a pre-training run" if argv[0] in ("export", "grid", "knn") else NOUNS["pretraining"]
    sentence = f"holds {NOUNS[kind]}, not {asked}"
    if kind == "fine-tuning" and argv[0] in ("export", "knn"):  # which take one that has ended
        sentence = "has not ended"
    assert sentence in err and len(err.splitlines()) == 1


TO_FOLDERS = [
    ["pretrain", "l_dae", "--data", "scattered-digits:64", "--optim.batch-size", "8"],
    ["fit-tokenizer", "l_dae", "--data", "scattered-digits:64"],
    ["finetune", str(BEFORE / "backbone"), "--recipe", "mae", "--data", "scattered-digits:64"],
]
SMALL = ["--data.img-size", "32", "--model.name", "vit_tiny_patch16_224"]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["sample", "RUN"], "is not a run folder: its config.yaml does not belong to a run"),
        (["export", "RUN", "out"], "is not a run folder: its config.yaml does not belong to a run"),
        (
            ["grid", "RUN", "--data", "digits"],
            "is not a run folder: its config.yaml does not belong to a run",
        ),
        (
            ["fid", "RUN", "digits", "--steps", "3"],
            "steps is for samples of a run, and RUN is no run",
        ),
        (
            ["knn", "RUN", "--data", "digits"],
            "the folder RUN holds neither a run nor the config.json of a timm",
        ),
        (["jobs", "RUN"], "no job was sent from RUN"),
        *(([*argv, "--run", "RUN"], "RUN holds other files and no run") for argv in TO_FOLDERS),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_a_folder_without_a_run_is_refused(argv, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("RUN").mkdir()
    Path("RUN", "config.yaml").write_text("trainer: {gpus: 8}\n")  # another program's
    if argv[0] in ("pretrain", "fit-tokenizer"):
        argv = [*argv, *SMALL]
    assert kinds.kind_of(Path("RUN")) is None
    assert folder_of(SlurmSettings(), ["RUN"]) == Path()
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("", "run is damaged: its config.yaml is empty"),
        ("{", "config.yaml is not a YAML file"),
        (
            "kind: [1]\n",
            "run is of the unknown kind '\\[1\\]'; kinds are pretraining, mae",
        ),
        (
            "kind: moco\n",
            "run is of the unknown kind 'moco'; kinds are pretraining, mae",
        ),
        (
            "kind: pretraining\nmodel: {deep: 1}\n",
            "no setting 'model.deep'; the nearest is 'model.d",
        ),
    ],
)
def test_a_damaged_folder_is_refused(content, sentence, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=sentence):
        kinds.settings_of(tmp_path / "run", "pretraining")


def test_the_settings_of_a_run_of_the_same_kind_may_replace_a_row(capsys, tmp_path):
    commands = {"pretraining": "pretrain", "tokenizer": "fit-tokenizer"}
    for kind, command in commands.items():
        for given in NOUNS:
            file = tmp_path / f"{given}.yaml"
            file.write_text(kinds.to_yaml(settings(given), given))
            argv = [command, str(file), "--data", "scattered-digits:64"]
            status = cli.main([*argv, "--run", str(tmp_path / "run"), "--dry-run"])
            out, err = capsys.readouterr()
            if given == kind:
                assert status == 0 and "kind:" not in out
            else:
                assert status == 2
                assert f"{given}.yaml is of the kind '{given}', not '{kind}'" in err


def test_a_kind_is_neither_a_setting_nor_a_flag(capsys):
    for kind in kinds.KINDS.values():
        assert "kind" not in {name.partition(".")[0] for name in flatten(kind.defaults())}
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "l_dae", "--run", "x", "--kind", "tokenizer"])
    assert "kind" in capsys.readouterr().err


@dataclass(frozen=True)
class MadeUp:
    """The settings of another kind."""

    data: DataSettings = field(default_factory=DataSettings)
    system: ExecutionSettings = field(default_factory=ExecutionSettings)
    masked: float = 0.75
    seed: int = 0


def test_a_settings_class_and_a_registry_line_add_a_kind(monkeypatch, tmp_path):
    line = kinds.Kind("a masked pre-training run", f"{__name__}:MadeUp")
    monkeypatch.setitem(kinds.KINDS, "masked", line)
    run = tmp_path / "run"
    open_as(run, "masked", MadeUp(masked=0.5))
    assert kinds.kind_of(run) == "masked"
    assert kinds.settings_of(run, "masked") == MadeUp(masked=0.5)
    assert folder_of(SlurmSettings(), [str(run)]) == run
    with pytest.raises(InputError, match="holds a masked pre-training run, not a denoising"):
        open_as(run, "pretraining", Config())
    state = {"images_seen": 8, "model": {}, "average": None, "optimizer": {}}
    Checkpoints(run).save(state | {"describe": {"row": "masked 0.5"}})
    with pytest.raises(InputError, match="masked is 0.5 there, 0.6 here"):
        open_as(run, "masked", MadeUp(masked=0.6))
    for kind in NOUNS:
        assert kinds.kind_of(older_run(kind)) == kind
