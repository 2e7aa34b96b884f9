"""MAE on the command line: its recipe at every scale, its runs, and what they are refused for."""

import json

import pytest
import timm
import torch

import ldae
from ldae import cli, trajectory
from ldae.backbones.open import load_backbone
from ldae.commands.export import export
from ldae.commands.linear import CachedProtocol, linear
from ldae.commands.pretrain import pretrain
from ldae.commands.submit import read_pipeline
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.taps import TokenMapReader
from ldae.mae.settings import MAEConfig
from ldae.runs import kinds
from ldae.tree import flatten, to_yaml


def call(capsys, *argv):
    """Return the exit status, standard output and standard error of a command."""
    try:
        status = cli.main(list(argv))
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def run(tiny_mae, tmp_path):
    pretrain(tiny_mae(optim__epochs=0.5), tmp_path / "run", "mae")
    return tmp_path / "run"


def test_the_recipe_of_the_paper_is_the_published_one():
    found = flatten(ldae.config("mae"))
    assert found == flatten(MAEConfig())
    published = {
        "data.img_size": 224, "data.crop": "random", "data.flip": True, "data.stats": "imagenet",
        "model.name": "vit_large_patch16_224", "model.decoder_depth": 8,
        "model.decoder_embed_dim": 512, "model.decoder_num_heads": 16,
        "objective.mask_ratio": 0.75, "objective.norm_pix_loss": True,
        "optim.batch_size": 4096, "optim.blr": 1.5e-4, "optim.epochs": 800,
        "optim.warmup_epochs": 40, "optim.weight_decay": 0.05, "optim.betas": (0.9, 0.95),
    }  # fmt: skip
    assert published.items() <= found.items()


@pytest.mark.parametrize("scale", ["small", "demo"])
def test_a_small_mae_has_the_encoder_and_the_images_of_the_rows(scale):
    mae, row = (flatten(ldae.config(name, scale)) for name in ("mae", "l_dae"))
    assert set(mae) & set(trajectory.SCALES[scale].changes) == {
        name for name in trajectory.SCALES[scale].changes if not name.startswith("tokenizer.")
    }
    for name in ("data.img_size", "optim.batch_size", "optim.epochs", "optim.warmup_epochs"):
        assert mae[name] == row[name]
    for name in ("name", "patch_size", "depth", "embed_dim", "num_heads"):
        assert mae[f"model.{name}"] == row[f"model.{name}"]


def test_show_and_help_know_mae(capsys):
    out = call(capsys, "show")[1]
    assert "mae" in out and "an MAE pre-training run" in out
    assert "norm_pix_loss: true" in call(capsys, "show", "mae")[1]
    status, out, _ = call(capsys, "pretrain", "mae", "--help")
    assert status == 0 and "--objective.mask-ratio" in out and "--noise.schedule" not in out


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["pretrain", "mea", "--run", "x"], "there is no row 'mea'; the nearest is 'mae'"),
        (["pretrain", "mae", "--scale", "smal", "--run", "x"], "no scale 'smal'; the nearest"),
        (["pretrain", "mae", "--run", "x", "--objective.mask-ratio", "1"], "above 0 and below 1"),
        (
            ["fit-tokenizer", "mae", "--run", "x"],
            "mae is a recipe of an MAE pre-training run, not of a tok",
        ),
        (["diff", "l_dae", "mae"], "mae of an MAE pre-training run: they share no settings"),
        (["sample", "RUN"], "RUN holds an MAE pre-training run, not a denoising pre-training run"),
        (["fid", "RUN"], "RUN holds an MAE pre-training run, not a denoising pre-training run"),
        (
            ["grid", "RUN", "--data", "digits"],
            "RUN is an MAE pre-training run, which has no t: ldae",
        ),
        (["export", "RUN", "out", "--timestep", "3"], "and an MAE has no t"),
        (
            ["pretrain", "l_dae", "--scale", "demo", "--data", "scattered-digits:64"]
            + ["--optim.batch-size", "16", "--run", "RUN"],
            "RUN holds an MAE pre-training run, not a denoising pre-training run",
        ),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_wrong_commands_get_one_sentence(argv, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "config.yaml").write_text(kinds.to_yaml(MAEConfig(), "mae"))
    from ldae.runs.checkpoints import Checkpoints

    if argv[0] == "export":
        from ldae.mae.network import build

        config = ldae.config("mae", "demo")
        (tmp_path / "RUN" / "config.yaml").write_text(kinds.to_yaml(config, "mae"))
        describe = {"row": "mae", "images": 64, "classes": []}
        state = {"images_seen": 8, "average": None, "optimizer": {}, "describe": describe}
        Checkpoints(tmp_path / "RUN").save(state | {"model": build(config).state_dict()})
    status, _, err = call(capsys, *argv)
    assert status == 2 and sentence in err and len(err.splitlines()) == 1


def test_a_file_of_settings_says_its_kind(capsys, tiny_mae, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(kinds.to_yaml(tiny_mae(objective__mask_ratio=0.5), "mae"))
    status, out, _ = call(capsys, "pretrain", str(file), "--run", str(tmp_path / "x"), "--dry-run")
    assert status == 0 and "mask_ratio: 0.5" in out and "encoder sees 8" in out
    file.write_text("kind: mae\nobjective: {mask_ratoi: 0.5}\n")
    status, _, err = call(capsys, "pretrain", str(file), "--run", str(tmp_path / "x"))
    assert status == 2 and "'objective.mask_ratio'" in err
    file.write_text(to_yaml(tiny_mae()))  # without a kind, it is for a row
    status, _, err = call(capsys, "pretrain", str(file), "--run", str(tmp_path / "x"))
    assert status == 2 and "there is no setting" in err


def test_a_pipeline_may_begin_with_mae(tmp_path):
    pipeline = tmp_path / "study.toml"
    pipeline.write_text(
        '[slurm]\ncluster = "local"\n[pretrain]\ncommand = "pretrain mae --data x --run runs/mae"\n'
        '[jobs.knn]\ncommand = "knn runs/mae --data x"\n'
    )
    first, others = read_pipeline(pipeline)
    assert first.command[:2] == ("pretrain", "mae") and others[0].name == "knn"
    pipeline.write_text(pipeline.read_text().replace("--data x --run", "--objective.mask 1 --run"))
    with pytest.raises(InputError, match="is refused"):
        read_pipeline(pipeline)


def test_the_export_is_a_stock_vit_with_the_runs_features(run, tmp_path, images):
    out = export(run, tmp_path / "out", license="mit")
    opened = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert type(opened) is timm.models.vision_transformer.VisionTransformer
    x = images.float() / 255
    with torch.no_grad():
        torch.testing.assert_close(opened(x), load_backbone(run)(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(opened(x), opened.forward_features(x)[:, 0])  # the class token
        grid = TokenMapReader(load_backbone(out), 8).tokens(x)  # what ldae segment reads
        torch.testing.assert_close(grid.flatten(1, 2), opened.forward_features(x)[:, 1:])
    card = (out / "README.md").read_text()
    assert "the class token behind the final norm" in card and "license: mit" in card
    assert "4 of 16 patches" in card and "2111.06377" in card and "2401.14404" not in card
    config = json.loads((out / "config.json").read_text())
    assert config["pretrained_cfg"]["origin_url"].endswith("2111.06377")
    assert config["images_seen"] == 32
    assert export(run, out) == out  # it holds this export already
    white = export(run, tmp_path / "white", whiten="scattered-digits:64", workers=0, device="cpu")
    assert timm.create_model(f"local-dir:{white}", pretrained=True).num_classes == 32


def test_blocks_and_the_control_of_a_run_are_graded(run, tmp_path):
    setup = Setup(workers=0, device="cpu", out=tmp_path / "graded")
    protocol = CachedProtocol(epochs=1, blocks=(0, -1), pools=("avg", "cls"))
    record = linear(str(run), "scattered-digits:64", protocol=protocol, setup=setup)
    assert record["backbone"]["images_seen"] == 32 and "top1" in record["results"]
    before, after = (load_backbone(run, random_init=True, seed=seed) for seed in (0, 1))
    assert not torch.equal(before.cls_token, after.cls_token)
    assert before.state_dict().keys() == load_backbone(run).state_dict().keys()
