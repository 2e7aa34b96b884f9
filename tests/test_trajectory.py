import pytest

import ldae
from ldae import trajectory
from ldae.errors import InputError
from ldae.method import build, build_tokenizer
from ldae.settings import Config
from ldae.train.optim import peak_lr
from ldae.tree import difference, flatten, replace


def test_the_defaults_are_l_dae_at_the_papers_scale():
    assert ldae.config("l_dae", scale="paper") == Config()


def test_each_row_differs_by_exactly_its_changes():
    for before, after in zip(trajectory.ROWS, trajectory.ROWS[1:]):
        changed = difference(ldae.config(before.name), ldae.config(after.name))
        assert {name: new for name, (_, new) in changed.items()} == after.changes
        assert 1 <= len(after.changes) <= 3
        assert after.number == before.number + 1


@pytest.mark.parametrize("name", ["", "None", 0, 15])
def test_what_names_no_row_is_refused(name):
    with pytest.raises(InputError, match="there is no row"):
        trajectory.row(name)


def test_rows_outside_the_trajectory_differ_by_exactly_their_changes():
    for row in trajectory.BESIDE:
        changed = difference(ldae.config(row.base), ldae.config(row.name))
        assert {name: new for name, (_, new) in changed.items()} == row.changes | row.recipe
        assert row.number is None and row.accuracy is None


def test_rows_1_3_and_4_differ_by_one_number_each():
    assert difference(ldae.config("unconditional"), ldae.config("no_perceptual")) == {
        "tokenizer.perceptual_weight": (1.0, 0.0)
    }
    assert difference(ldae.config("no_perceptual"), ldae.config("no_adversarial")) == {
        "tokenizer.adversarial_weight": (0.5, 0.0)
    }


def test_latent_scale_changes_with_the_tokenizer_of_row_6(tiny):
    """One factor as in DiT, until tokenizers are patch-wise: then a factor for each axis."""
    rows = trajectory.ALL
    scales = {row.number or row.name: build_tokenizer(tiny(row.name)).scale for row in rows}
    assert all(
        scales[number] == ("global" if number < 6 else "per-axis") for number in range(1, 15)
    )
    assert "scale" in trajectory.row(6).summary and "scale" not in trajectory.row(5).summary
    assert (scales["dae"], scales["vqvae"], scales["vqgan"]) == ("raw", "global", "global")


# The numbers of the paper, copied a second time from its text.
PUBLISHED = {
    1: (57.5, 11.6), 2: (62.5, 30.9), 3: (58.4, 54.3), 4: (59.0, 75.6), 5: (63.4, 93.2),
    6: (64.9, None), 7: (64.7, None), 8: (65.1, None), 9: (62.4, None), 10: (63.6, None),
    11: (63.6, None), 12: (63.9, None), 13: (64.5, None), 14: (61.5, None),
}  # fmt: skip


def test_published_numbers():
    assert {row.number: (row.accuracy, row.fid) for row in trajectory.ROWS} == PUBLISHED


def test_the_papers_recipe():
    config = flatten(ldae.config("l_dae"))
    assert config["optim.batch_size"] == 2048 and config["optim.epochs"] == 400
    assert config["optim.blr"] * 2048 / 256 == pytest.approx(8e-4)
    assert config["optim.warmup_epochs"] == 100 and config["optim.weight_decay"] == 0
    assert config["model.name"] == "vit_large_patch16_224" and config["model.depth"] == 12
    assert config["data.img_size"] == 256 and config["data.crop"] == "center"
    assert not config["data.flip"] and config["model.cond_ratio"] == 0.25
    assert ldae.config("no_adversarial").tokenizer.dim == 16


def test_the_recipe_of_ddpm():
    """Steps are those of CIFAR-10, of 50,000 images; the rate is constant after its warm-up."""
    optim = ldae.config("ddpm").optim
    assert (optim.epochs * 50_000 / 128, optim.warmup_epochs * 50_000 / 128) == (800_000, 5_000)
    assert peak_lr(optim) == optim.min_lr == 2e-4 and optim.weight_decay == 0
    assert (optim.batch_size, optim.clip_grad, optim.ema) == (128, 1, 0.9999)


def test_rows_have_a_name_and_a_number():
    assert trajectory.row(13) == trajectory.row("13") == trajectory.row("l_dae")
    assert trajectory.row("l_dae_single").number == 14


@pytest.mark.parametrize("scale", trajectory.SCALES)
def test_a_row_is_known_by_its_settings_at_any_scale(scale):
    for row in trajectory.ALL:
        config = ldae.config(row.name, scale)
        assert trajectory.row_of(config) == row
        larger = {"model.depth": 28, "tokenizer.dim": 64, "optim.ema": 0.9999}
        assert trajectory.row_of(replace(config, larger)) == row
        if config.tokenizer.scale == "auto":  # as a run's config.yaml has it
            named = {"tokenizer.scale": build_tokenizer(config).scale}
            assert trajectory.row_of(replace(config, named)) == row
    assert trajectory.row_of(replace(ldae.config("dit"), {"noise.schedule": "cosine"})) is None


def test_the_refusal_of_a_wrong_name_has_the_nearest():
    with pytest.raises(InputError, match="'l_dea'.*'l_dae'"):
        ldae.config("l_dea")
    with pytest.raises(InputError, match="'huge'.*paper, small, demo"):
        ldae.config("l_dae", scale="huge")


@pytest.mark.parametrize("scale", trajectory.SCALES)
def test_every_row_builds_at_every_scale(scale):
    for row in trajectory.ALL:
        config = ldae.config(row.name, scale)
        assert config.objective == ldae.config(row.name).objective
        assert replace(config, flatten(config)) == config  # with types and values that are taken
        if scale != "paper":  # too large to build in a test
            build(config, num_classes=10)
