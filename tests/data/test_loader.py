import errno
import itertools

import numpy as np
import pytest
import torch

from ldae.data.image import BadImage
from ldae.data.loader import crop_batches, eval_batches, train_batches
from ldae.data.open import open_source
from ldae.data.source import Source
from ldae.data.transforms import CropTransform
from ldae.data.workers import Batch
from ldae.errors import InputError

N = 23
TRANSFORM = CropTransform(8, crop="random", flip=True)


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source(f"scattered-digits:{N}", "train")


def stream(source, **settings) -> list[Batch]:
    settings = {"seed": 1, "start": 0, "batch_size": 12, "stop": 72, **settings}
    return list(train_batches(source, TRANSFORM, **settings))


def join(batches) -> Batch:
    images, targets, positions, bad = zip(*batches)
    return Batch(torch.cat(images), torch.cat(targets), torch.cat(positions), sum(bad, []))


def assert_equal(one: Batch, other: Batch) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3])) and one.bad == other.bad


def test_a_batch_has_the_documented_types(digits):
    first = stream(digits)[0]
    assert first.images.shape == (12, 3, 8, 8) and first.images.dtype == torch.uint8
    assert first.targets.dtype == first.positions.dtype == torch.int64
    assert first.positions.tolist() == list(range(12)) and first.bad == []


@pytest.mark.parametrize("world_size, micro_batches", [(1, 3), (2, 1), (3, 2), (4, 3)])
def test_every_division_of_the_global_batch_has_the_same_images(digits, world_size, micro_batches):
    ranks = [
        stream(digits, rank=rank, world_size=world_size, micro_batches=micro_batches)
        for rank in range(world_size)
    ]
    for n, global_batch in enumerate(stream(digits)):
        parts = [
            ranks[rank][n * micro_batches + micro]
            for micro in range(micro_batches)
            for rank in range(world_size)
        ]
        assert {len(part.targets) for part in parts} == {12 // world_size // micro_batches}
        assert_equal(join(parts), global_batch)


@pytest.mark.parametrize("start", [12, 24, 60])
def test_a_stream_from_image_n_is_the_tail_of_the_stream_from_0(digits, start):
    assert_equal(join(stream(digits, start=start)), join(stream(digits)[start // 12 :]))


def test_the_order_does_not_depend_on_the_batch_size(digits):
    assert_equal(join(stream(digits, batch_size=8)), join(stream(digits)))


def test_a_stream_without_stop_is_endless(digits):
    endless = train_batches(digits, TRANSFORM, seed=1, start=0, batch_size=12)
    assert_equal(join(itertools.islice(endless, 6)), join(stream(digits)))


def test_spawned_workers_give_the_same_batches(digits, monkeypatch):
    """As on macOS."""
    wanted = join(stream(digits, stop=12))
    monkeypatch.setattr("ldae.data.workers._START", "spawn")
    assert_equal(join(stream(digits, stop=12, workers=1)), wanted)


class Numbered(Source):
    """Images of two channels and one pixel that is their index."""

    def __init__(self, length: int, bad: frozenset[int] = frozenset()):
        super().__init__("numbered", "all", None, None)
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def image(self, i: int) -> np.ndarray:
        if i in self.bad:
            raise BadImage(f"{self.where(i)} cannot be decoded: it is bad")
        return np.full((1, 1, 2), i, np.uint8)


def joined_stream(source: Source, **settings) -> Batch:
    settings = {"seed": 0, "start": 0, "batch_size": 5, "stop": 3 * len(source), **settings}
    return join(train_batches(source, CropTransform(1, in_chans=2), **settings))


def indices(batch: Batch) -> list[int]:
    return batch.images[:, 0, 0, 0].tolist()


def test_each_epoch_has_every_image_once_in_a_new_order():
    order = indices(joined_stream(Numbered(15)))
    epochs = [order[:15], order[15:30], order[30:]]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert order != indices(joined_stream(Numbered(15), seed=1))


def test_an_image_is_augmented_differently_in_each_epoch_and_seed(digits):
    def crops(seed: int) -> set[bytes]:
        batches = join(stream(digits, seed=seed, batch_size=N, stop=3 * N))
        return {image.numpy().tobytes() for image in batches.images}

    assert len(crops(1)) == len(crops(2)) == 3 * N
    assert len(crops(1) & crops(2)) < N // 4  # crops of black corners can be equal


def test_unlabelled_images_have_label_minus_one():
    assert set(joined_stream(Numbered(10)).targets.tolist()) == {-1}


class Boxed(Numbered):
    """Images with as many boxes as their index says."""

    def target(self, i: int) -> dict:
        return {"boxes": torch.full((i, 4), i), "area": (torch.tensor(16 * i),)}


@pytest.mark.parametrize("workers", [0, 2])
def test_trees_of_targets_stay_with_their_images(workers):
    how = {"seed": 0, "start": 0, "stop": 20, "batch_size": 5, "workers": workers}
    batches = list(train_batches(Boxed(10), CropTransform(1, in_chans=2), **how))
    assert sorted(n for batch in batches for n in indices(batch)) == sorted([*range(10)] * 2)
    for batch in batches:
        assert isinstance(batch.targets, list) and len(batch.targets) == 5
        for n, target in zip(indices(batch), batch.targets, strict=True):
            assert torch.equal(target["boxes"], torch.full((n, 4), n))
            assert target["area"] == (torch.tensor(16 * n),)


def test_tensors_as_targets_are_stacked():
    source = Boxed(10)
    source.target = lambda i: torch.tensor([i, -i])
    batch = joined_stream(source, stop=5)
    assert batch.targets.tolist() == [[n, -n] for n in indices(batch)]


def test_workers_change_nothing_and_leave_the_global_rng_alone(digits):
    state = torch.get_rng_state()
    assert_equal(join(stream(digits, workers=2)), join(stream(digits)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_the_stream_with_its_message(workers):
    with pytest.raises(BadImage) as caught:
        joined_stream(Numbered(10, bad=frozenset({4})), workers=workers)
    assert str(caught.value) == "numbered/all/000004 cannot be decoded: it is bad"


def test_a_training_names_the_setting_that_skips_a_bad_image():
    with pytest.raises(BadImage, match="it is bad; with data.bad_images skip, the next takes its"):
        joined_stream(Numbered(10, bad=frozenset({4})), bad_images="stop")


class OnDrive(Numbered):
    """Images that a drive no longer gives, or that are not there."""

    def __init__(self, number: int):
        super().__init__(10)
        self.number = number

    def image(self, i: int) -> np.ndarray:
        try:
            raise OSError(self.number, "no image")
        except OSError as error:
            raise BadImage(f"{self.where(i)} cannot be read") from error


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_drive_stops_the_stream_and_is_no_bad_image(workers):
    away, crop = OnDrive(errno.ESTALE), CropTransform(1, in_chans=2)
    for bad_images in ("stop", "skip", None):
        with pytest.raises(BadImage, match=r"^numbered/all/00000\d cannot be read$"):
            joined_stream(away, bad_images=bad_images, workers=workers)
    with pytest.raises(BadImage, match="^numbered/all/000000 cannot be read$"):
        next(crop_batches(away, crop, range(10), 5, workers))
    missing = next(crop_batches(OnDrive(errno.ENOENT), crop, range(10), 5, workers))
    assert len(missing.bad) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_image_is_replaced_by_the_next_readable_one(workers):
    order = indices(joined_stream(Numbered(10)))
    bad = frozenset(order[3:5])
    batch = joined_stream(Numbered(10, bad), bad_images="skip", workers=workers)
    expected = []
    for epoch in (order[:10], order[10:20], order[20:]):
        for place in range(10):
            expected.append(next(i for i in epoch[place:] + epoch[:place] if i not in bad))
    assert indices(batch) == expected
    assert batch.positions.tolist() == list(range(30))
    names = [f"all/{i:06d}" for i in bad]
    assert set(batch.bad) == {
        (name, f"numbered/{name} cannot be decoded: it is bad") for name in names
    }


def test_skipping_does_not_depend_on_where_the_stream_starts():
    source = Numbered(10, bad=frozenset({1, 2, 7}))
    tail = joined_stream(source, bad_images="skip", start=15)
    assert indices(tail) == indices(joined_stream(source, bad_images="skip"))[15:]


def test_only_bad_images_are_an_error_not_an_endless_loop():
    with pytest.raises(InputError, match="none of the 10 images of numbered can be decoded"):
        joined_stream(Numbered(10, bad=frozenset(range(10))), bad_images="skip")


def test_an_image_that_does_not_fit_in_chans_is_named(digits):
    batches = train_batches(digits, CropTransform(8, in_chans=5), seed=0, start=0, batch_size=1)
    with pytest.raises(BadImage, match=r"^scattered-digits:23/train/0000\d\d is a RGB image where"):
        next(batches)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 10, "world_size": 4},
        {"batch_size": 0},
        {"bad_images": "ignore"},
        {"workers": -1},
    ],
)
def test_invalid_settings_are_refused_at_once(digits, settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        train_batches(digits, TRANSFORM, **{"seed": 0, "start": 0, "batch_size": 12, **settings})


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_keeps_the_order_of_the_indices(digits, workers):
    chosen = np.array([5, 3, 22, 0, 5, 17, 1])
    batches = list(eval_batches(digits, CropTransform(32), chosen, 3, workers))
    assert [len(labels) for _, labels, _ in batches] == [3, 3, 1]
    images, labels, indices = map(torch.cat, zip(*batches))
    assert indices.tolist() == chosen.tolist()
    assert labels.tolist() == digits.labels[chosen].tolist()
    for image, i in zip(images, chosen):
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(digits.image(i)))


def test_evaluation_refuses_a_bad_image():
    with pytest.raises(BadImage, match="000002"):
        list(eval_batches(Numbered(5, frozenset({2})), CropTransform(1, 2), range(5), 2, 0))


class Mirror:
    """A joint transform that mirrors half of the images, and says which by the target."""

    def joint(self, image, target, rng):
        mirrored = rng.random() < 0.5
        pixels = torch.from_numpy(np.asarray(image).copy())
        return (pixels.flip(1) if mirrored else pixels), -1 - target if mirrored else target


def test_a_joint_transform_changes_image_and_target_together(digits):
    labels = torch.from_numpy(digits.labels)
    (batch,) = train_batches(digits, Mirror(), seed=1, start=0, stop=1, batch_size=N)
    assert {*(batch.targets < 0).tolist()} == {False, True}
    plain = {
        (label, np.asarray(digits.image(i)).tobytes()) for i, label in enumerate(labels.tolist())
    }
    for pixels, target in zip(batch.images, batch.targets.tolist()):
        image = pixels.flip(1) if target < 0 else pixels
        assert (max(target, -1 - target), image.numpy().tobytes()) in plain
