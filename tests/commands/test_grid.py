"""The cells of a grid are the run's blocks at each t."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ldae import cli, distributed, draws
from ldae.backbones.fold import fold
from ldae.backbones.preprocessing import preprocessing
from ldae.commands.grid import BlockReader, GridProtocol, grid, table
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.evals.features import Encoder, extract_share
from ldae.evals.taps import Tap
from ldae.files import read_object
from ldae.runs.checkpoints import Checkpoints

CPU = torch.device("cpu")
SHORT = GridProtocol(timesteps=(0, 40), leading=(1, 3), learning_rates=(0.1, 1.0), epochs=1)


@pytest.fixture
def probe(run, data, tmp_path):
    """probe(out, **changes): the cells of a short grid of the run ``probe.run``."""

    def make(out: str = "out", seed: int = 0, precision: str = "fp32", **changes) -> list[dict]:
        setup = Setup(workers=0, device="cpu", out=tmp_path / out, seed=seed, precision=precision)
        record = grid(make.run, data, protocol=replace(SHORT, **changes), setup=setup)
        return record["results"]["cells"]

    make.run = run()
    return make


@pytest.fixture
def computed(monkeypatch):
    """The timesteps that are computed; after ``limit`` of them, Ctrl-C comes within the next."""
    steps: list[int] = []

    def extract(encoder, source):
        if source.split == "eval":  # after train, so it is the middle of a pass
            if len(steps) == found.limit:
                raise KeyboardInterrupt
            steps.append(encoder.reader.t)
        return extract_share(encoder, source)

    monkeypatch.setattr("ldae.commands.grid.extract_share", extract)
    found = SimpleNamespace(steps=steps, limit=None)
    return found


@pytest.mark.parametrize("row", ["l_dae", "patch_pca", "dit"])
@pytest.mark.parametrize("noisy", [False, True])
def test_blocks_equal_what_hooks_see(row, noisy, method, images):
    trained = method(row)
    seen = []
    for block in (*trained.denoiser.encoder, *trained.denoiser.decoder):
        block.register_forward_hook(lambda module, given, out: seen.append(out.mean(1)))
    x = trained.tokenizer.normalize(images)
    indices = torch.arange(8) + 3
    reader = BlockReader(trained, 40, (1, 3, 4), noisy, seed=5, first=100)
    with torch.no_grad():
        found = reader(x, indices)
        seen.clear()
        z = trained.gamma[40] * trained.encode(x)
        if noisy:
            z = z + trained.sigma[40] * draws.normal(5, 100 + indices, z.shape[1:])
        trained.predict(z, torch.full((8,), 40))
    for number, vector in zip((0, 2, 3), found, strict=True):
        torch.testing.assert_close(vector, seen[number])


def test_the_encoders_last_block_equals_the_backbone(method, pictures):
    """Unfolded equals folded at the exported t, with clean input."""
    trained, source = method(), pictures(5)
    backbone = fold(trained)
    rows = extract_share(
        Encoder(
            trained,
            CPU,
            "fp32",
            preprocessing(backbone),
            BlockReader(trained, 10, (2,), False, 0, 0),
        ),
        source,
    )
    wanted = extract_share(Encoder(backbone, CPU), source)
    torch.testing.assert_close(rows.features, wanted.features, rtol=1e-4, atol=1e-4)
    assert rows.columns == {Tap(1, "avg"): slice(0, 32)}


def test_noise_depends_on_images_and_not_on_batches(method, pictures):
    trained, source = method(), pictures(7)
    transform = preprocessing(fold(trained))

    def found(batch_size, seed=0):
        reader = BlockReader(trained, 400, (1, 2), True, seed, 0)
        encoder = Encoder(trained, CPU, "fp32", transform, reader, batch_size)
        return extract_share(encoder, source).features

    torch.testing.assert_close(found(2), found(7), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found(7), found(7, seed=1), atol=1e-2)


def test_the_command_writes_a_table_a_picture_and_every_cell(run, tmp_path, capsys):
    setup = Setup(workers=0, device="cpu", out=tmp_path / "out", seed=3)
    protocol = GridProtocol(
        timesteps=(0, 40),
        leading=(3, 1),
        inputs=("clean", "noisy"),
        learning_rates=(0.1, 1.0),
        epochs=1,
    )
    folder = run()
    record = grid(folder, "digits", protocol=protocol, setup=setup)
    results = record["results"]
    cells = results["cells"]
    assert [(c["input"], c["t"], c["leading"]) for c in cells] == [
        (given, t, number) for given in ("clean", "noisy") for t in (0, 40) for number in (1, 3)
    ]
    best = max(cell["held_out_top1"] for cell in cells)
    assert results["held_out_top1"] == best and results["top1"] in [c["top1"] for c in cells]
    printed = capsys.readouterr().out
    places = [f"{given} input, t = {t}" for given in ("clean", "noisy") for t in (0, 40)]
    assert [line for line in printed.splitlines() if line.startswith("pass ")] == [
        f"pass {number} of 4: {place}" for number, place in enumerate(places, 1)
    ]
    place = f"{results['input']} input, t = {results['t']}, leading blocks {results['leading']}; "
    assert place in printed.splitlines()[-1] and "grid.md" in printed.splitlines()[-1]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"] == results
    written = (tmp_path / "out" / "grid.md").read_text()
    assert written.count("**") == 2 and f"**{results['top1']:.2f}**" in written
    assert "chosen on the images that it is measured on" in written
    assert Image.open(tmp_path / "out" / "grid.png").width > 200
    assert record["protocol"]["noise"] == {"draws_per_image": 1, "seed": 3}
    assert (
        written.count("each image has one draw of noise, by seed 3, at every t and in all epochs")
        == 1
    )
    clean = replace(protocol, inputs=("clean",))
    record = grid(folder, "digits", protocol=clean, setup=setup)
    assert record["protocol"]["noise"] is None
    assert "draw of noise" not in (tmp_path / "out" / "grid.md").read_text()


def test_a_killed_grid_goes_on_with_the_pass_that_was_stopped(probe, computed, tmp_path, capsys):
    undisturbed = probe("whole")
    computed.steps.clear()
    computed.limit = 1
    with pytest.raises(KeyboardInterrupt):
        probe()
    assert computed.steps == [0] and not (tmp_path / "out" / "results.json").exists()
    assert "passes kept: 1 of 2; the same command goes on" in capsys.readouterr().out
    computed.limit = None
    assert probe() == undisturbed and computed.steps == [0, 40]
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("pass ")] == [
        "pass 1 of 2: clean input, t = 0, finished before",
        "pass 2 of 2: clean input, t = 40",
    ]
    assert sum("updates are few" in line for line in lines) == 1
    for name in ("grid.md", "grid.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_grid_computes_only_the_passes_that_are_new(probe, computed):
    first = probe()
    assert probe() == first and computed.steps == [0, 40]
    more = probe(timesteps=(0, 20, 40))
    assert computed.steps == [0, 40, 20]
    assert [cell for cell in more if cell["t"] != 20] == first
    both = probe(inputs=("clean", "noisy"))
    assert computed.steps == [0, 40, 20, 0, 40]
    assert [cell for cell in both if cell["input"] == "clean"] == first


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"precision": "bf16"}, {"learning_rates": (0.1,)}, {"leading": (1, 2)}],
)
def test_passes_with_other_settings_do_not_count(changes, probe, computed):
    probe()
    assert probe(**changes) == probe("other", **changes)
    assert computed.steps == [0, 40] * 3


def test_passes_of_other_weights_do_not_count(probe, computed):
    """The last block of the decoder, which no backbone has."""
    probe()
    saved = Checkpoints(probe.run).load()
    name = [name for name in saved["model"] if name.startswith("denoiser.decoder.")][-1]
    saved["model"][name] += 1
    Checkpoints(probe.run).save(saved | {"images_seen": 16})
    probe()
    assert computed.steps == [0, 40] * 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_passes_of_other_images_do_not_count(split, probe, computed, data):
    probe()
    path = next((data / split / "0").iterdir())
    status = path.stat()
    os.utime(path, (status.st_atime, status.st_mtime + 5))  # as of a replaced file
    probe()
    assert computed.steps == [0, 40] * 2


def test_a_torn_file_is_no_pass(probe, computed, tmp_path):
    first = probe()
    kept = sorted((tmp_path / "out" / "passes").iterdir())
    assert len(kept) == 2
    for path in kept:
        path.write_bytes(path.read_bytes()[:-9])
    computed.limit = 2
    with pytest.raises(KeyboardInterrupt):
        probe()
    assert not any(path.exists() for path in kept)  # so that a new one is progress of a job
    computed.limit = None
    assert probe() == first and computed.steps == [0, 40] * 2


def test_ranks_agree_on_the_passes_that_only_rank_0_sees(probe, computed, on_ranks, monkeypatch):
    computed.limit = 1
    with pytest.raises(KeyboardInterrupt):
        probe()
    computed.limit = None

    def read(path):
        return {} if distributed.rank() else read_object(path)

    def both():
        probe()
        assert computed.steps == [0, 40]

    monkeypatch.setattr("ldae.commands.grid.read_object", read)
    assert on_ranks(both) == ["", ""]


def test_help_says_that_each_image_has_one_draw_of_noise(capsys):
    with pytest.raises(SystemExit):
        cli.main(["grid", "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "each image has one draw of noise, by --seed, at every t and in all epochs" in words


def test_table_has_a_row_for_each_t():
    cells = [
        {"input": "clean", "t": t, "leading": n, "top1": 10.0 * t + n, "held_out_top1": -n - t}
        for t in (0, 1)
        for n in (1, 2)
    ]
    lines = table(cells, cells[0], seed=0).splitlines()
    assert lines[2:6] == [
        "| t \\ leading blocks | 1 | 2 |",
        "| --- | --: | --: |",
        "| 0 | **1.00** | 2.00 |",
        "| 1 | 11.00 | 12.00 |",
    ]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, (0, 10, 20, 40, 80)),
        ({"noise__steps": 500}, (0, 5, 10, 20, 40)),
        ({"noise__steps": 50}, (0, 1, 2, 4)),
        ({"noise__schedule": "single"}, (0,)),
    ],
)
def test_default_timesteps_are_the_same_shares_of_every_schedule(
    changes, expected, run, monkeypatch
):
    opened = []

    def open_evaluation(task, spec, data, eval_data, protocol, setup):
        opened.append(protocol.timesteps)
        raise InputError("enough")

    monkeypatch.setattr("ldae.commands.grid.open_evaluation", open_evaluation)
    with pytest.raises(InputError, match="enough"):
        grid(run(**changes), "digits")
    assert opened == [expected]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timesteps": (1000,)}, "timesteps 1000: .* has timesteps 0 to 999"),
        ({"leading": (5,)}, "leading 5: .* has leading 1 to 4"),
    ],
)
def test_what_a_run_lacks_is_refused_before_the_work(run, given, message, monkeypatch):
    monkeypatch.setattr("ldae.commands.grid.open_evaluation", None)
    folder = run()
    with pytest.raises(InputError, match=message):
        grid(folder, "digits", protocol=GridProtocol(**given))
    with pytest.raises(InputError, match="an untrained network has no t"):
        grid(folder, "digits", setup=Setup(random_init=True))


def test_what_is_named_twice_is_probed_once():
    given = GridProtocol(timesteps=(40, 0, 40), leading=(2, 1, 2), inputs=("noisy", "noisy"))
    assert given == GridProtocol(timesteps=(40, 0), leading=(1, 2), inputs=("noisy",))


def test_inputs_must_not_be_empty():
    with pytest.raises(InputError, match="inputs must name at least one"):
        GridProtocol(inputs=())


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        grid(tmp_path, "digits")
