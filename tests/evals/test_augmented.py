"""The probes on augmented images follow MAE's recipe, on any device and with any batch size."""

import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldae.backbones.open import load_backbone
from ldae.backbones.preprocessing import preprocessing
from ldae.commands.linear import LDAEProtocol, MAEProtocol
from ldae.data.loader import epoch_order
from ldae.data.transforms import CropTransform
from ldae.distributed import process_group
from ldae.errors import InputError
from ldae.evals.augmented import batch_sizes, optimizer_of, remove_training, train_on_augmented
from ldae.evals.features import Encoder
from ldae.evals.heads import Heads
from ldae.runs.checkpoints import Checkpoints
from ldae.train.interrupt import Interrupted

CPU = torch.device("cpu")
# At MAE's own rate a batch this small would hardly move the head.
SHORT = MAEProtocol(blr=200.0, epochs=4, warmup_epochs=1, total_batch=24, batchnorm_batch=8)


def mae_lars(weight, bias, moments, slopes, rate):
    """Update as util/lars.py, in float64: the rate outside the momentum, the bias not adapted."""
    slope = slopes[0]
    if np.linalg.norm(weight) > 0 and np.linalg.norm(slope) > 0:
        slope = slope * 0.001 * np.linalg.norm(weight) / np.linalg.norm(slope)
    for value, moment, part in zip((weight, bias), moments, (slope, slopes[1]), strict=True):
        moment *= 0.9
        moment += part
        value -= rate * moment


def test_lars_equals_maes():
    rng = np.random.default_rng(0)
    heads = Heads(1, 5, 3, SHORT)
    optimizer = optimizer_of(heads, SHORT)
    values = [part.detach().double().numpy()[0].copy() for part in (heads.weight, heads.bias)]
    moments = [np.zeros_like(value) for value in values]
    for step in range(6):
        slopes = [rng.normal(size=value.shape) * 10.0 ** rng.integers(-3, 3) for value in values]
        if step == 2:
            slopes = [0 * slope for slope in slopes]
        for part, slope in zip((heads.weight, heads.bias), slopes, strict=True):
            part.grad = torch.tensor(slope[None], dtype=torch.float32)
        rate = (0.0, 3.0, 6.4, 6.4, 1.0, 0.1)[step]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        mae_lars(*values, moments, slopes, rate)
        for part, value in zip((heads.weight, heads.bias), values, strict=True):
            np.testing.assert_allclose(part.detach()[0].numpy(), value, rtol=2e-5, atol=1e-7)


def slow_probe(model, source, protocol) -> tuple[torch.nn.BatchNorm1d, torch.nn.Linear]:
    """Train as MAE's main_linprobe.py, in float64, one of BatchNorm's batches after the other."""
    norm = torch.nn.BatchNorm1d(64, affine=False, eps=1e-6).double()
    linear = torch.nn.Linear(64, 3)
    generator = torch.Generator().manual_seed(protocol.seed)
    torch.nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
    torch.nn.init.zeros_(linear.bias)
    linear.double()
    moments = [np.zeros((3, 64)), np.zeros(3)]
    transform = CropTransform(16, 3, "random", flip=True, area=(0.08, 1.0), clip=True)
    normalize = preprocessing(model).normalize
    count = len(source)
    updates = math.ceil(protocol.epochs * count / protocol.total_batch)
    for update in range(updates):
        linear.zero_grad()
        first = update * protocol.total_batch
        for start in range(first, first + protocol.total_batch, protocol.batchnorm_batch):
            positions = range(start, start + protocol.batchnorm_batch)
            chosen = [
                int(epoch_order(protocol.seed, n // count, count)[n % count]) for n in positions
            ]
            images = torch.stack([
                transform(source.image(i), np.random.default_rng([protocol.seed, n]))
                for i, n in zip(chosen, positions, strict=True)
            ])  # fmt: skip
            with torch.no_grad():
                features = model(normalize(images)).double()
            labels = torch.tensor(source.labels[chosen])
            loss = F.cross_entropy(linear(norm(features)), labels, reduction="sum")
            (loss / protocol.total_batch).backward()
        epoch, peak = first / count, protocol.blr * protocol.total_batch / 256
        rate = peak * epoch / protocol.warmup_epochs
        if epoch >= protocol.warmup_epochs:
            length = updates * protocol.total_batch / count - protocol.warmup_epochs
            rate = peak * (1 + math.cos(math.pi * (epoch - protocol.warmup_epochs) / length)) / 2
        values = (linear.weight.data.numpy(), linear.bias.data.numpy())
        slopes = [linear.weight.grad.numpy(), linear.bias.grad.numpy()]
        mae_lars(*values, moments, slopes, rate)
    return norm, linear


@pytest.fixture(scope="module")
def vit():
    return load_backbone("test_vit", random_init=True, img_size=16)


def test_probe_follows_maes_recipe_at_any_batch_size_of_the_device(vit, pictures, tmp_path):
    source = pictures(61)
    norm, linear = slow_probe(vit, source, SHORT)
    for batch_size in (3, 64):
        folder = tmp_path / str(batch_size)
        heads, record = train_on_augmented(
            Encoder(vit, CPU, batch_size=batch_size), source, SHORT, folder
        )
        for found, wanted in (
            (heads.weight[0], linear.weight),
            (heads.bias[0], linear.bias),
            (heads.norm.running_mean, norm.running_mean),
            (heads.norm.running_var, norm.running_var),
        ):
            assert (found.double() - wanted).norm() < 1e-6 * wanted.norm()
    assert record == {
        "learning_rate": pytest.approx(200 * 24 / 256),
        "batch": 24,
        "batchnorm_batch": 8,
        "images_seen": 11 * 24,
    }
    start = Heads(1, 64, 3, SHORT).weight
    assert (heads.weight - start).norm() > 0.1 * start.norm()  # the head has moved


def test_batch_sizes_of_the_protocol_and_of_small_sets():
    mae = MAEProtocol()
    assert batch_sizes(1_281_167, mae)[:2] == (512, 32)
    assert batch_sizes(1_281_167, mae).updates == 7038  # 90 epochs
    assert batch_sizes(1348, mae) == (512, 2, 119)
    assert batch_sizes(100, mae) == (100, 1, 90)
    assert batch_sizes(1348, replace(mae, total_batch=128)) == (128, 1, 948)
    with pytest.raises(
        InputError, match="total_batch 600 is not a multiple of BatchNorm's batch of 512"
    ):
        batch_sizes(1348, replace(mae, total_batch=600))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_other_optimizers_learn_too(vit, pictures, optimizer, tmp_path):
    protocol = LDAEProtocol(
        blr=0.01, epochs=2, warmup_epochs=0, total_batch=8, batchnorm_batch=8, optimizer=optimizer
    )
    heads, _ = train_on_augmented(Encoder(vit, CPU), pictures(16), protocol, tmp_path)
    assert not torch.allclose(heads.weight, Heads(1, 64, 3, protocol).weight, atol=1e-5)


def test_features_that_are_not_finite_are_refused(pictures, tmp_path):
    model = load_backbone("pixels:16")
    model.forward = lambda images: images.flatten(1) / 0
    with pytest.raises(InputError, match="an augmented image of pictures in fp32 are not finite"):
        train_on_augmented(Encoder(model, CPU), pictures(16), SHORT, tmp_path)


@pytest.fixture
def stopped_at():
    """stopped_at(update): an encoder that gets Ctrl-C, or another signal, during that update."""

    def make(update: int, number: int = signal.SIGINT) -> Encoder:
        encoder = Encoder(load_backbone("test_vit", random_init=True, img_size=16), CPU)
        calls, original = [], encoder.on_device

        def on_device(*args):
            calls.append(1)
            if len(calls) == 3 * update:
                os.kill(os.getpid(), number)
            return original(*args)

        encoder.on_device = on_device
        return encoder

    return make


def test_a_stopped_or_killed_probe_resumes_to_the_same_bits(
    vit, pictures, stopped_at, fork, tmp_path
):
    source, encoder = pictures(61), Encoder(vit, CPU)
    whole, record = train_on_augmented(encoder, source, SHORT, tmp_path / "whole")
    folder = tmp_path / "parts"
    with pytest.raises(Interrupted, match="stopped at image 96 of 264; all progress is saved"):
        train_on_augmented(stopped_at(4), source, SHORT, folder)
    how = (stopped_at(2, signal.SIGKILL), source, SHORT, folder)
    killed = fork.Process(target=train_on_augmented, args=how)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    with pytest.raises(Interrupted, match="stopped at image 168 of 264"):
        train_on_augmented(stopped_at(3), source, SHORT, folder)
    for _ in range(2):  # the second time nothing is left to do
        parts, other = train_on_augmented(encoder, source, SHORT, folder)
        assert other == record
        for name, value in whole.state_dict().items():
            assert torch.equal(parts.state_dict()[name], value), name
        encoder = stopped_at(1)
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]
    kept = Checkpoints(folder).load()["model"]
    assert kept.keys() == whole.state_dict().keys()  # without the encoder
    theirs = folder / "checkpoints" / "theirs.pth"
    theirs.touch()
    remove_training(folder)
    assert list(theirs.parent.iterdir()) == [theirs]
    theirs.unlink()
    remove_training(folder)
    assert list(folder.iterdir()) == []


def test_checkpoints_of_another_probe_are_not_used(vit, pictures, stopped_at, tmp_path):
    for protocol, count in ((SHORT, 61), (replace(SHORT, seed=1), 61), (SHORT, 60)):
        alone = tmp_path / f"seed {protocol.seed}, {count} images"
        whole, _ = train_on_augmented(Encoder(vit, CPU), pictures(count), protocol, alone)
        with pytest.raises(Interrupted, match="stopped at image 48 of"):
            train_on_augmented(stopped_at(2), pictures(count), protocol, tmp_path)
        if count == 61:
            continue
        parts, _ = train_on_augmented(Encoder(vit, CPU), pictures(count), protocol, tmp_path)
        assert torch.equal(parts.weight, whole.weight)


def test_a_probe_begins_again_when_labels_were_corrected(vit, pictures, stopped_at, tmp_path):
    with pytest.raises(Interrupted, match="stopped at image 48 of"):
        train_on_augmented(stopped_at(2), pictures(60), SHORT, tmp_path / "run")
    corrected = pictures(60)
    corrected.labels[7] = 0
    heads = [
        train_on_augmented(Encoder(vit, CPU), corrected, SHORT, tmp_path / folder)[0]
        for folder in ("run", "alone")
    ]
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_a_probe_begins_again_with_another_preprocessing(vit, pictures, stopped_at, tmp_path):
    """The weights of many networks are the same for every size of the images."""
    with pytest.raises(Interrupted, match="stopped at image 48 of"):
        train_on_augmented(stopped_at(2), pictures(60), SHORT, tmp_path / "run")
    other = replace(preprocessing(vit), mean=(0.0, 0.1, 0.2))
    heads = [
        train_on_augmented(
            Encoder(vit, CPU, transform=other), pictures(60), SHORT, tmp_path / folder
        )[0]
        for folder in ("run", "alone")
    ]
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_two_ranks_resume_what_one_rank_began(vit, pictures, stopped_at, tmp_path, on_ranks):
    """The run stops after 5 updates of 3 groups, when the second rank is next."""
    source, encoder = pictures(61), Encoder(vit, CPU)
    whole, _ = train_on_augmented(encoder, source, SHORT, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at image 120 of"):
        train_on_augmented(stopped_at(5), source, SHORT, tmp_path)

    def work():
        with process_group(CPU):
            parts, _ = train_on_augmented(encoder, source, SHORT, tmp_path)
            torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)

    assert on_ranks(work) == ["", ""]


@pytest.mark.parametrize(("ranks", "groups", "each"), [(2, 2, 1), (2, 3, 3), (4, 6, 3)])
def test_ranks_share_the_groups_evenly(ranks, groups, each, vit, pictures, tmp_path, on_ranks):
    """With 6 groups on 4 ranks, two ranks compute the same half."""
    source, encoder = pictures(61), Encoder(vit, CPU)
    protocol = replace(SHORT, epochs=2, total_batch=8 * groups)
    whole, record = train_on_augmented(encoder, source, protocol, tmp_path / "one")

    def work():
        calls, original = [], encoder.on_device
        encoder.on_device = lambda images: calls.append(len(images)) or original(images)
        with process_group(CPU):
            found, _ = train_on_augmented(encoder, source, protocol, tmp_path / "ranks")
        assert calls == [8] * (record["images_seen"] // protocol.total_batch * each)
        for name in ("running_mean", "running_var"):  # each group once, in order
            assert torch.equal(getattr(found.norm, name), getattr(whole.norm, name))
        for part, wanted in zip(found.parameters(), whole.parameters(), strict=True):
            assert (part - wanted).norm() < 1e-6 * wanted.norm()

    assert on_ranks(work, ranks) == [""] * ranks
