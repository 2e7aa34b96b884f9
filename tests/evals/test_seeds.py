"""Several seeds give what each gives alone, and the means and the spread of these."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

import ldae
from ldae import cli
from ldae.cli.protocols import graders
from ldae.commands.rerun import rerun
from ldae.errors import InputError
from ldae.evals import features
from ldae.evals.seeds import summarise

SETUP = ldae.Setup(in_chans=1, workers=0, device="cpu")
SHORT = ldae.CachedProtocol(learning_rates=(0.1, 1.0), epochs=2, total_batch=64)
SEEDS = (0, 2, 5)


def read(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def check_summary(record: dict, singles: dict[int, dict]) -> None:
    """The means and the spread are numpy's, of the numbers of each seed alone."""
    results = record["results"]
    names = results["spread"].keys()
    assert results.keys() == {*names, "spread", "seeds"} and names
    for name in names:
        values = [single["results"][name] for single in singles.values()]
        assert results[name] == pytest.approx(np.mean(values), rel=1e-12)
        assert results["spread"][name] == pytest.approx(np.std(values, ddof=1), rel=1e-12)
        by_seed = {int(seed): one[name] for seed, one in results["seeds"].items()}
        assert by_seed == dict(zip(singles, values))


def linear(out, **setup) -> dict:
    setup = replace(SETUP, out=out, **setup)
    return ldae.linear("pixels:8", "digits", protocol=SHORT, setup=setup)


def test_means_and_spread_are_those_of_each_seed_alone(tmp_path, capsys):
    record = linear(tmp_path / "all", seeds=SEEDS)
    printed = capsys.readouterr().out
    singles = {seed: linear(tmp_path / f"{seed}", seed=seed) for seed in SEEDS}
    for seed, single in singles.items():
        own = read(tmp_path / "all" / f"seed={seed}")
        assert {**own, "environment": 0, "suite": 0} == {**single, "environment": 0, "suite": 0}
    check_summary(record, singles)
    assert record == read(tmp_path / "all")
    assert record["results"]["spread"]["top1"] > 0
    spread = record["results"]["spread"]["top1"]
    assert f"3 seeds: top1 {record['results']['top1']:.2f} ± {spread:.2f}" in printed
    assert record["protocol"]["seed"] == [*SEEDS]
    assert "seeds=0-2-5" in record["protocol"]["modified"]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_summary_is_numpys(count):
    rng = np.random.default_rng(0)
    numbers = {
        seed: {"a": float(a), "b": float(b)}
        for seed, (a, b) in enumerate(rng.normal(size=(count, 2)))
    }
    found = summarise(numbers)
    for name in ("a", "b"):
        values = [one[name] for one in numbers.values()]
        assert found[name] == pytest.approx(np.mean(values))
        spread = np.std(values, ddof=1) if count > 1 else 0.0
        assert found["spread"][name] == pytest.approx(spread)


def test_the_command_names_its_folder_by_the_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--data", "digits", "--in-chans", "1", "--workers", "0", "--device", "cpu"]
    words += ["--shots", "1", "--draws", "2", "--k", "1", "--seeds", "1", "2"]
    assert cli.main(["knn", "pixels:8", *words]) == 0
    (folder,) = tmp_path.glob("evals/pixels-8/*")
    assert folder.name.startswith("knn-dino-digits") and "seeds=1-2" in folder.name
    assert {path.name for path in folder.iterdir()} == {"results.json", "seed=1", "seed=2"}
    check_summary(read(folder), {seed: read(folder / f"seed={seed}") for seed in (1, 2)})


def test_features_are_extracted_once_for_all_seeds(tmp_path, monkeypatch):
    extracted, original = [], features.encode_share

    def encode_share(encoder, source, *how):
        extracted.append(source.split)
        return original(encoder, source, *how)

    monkeypatch.setattr(features, "encode_share", encode_share)
    linear(tmp_path, seeds=SEEDS)
    assert sorted(extracted) == ["eval", "train"]


def test_random_weights_of_each_seed_are_other_weights(tmp_path, capsys):
    setup = replace(SETUP, img_size=16, random_init=True, seeds=(0, 1), out=tmp_path)
    record = ldae.knn("test_vit", "digits", protocol=ldae.KNNProtocol(k=(5,)), setup=setup)
    singles = {
        seed: ldae.knn(
            "test_vit",
            "digits",
            protocol=ldae.KNNProtocol(k=(5,)),
            setup=replace(setup, seeds=(), seed=seed, out=tmp_path / f"{seed}"),
        )
        for seed in (0, 1)
    }
    check_summary(record, singles)
    weights = [single["backbone"]["sha256"] for single in singles.values()]
    assert record["backbone"]["sha256"] == weights and weights[0] != weights[1]
    assert record["backbone"]["seed"] == [0, 1]
    others = {"sha256": 0, "seed": 0}
    assert record["backbone"] | others == singles[0]["backbone"] | others
    assert "knn of test_vit (random init) on digits, 2 seeds" in capsys.readouterr().out
    assert rerun(tmp_path)["sentence"] == "the same to the bit"
    assert "since then" not in capsys.readouterr().out


def test_finished_seeds_are_skipped(tmp_path, capsys):
    first = linear(tmp_path, seeds=SEEDS)
    (tmp_path / "results.json").unlink()
    (tmp_path / "seed=2" / "results.json").unlink()
    kept = tmp_path / "seed=5" / "results.json"
    before = kept.stat().st_mtime_ns
    capsys.readouterr()
    assert linear(tmp_path, seeds=SEEDS)["results"] == first["results"]
    assert kept.stat().st_mtime_ns == before
    printed = capsys.readouterr().out
    assert printed.count("finished before") == 2 and "seed 2\n" in printed


def test_a_seed_that_fails_does_not_stop_the_others(tmp_path, capsys):
    (tmp_path / "seed=2").write_text("not a folder")
    with pytest.raises(InputError, match="1 of 3 seeds failed"):
        linear(tmp_path, seeds=SEEDS)
    assert (tmp_path / "seed=5" / "results.json").exists()
    assert not (tmp_path / "results.json").exists()
    assert "seed 2: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"seeds": (3,)}, {"seeds": (1, 1)}, {"seeds": (1, 2), "seed": 1}]
)
def test_one_seed_the_same_seed_and_both_settings_are_refused(wrong):
    with pytest.raises(InputError, match="seeds must be several different ones"):
        ldae.Setup(**wrong)


def test_seeds_that_decide_nothing_are_refused(tmp_path):
    setup = replace(SETUP, seeds=(0, 1), out=tmp_path)
    for grade in (ldae.knn, ldae.logreg, ldae.retrieve):
        with pytest.raises(InputError, match=f"no seed decides the results of {grade.__name__}"):
            grade("pixels:8", "digits", setup=setup)
    with pytest.raises(InputError, match="--save is one for all seeds"):
        ldae.linear("pixels:8", "digits", save=tmp_path / "c", setup=setup)
    with pytest.raises(InputError, match="knn takes one --seed, not --seeds"):
        ldae.knn.__wrapped__("pixels:8", "digits", setup=setup)
    assert not list(tmp_path.iterdir())


def test_no_seeds_are_written_into_the_folder_of_a_run(run):
    folder = run()
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match="is the folder of a run"):
        linear(folder, seeds=SEEDS)
    assert sorted(folder.rglob("*")) == before


def test_seeds_can_be_repeated(tmp_path):
    record = linear(tmp_path, seeds=(0, 1))
    found = rerun(tmp_path)
    assert found["verdict"] == "equal" and found["changed"] == []
    assert read(tmp_path / "rerun")["results"] == record["results"]
    assert (tmp_path / "rerun" / "seed=1" / "results.json").exists()


def test_ranks_grade_each_seed_together(tmp_path, on_ranks):
    assert on_ranks(lambda: linear(tmp_path, seeds=(0, 1))) == ["", ""]
    check_summary(read(tmp_path), {seed: read(tmp_path / f"seed={seed}") for seed in (0, 1)})


def test_a_fine_tuning_has_a_run_for_each_seed(run, short_tuning, tmp_path):
    config = short_tuning(run(), "scattered-digits:40")
    record = ldae.finetune(config, tmp_path / "all", seeds=(0, 3))
    alone = ldae.finetune(replace(config, seed=3), tmp_path / "3")
    own = read(tmp_path / "all" / "seed=3")
    assert own["results"] == alone["results"]
    assert own["backbone"]["sha256"] == alone["backbone"]["sha256"]
    check_summary(record, {0: read(tmp_path / "all" / "seed=0"), 3: own})
    assert record == read(tmp_path / "all")
    with pytest.raises(InputError, match="holds one run, not several seeds"):
        ldae.finetune(config, tmp_path / "3", seeds=(0, 3))
    with pytest.raises(InputError, match="seeds must be several different ones"):
        ldae.finetune(config, tmp_path / "one", seeds=(3,))


def test_the_command_line_gives_a_fine_tuning_its_seeds(monkeypatch, capsys):
    called = []

    def finetune(config, run=None, dry_run=False, seeds: tuple[int, ...] = ()):
        called.append((config.seed, str(run), seeds))

    monkeypatch.setattr("ldae.commands.finetune.finetune", finetune)
    words = ["finetune", "pixels:8", "--recipe", "mae", "--data", "digits", "--run", "x"]
    assert cli.main([*words, "--seeds", "1", "2"]) == 0 and cli.main([*words, "--seed", "4"]) == 0
    assert called == [(0, "x", (1, 2)), (4, "x", ())]
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "l_dae", "--data", "digits", "--run", "x", "--seeds", "1", "2"])
    assert "--seeds" in capsys.readouterr().err


SUITE = """
[data.digits]
train = "digits"
[protocols.knn]
k = [5]
[protocols.linear]
epochs = 1
learning_rates = [0.1]
"""


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "suite.toml"
    path.write_text(SUITE)
    return path


def table_of(folder) -> tuple[dict, dict, str]:
    entries = json.loads((folder / "table.json").read_text())["cells"]
    lines = csv.DictReader((folder / "table.csv").read_text().splitlines())
    return (
        {entry["protocol"]: entry for entry in entries},
        {(line["protocol"], line["metric"]): (line["value"], line["spread"]) for line in lines},
        (folder / "table.md").read_text(),
    )


def test_a_table_shows_the_mean_and_the_spread(suite, tmp_path):
    """Where no seed decides the numbers, there is one result."""
    out = tmp_path / "out"
    setup = replace(SETUP, out=out, seeds=SEEDS)
    ldae.evaluate(("pixels:8",), suite=suite, setup=setup)
    entries, lines, text = table_of(out)
    assert (out / "pixels-8" / "digits" / "knn" / "results.json").exists()
    folder = out / "pixels-8" / "digits" / "linear"
    values = [read(folder / f"seed={seed}")["results"]["top1"] for seed in SEEDS]
    mean, spread = np.mean(values), np.std(values, ddof=1)
    assert entries["linear"]["results"]["top1"] == pytest.approx(mean)
    assert entries["linear"]["spread"]["top1"] == pytest.approx(spread)
    assert [one["results"]["top1"] for one in entries["linear"]["seeds"].values()] == values
    assert f"| {mean:.2f} ± {spread:.2f} |" in text
    assert [float(part) for part in lines["linear", "top1"]] == pytest.approx([mean, spread])
    assert "seeds" not in entries["knn"] and lines["knn", "top1_k5"][1] == ""
    (folder / "seed=2" / "results.json").unlink()
    (folder / "seed=2").rmdir()
    (folder / "seed=2").write_text("not a folder")
    with pytest.raises(InputError, match="1 of 4 cells failed"):
        ldae.evaluate(("pixels:8",), suite=suite, setup=setup)
    entries, _, text = table_of(out)
    values = [values[0], values[2]]
    mean, spread = np.mean(values), np.std(values, ddof=1)
    assert f"| {mean:.2f} ± {spread:.2f} (2 of 3 seeds) |" in text
    assert "linear of pixels-8 on digits: seed 2: " in text


def test_a_suite_names_the_seeds_of_a_protocol(suite, tmp_path):
    suite.write_text(SUITE + "seeds = [0, 1]\n")
    table = ldae.evaluate(("pixels:8",), suite=suite, setup=replace(SETUP, out=tmp_path / "out"))
    assert [[*entry.get("seeds", [])] for entry in table["cells"]] == [[], ["0", "1"]]


def test_cells_with_the_same_random_weights_follow_each_other(suite, tmp_path):
    from ldae.evals.suite import read_suite

    setup = replace(SETUP, out=tmp_path, seeds=(0, 1), random_init=True)
    cells = read_suite(suite, ("test_vit",), setup, graders())
    assert [(cell.column.name, cell.setup.seed) for cell in cells] == [
        ("knn", 0), ("linear", 0), ("knn", 1), ("linear", 1)
    ]  # fmt: skip
    assert len({cell.name for cell in cells}) == 4
