import os
import re
import signal

import pytest

from ldae import cli, noise, trajectory
from ldae.errors import LOST_RANK, InputError, LostRank


def call(capsys, *argv):
    """Exit status, standard output and standard error of one command."""
    try:
        status = cli.main(list(argv))
    except SystemExit as exit:  # tyro's own refusals
        status = exit.code
    out, err = capsys.readouterr()
    return status, out, err


def test_help_lists_every_verb(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0 and all(verb in out for verb in cli.VERBS)
    assert call(capsys)[1] == out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys):
    status, out, _ = call(capsys, verb, "--help")
    assert status == 0 and "usage" in out


def test_wrong_verbs_rows_and_settings_get_the_nearest_name(capsys):
    status, _, err = call(capsys, "pretain")
    assert status == 2 and "'pretrain'" in err and len(err.splitlines()) == 1
    status, _, err = call(capsys, "pretrain", "l_dea", "--run", "x")
    assert status == 2 and "'l_dae'" in err
    status, _, err = call(capsys, "pretrain", "l_dae", "--run", "x", "--optim.bl", "1")
    assert status == 2 and "--optim.blr" in err
    status, _, err = call(capsys, "pretrain", "l_dae", "--scale", "huge", "--run", "x")
    assert status == 2 and "paper, small, demo" in err and "nearest" in err
    status, _, err = call(capsys, "pretrain", "--run", "x")
    assert status == 2 and "which row" in err
    status, _, err = call(capsys, "fit-tokenizer", "--run", "x")
    assert status == 2 and "ldae fit-tokenizer l_dae" in err


def test_choices_come_from_their_registries(capsys, monkeypatch):
    """In the help, in what is refused at once, and in what would be refused in a job."""
    monkeypatch.setitem(noise.SCHEDULES, "my_own", None)
    status, out, _ = call(capsys, "pretrain", "l_dae", "--help")
    assert status == 0 and "my_own" in out and "patch_pca" in out
    argv = ["l_dae", "--run", "x", "--data", "digits", "--noise.schedule", "myown"]
    status, _, err = call(capsys, "pretrain", *argv)
    assert status == 2 and len(err.splitlines()) == 1
    assert err.startswith("ldae: noise.schedule must be ddpm or ") and "is 'my_own'" in err
    with pytest.raises(InputError, match="noise.schedule must be"):
        cli.parse("pretrain", argv)
    with pytest.raises(InputError, match="sampler must be .* nearest is 'heun'"):
        cli.parse("sample", ["x", "--sampler", "huen"])
    with pytest.raises(InputError, match="steps must be at least 1"):
        cli.parse("sample", ["x", "--steps", "0"])


def test_a_wrong_path_is_one_sentence(capsys, tmp_path):
    argv = ["pretrain", "l_dae", "--data", str(tmp_path / "no"), "--run", str(tmp_path / "run")]
    status, _, err = call(capsys, *argv)
    assert status == 2 and str(tmp_path / "no") in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_show_prints_the_trajectory(capsys):
    _, out, _ = call(capsys, "show")
    for row in trajectory.ROWS:
        assert re.search(rf"{row.number} {row.name} +{row.accuracy}", out)


def test_show_prints_one_rows_configuration(capsys):
    _, out, _ = call(capsys, "show", "l_dae_single")
    assert "row 14" in out and "schedule: single" in out
    assert call(capsys, "show", "14")[1] == out
    assert "img_size: 32" in call(capsys, "show", "l_dae", "--scale", "small")[1]


def test_diff_prints_what_differs(capsys):
    _, out, _ = call(capsys, "diff", "predict_latent", "no_input_scaling")
    assert out.splitlines() == [
        f"{'noise.schedule':32} linear_gamma2 -> linear_sigma",
        f"{'objective.weight':32} gamma2 -> inverse",
    ]


def test_a_dry_run_takes_settings_of_scale_file_and_command_line(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("tokenizer: {dim: 9}\n")
    argv = ["--scale", "demo", "--data", "digits", "--run", str(tmp_path / "run"), "--dry-run"]
    status, out, _ = call(capsys, "pretrain", str(file), *argv, "--optim.epochs", "2")
    assert status == 0
    for part in ("dim: 9", "embed_dim: 128", "epochs: 2.0", "source: digits", "steps  "):
        assert part in out


def test_a_run_goes_from_pretraining_to_a_graded_classifier(capsys, tmp_path):
    """The main road by its commands, at the smallest size."""
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    data = "scattered-digits:200"
    small = ["--model.depth", "1", "--model.embed-dim", "16", "--model.num-heads", "2"]
    small += ["--optim.epochs", "1", "--optim.batch-size", "50", "--system.workers", "0"]
    argv = ["pretrain", "l_dae", "--scale", "demo", "--data", data, "--run", run, *small]
    assert call(capsys, *argv)[0] == 0
    assert call(capsys, "export", run, out)[0] == 0
    scores = []
    for backbone in (run, out):
        how = ["--data", data, "--eval-data", data, "--workers", "0"]
        status, told, _ = call(capsys, "knn", backbone, *how, "--k", "5")
        assert status == 0 and "results.json" in told
        scores.append(re.search(r"top1_k5 ([\d.]+)", told)[1])
        status, told, _ = call(capsys, "linear", backbone, *how, "--epochs", "2")
        assert status == 0
        scores.append(re.search(r"top1 ([\d.]+)", told)[1])
    assert scores[:2] == scores[2:]
    saved = tmp_path / "classifier"
    assert call(capsys, "linear", out, *how, "--epochs", "2", "--save", str(saved))[0] == 0
    import timm

    assert timm.create_model(f"local-dir:{saved}", pretrained=True).num_classes == 10
    again = ["pretrain", "l_dae", "--scale", "demo", "--data", data, *small, "--init-from", out]
    assert call(capsys, *again, "--run", str(tmp_path / "second"))[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_scheduler_ends_a_command_in_a_sentence(number, capsys, monkeypatch):
    """Once: what it sends while the command ends does not break into that."""
    ended = []

    def show(row: str = "", /) -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append(row)

    monkeypatch.setattr("ldae.commands.show.show", show)
    assert call(capsys, "show") == (128 + number, "", "ldae: stopped\n") and ended


def test_a_lost_rank_has_a_status_of_its_own(capsys, monkeypatch):
    def show(row: str = "", /) -> None:
        raise LostRank("rank 0 lost the other ranks")

    monkeypatch.setattr("ldae.commands.show.show", show)
    assert call(capsys, "show") == (LOST_RANK, "", "ldae: rank 0 lost the other ranks\n")


def test_every_verb_that_works_shows_how_it_is_sent(capsys):
    assert "--slurm.partition" in call(capsys, "knn", "--help")[1]
    assert "--slurm.partition" in call(capsys, "submit", "--help")[1]
    assert "--slurm.partition" not in call(capsys, "show", "--help")[1]


def test_wrong_numbers_of_an_evaluator_are_told(capsys):
    argv = ["knn", "pixels", "--data", "scattered-digits:50", "--batch-size", "-1"]
    status, _, err = call(capsys, *argv)
    assert status == 2 and "batch_size must be at least 1, not -1" in err


def test_a_folder_that_takes_no_results_is_told(capsys, tmp_path):
    (tmp_path / "text.txt").touch()
    argv = ["knn", "pixels", "--data", "scattered-digits:50", "--k", "5", "--workers", "0"]
    status, _, err = call(capsys, *argv, "--out", str(tmp_path / "text.txt"))
    assert status == 2 and "text.txt" in err and "cannot be written" in err


def test_too_many_neighbours_are_told(capsys):
    argv = ["knn", "pixels", "--data", "scattered-digits:50", "--k", "100", "--workers", "0"]
    status, _, err = call(capsys, *argv)
    assert status == 2 and "100" in err and len(err.splitlines()) == 1
