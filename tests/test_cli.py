import os
import re
import signal

import pytest

from ldae import cli, noise, trajectory
from ldae.cli.arguments import check_arguments
from ldae.cli.commands import COMMANDS
from ldae.errors import LOST_RANK, InputError, LostRank


def call(capsys, *argv):
    """Return the exit status, standard output and standard error of a command."""
    try:
        status = cli.main(list(argv))
    except SystemExit as exit:  # tyro's own refusals
        status = exit.code
    out, err = capsys.readouterr()
    return status, out, err


def test_help_lists_every_command(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0 and all(command in out for command in COMMANDS)
    assert call(capsys)[1] == out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_to_type_and_whole_sentences(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line ends because the terminal does
    status, out, _ = call(capsys, command, "--help")
    assert status == 0 and "usage" in out
    assert not re.search(r"\b(INT|FLOAT|STR|None)\b|}\||default: (\)|''|False)", out)
    texts = [line.strip("│ ") for line in out.splitlines() if line.startswith("│")]
    for text in texts:
        assert text.count("`") % 2 == 0, text
        assert re.search(r"[.)]$|^─|^-", text) or text == "", text


def test_wrong_commands_rows_and_settings_name_the_nearest(capsys):
    status, _, err = call(capsys, "pretain")
    assert status == 2 and "'pretrain'" in err and len(err.splitlines()) == 1
    status, _, err = call(capsys, "pretrain", "l_dea", "--run", "x")
    assert status == 2 and "'l_dae'" in err
    status, _, err = call(capsys, "pretrain", "l_dae", "--run", "x", "--optim.bl", "1")
    assert status == 2 and "--optim.blr" in err
    status, _, err = call(capsys, "pretrain", "l_dae", "--scale", "huge", "--run", "x")
    assert status == 2 and "paper, small, demo" in err and "nearest" in err
    status, _, err = call(capsys, "pretrain", "--run", "x")
    assert status == 2 and "name a row" in err
    status, _, err = call(capsys, "fit-tokenizer", "--run", "x")
    assert status == 2 and "ldae fit-tokenizer l_dae" in err


def test_choices_come_from_their_registries(capsys, monkeypatch):
    """In help, in a command run here, and in a command checked before it is sent."""
    monkeypatch.setitem(noise.SCHEDULES, "my_own", None)
    status, out, _ = call(capsys, "pretrain", "l_dae", "--help")
    assert status == 0 and "my_own" in out and "patch_pca" in out
    argv = ["l_dae", "--run", "x", "--data", "digits", "--noise.schedule", "myown"]
    status, _, err = call(capsys, "pretrain", *argv)
    assert status == 2 and len(err.splitlines()) == 1
    assert err.startswith("ldae: noise.schedule must be ddpm or ") and "is 'my_own'" in err
    with pytest.raises(InputError, match="noise.schedule must be"):
        check_arguments("pretrain", argv)
    with pytest.raises(InputError, match="sampler must be .* nearest is 'heun'"):
        check_arguments("sample", ["x", "--sampler", "huen"])
    with pytest.raises(InputError, match="steps must be at least 1"):
        check_arguments("sample", ["x", "--steps", "0"])


def test_a_wrong_path_is_reported_in_one_sentence(capsys, tmp_path):
    argv = ["pretrain", "l_dae", "--data", str(tmp_path / "no"), "--run", str(tmp_path / "run")]
    status, _, err = call(capsys, *argv)
    assert status == 2 and str(tmp_path / "no") in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_show_prints_the_trajectory(capsys):
    _, out, _ = call(capsys, "show")
    for row in trajectory.ROWS:
        assert re.search(rf"{row.number} {row.name} +{row.accuracy}", out)


def test_show_prints_the_settings_of_a_row(capsys):
    _, out, _ = call(capsys, "show", "l_dae_single")
    assert "row 14" in out and "schedule: single" in out
    assert call(capsys, "show", "14")[1] == out
    assert "img_size: 32" in call(capsys, "show", "l_dae", "--scale", "small")[1]


def test_diff_prints_the_settings_that_differ(capsys):
    _, out, _ = call(capsys, "diff", "predict_latent", "no_input_scaling")
    assert out.splitlines() == [
        f"{'noise.schedule':32} linear_gamma2 -> linear_sigma",
        f"{'objective.weight':32} gamma2 -> inverse",
    ]


def test_settings_come_from_scale_file_and_command_line(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("tokenizer: {dim: 9}\n")
    argv = ["--scale", "demo", "--data", "digits", "--run", str(tmp_path / "run"), "--dry-run"]
    status, out, _ = call(capsys, "pretrain", str(file), *argv, "--optim.epochs", "2")
    assert status == 0
    for part in ("dim: 9", "embed_dim: 128", "epochs: 2.0", "source: digits", "steps  "):
        assert part in out


def test_the_commands_lead_from_pretraining_to_a_saved_classifier(capsys, tmp_path):
    """The main commands run at the smallest size."""
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
        status, printed, _ = call(capsys, "knn", backbone, *how, "--k", "5")
        assert status == 0 and "results.json" in printed
        scores.append(re.search(r"top1_k5 ([\d.]+)", printed)[1])
        status, printed, _ = call(capsys, "linear", backbone, *how, "--epochs", "2")
        assert status == 0
        scores.append(re.search(r"top1 ([\d.]+)", printed)[1])
    assert scores[:2] == scores[2:]
    saved = tmp_path / "classifier"
    assert call(capsys, "linear", out, *how, "--epochs", "2", "--save", str(saved))[0] == 0
    import timm

    assert timm.create_model(f"local-dir:{saved}", pretrained=True).num_classes == 10
    again = ["pretrain", "l_dae", "--scale", "demo", "--data", data, "--init-from", out, *small[6:]]
    assert call(capsys, *again, "--run", str(tmp_path / "second"))[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_of_a_scheduler_or_a_terminal_stops_a_command(number, capsys, monkeypatch):
    """A second signal does not interrupt the cleanup."""
    ended, before = [], signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP

    def show(row: str = "", /) -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append(row)

    monkeypatch.setattr("ldae.commands.show.show", show)
    assert call(capsys, "show") == (128 + number, "", "ldae: stopped\n") and ended
    signal.signal(number, before)


def test_a_lost_rank_has_its_own_exit_status(capsys, monkeypatch):
    def show(row: str = "", /) -> None:
        raise LostRank("rank 0 lost the other ranks")

    monkeypatch.setattr("ldae.commands.show.show", show)
    assert call(capsys, "show") == (LOST_RANK, "", "ldae: rank 0 lost the other ranks\n")


def test_help_shows_the_flags_of_a_cluster(capsys):
    assert "--slurm.partition" in call(capsys, "knn", "--help")[1]
    assert "--slurm.partition" in call(capsys, "submit", "--help")[1]
    assert "--slurm.partition" not in call(capsys, "show", "--help")[1]


def test_help_shows_the_flag_of_several_ranks(capsys):
    assert "--devices" in call(capsys, "knn", "--help")[1]
    assert "--devices" not in call(capsys, "export", "--help")[1]


def test_wrong_numbers_for_an_evaluation_are_refused(capsys):
    argv = ["knn", "pixels", "--data", "scattered-digits:50", "--batch-size", "-1"]
    status, _, err = call(capsys, *argv)
    assert status == 2 and "batch_size must be at least 1, not -1" in err


def test_an_output_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "text.txt").touch()
    argv = ["knn", "pixels", "--data", "scattered-digits:50", "--k", "5", "--workers", "0"]
    status, _, err = call(capsys, *argv, "--out", str(tmp_path / "text.txt"))
    assert status == 2 and "text.txt" in err and "cannot be written" in err


def test_too_many_neighbours_are_refused(capsys):
    argv = ["knn", "pixels", "--data", "scattered-digits:50", "--k", "100", "--workers", "0"]
    status, _, err = call(capsys, *argv)
    assert status == 2 and "100" in err and len(err.splitlines()) == 1
