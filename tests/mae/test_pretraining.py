"""An MAE pre-training is the same when interrupted, killed or divided over ranks."""

import random
import time

import pytest
import torch
from PIL import Image
from test_on_gpu import GPU, NoWaiting, fake_on_gpu
from written import assert_equal, lines, weights

from ldae import tree
from ldae.commands.pretrain import pretrain
from ldae.errors import InputError
from ldae.mae.network import MAE
from ldae.runs import kinds
from ldae.runs.checkpoints import Checkpoints
from ldae.train.interrupt import Interrupted


def assert_close(one, other):
    for name, wanted in weights(one).items():
        torch.testing.assert_close(weights(other)[name], wanted, rtol=1e-3, atol=1e-5, msg=name)


def test_images_of_the_pictures_are_opened_before_the_training(tiny_mae, tmp_path):
    config = tiny_mae(data__eval_source=str(tmp_path / "missing"))
    with pytest.raises(InputError, match="missing"):
        pretrain(config, tmp_path / "run", "mae")
    assert not (tmp_path / "run").exists()


def test_a_run_writes_its_files(tiny_mae, tmp_path):
    run = tmp_path / "run"
    config = tiny_mae(system__log_every=4, optim__epochs=3, system__knn_every=3)
    pretrain(config, run, "mae")
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "reconstructed.png"
    }  # fmt: skip
    assert (run / "config.yaml").read_text().startswith("kind: mae\n")
    assert kinds.settings_of(run, "mae") == config
    records = lines(run)
    assert records[-1]["images"] == 192 and records[-1]["loss"] < records[0]["loss"]
    assert 0 < records[-1]["top1_k20"] < 100
    assert Image.open(run / "reconstructed.png").size[1] > 3 * 64
    before = weights(run)
    assert before["pixels.pixel_std"].tolist() == pytest.approx([0.3] * 3, abs=0.02)  # of digits
    pretrain(config, run, "mae")  # a finished run stays as it is
    assert_equal(weights(run), before)
    assert lines(run) == records


def test_interrupted_equals_uninterrupted(tiny_mae, tmp_path, interrupts):
    """The run gets Ctrl-C after a few steps, twice."""
    config = tiny_mae(optim__epochs=2, system__log_every=3, optim__ema=0.9, optim__clip_grad=1.0)
    pretrain(config, tmp_path / "whole", "mae")
    run = tmp_path / "parts"
    interrupts(MAE, 4, 9)
    for seen in (32, 72):
        with pytest.raises(Interrupted, match=f"stopped at image {seen} of 128"):
            pretrain(config, run, "mae")
    pretrain(config, run, "mae")
    whole, parts = (Checkpoints(path).load() for path in (tmp_path / "whole", run))
    assert_equal(parts["model"], whole["model"])
    assert_equal(parts["average"], whole["average"])


def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(tiny_mae, fork, tmp_path):
    """The run gets kill -9 while it trains or saves, with data workers."""
    changes = {"system__workers": 1, "system__save_minutes": 0, "system__log_every": 1}
    config = tiny_mae(data__source="scattered-digits:100", optim__epochs=3, **changes)
    whole, run = tmp_path / "whole", tmp_path / "killed"
    pretrain(config, whole, "mae")
    process = fork.Process(target=pretrain, args=(config, run, "mae"))
    process.start()
    while process.is_alive() and not (run / "metrics.jsonl").exists():
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    process.join()
    pretrain(config, run, "mae")
    assert_equal(weights(run), weights(whole))


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_equal_one(fsdp, tiny_mae, tmp_path, on_ranks):
    """To fp32 tolerance; the statistics of the pixels are those of one rank too."""
    config = tiny_mae(optim__blr=1e-3)
    pretrain(config, tmp_path / "one", "mae")
    shared = tree.replace(config, {"system.fsdp": fsdp, "system.device_batch": 2})
    assert on_ranks(lambda: pretrain(shared, tmp_path / "two", "mae")) == ["", ""]
    assert_close(tmp_path / "one", tmp_path / "two")
    losses = ([line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two"))
    assert next(losses) == pytest.approx(next(losses), rel=1e-4)
    assert (tmp_path / "two" / "reconstructed.png").exists()


def test_accumulation_equals_the_full_batch(tiny_mae, tmp_path):
    pretrain(tiny_mae(optim__blr=1e-3), tmp_path / "whole", "mae")
    pretrain(tiny_mae(optim__blr=1e-3, system__device_batch=2), tmp_path / "parts", "mae")
    assert_close(tmp_path / "whole", tmp_path / "parts")


def test_given_statistics_and_grey_images(tiny_mae, tmp_path):
    config = tiny_mae(data__in_chans=1, data__mean=(0.4,), data__std=(0.3,))
    pretrain(config, tmp_path / "run", "mae")
    state = weights(tmp_path / "run")
    assert state["pixels.pixel_mean"].tolist() == pytest.approx([0.4])
    assert state["encoder.patch_embed.proj.weight"].shape == (32, 1, 8, 8)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny_mae, tmp_path, capsys):
    pretrain(tiny_mae(), tmp_path / "run", "mae", dry_run=True)
    out = capsys.readouterr().out
    for part in ("mask_ratio: 0.75", "16, of which the encoder sees 4", "64 images seen"):
        assert part in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"data.latents": "x"}, "latents are of a tokenizer, which an MAE pre-training run does"),
        ({"init_from": "nothing"}, "no folder nothing and no timm model"),
        ({"system.knn_every": 1, "system.knn_source": "nothing"}, "nothing"),
        ({"optim.warmup_epochs": 2.0}, "optim.warmup_epochs 2 must be fewer"),
        ({"optim.batch_size": 7, "system.device_batch": 2}, "cannot be cut into 4"),
        ({"data.mean": (0.5,), "data.std": (0.5,)}, "data.mean needs one number for each of 3"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(changes, sentence, tiny_mae, tmp_path):
    with pytest.raises(InputError, match=sentence):
        pretrain(tree.replace(tiny_mae(), changes), tmp_path / "run", "mae")
    assert not (tmp_path / "run").exists()


def test_nothing_makes_the_host_wait_for_a_gpu(mae, on_ranks):
    """With fake CUDA tensors, which have devices but no values."""

    def work():
        mode = fake_on_gpu(network := mae().train())
        network.bf16 = True
        with mode:
            images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device=GPU)
            positions = torch.empty(4, dtype=torch.int64, device=GPU)
            with NoWaiting():
                loss = network(images, positions, None)
        assert loss.device == GPU and loss.shape == () and loss.dtype == torch.float32

    assert on_ranks(work, ranks=1) == [""]
