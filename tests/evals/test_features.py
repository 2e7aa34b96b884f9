"""Features depend on images, not on batches, order or ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ldae.backbones.open import load_backbone
from ldae.backbones.preprocessing import preprocessing
from ldae.commands.linear import CachedProtocol, MAEProtocol
from ldae.commands.logreg import LogregProtocol, logistic_regression
from ldae.commands.retrieve import RetrievalProtocol, retrieval
from ldae.commands.segment import SegmentProtocol, segmentation
from ldae.data.digits import ScatteredDigits
from ldae.data.source import Source
from ldae.distributed import process_group, rank
from ldae.errors import InputError
from ldae.evals.augmented import train_on_augmented
from ldae.evals.features import Encoder, Features, cache_features, extract_share, gather_rows
from ldae.evals.heads import grade_heads, train_heads
from ldae.evals.neighbours import KNNProtocol, knn_accuracy
from ldae.evals.taps import Tap, TapReader, TokenMapReader

CPU = torch.device("cpu")
TAPS = (Tap(), Tap(2, "cls+avg"), Tap(2, "cls"))


@pytest.fixture(scope="module")
def vit():
    return load_backbone("test_vit", random_init=True, img_size=16)


def extract(model, source, batch_size=256, precision="fp32", taps=(Tap(),)) -> Features:
    reader = TapReader(model, taps)
    return extract_share(Encoder(model, CPU, precision, None, reader, batch_size), source)


def test_features_are_the_backbones_in_the_order_of_the_source(vit, pictures):
    source = pictures(5)
    found = extract(vit, source, batch_size=5)
    transform = preprocessing(vit)
    pixels = torch.stack([transform(source.image(i), np.random.default_rng(0)) for i in range(5)])
    with torch.inference_mode():
        assert torch.equal(found.features, vit(transform.normalize(pixels)))
    assert found.labels.tolist() == source.labels.tolist()
    assert found.features.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_batch_size_does_not_matter(vit, pictures, batch_size):
    source = pictures(11)
    reference = extract(vit, source, batch_size=11, taps=TAPS).features
    found = extract(vit, source, batch_size=batch_size, taps=TAPS).features
    assert (found - reference).norm() < 1e-5 * reference.norm()


def test_order_of_the_source_does_not_matter(vit, pictures):
    source, shuffled = pictures(11), pictures(11)
    order = np.random.default_rng(1).permutation(11)
    shuffled.pixels, shuffled.labels = source.pixels[order], source.labels[order]
    wanted = extract(vit, source, batch_size=4)
    found = extract(vit, shuffled, batch_size=4)
    assert (found.features - wanted.features[order]).norm() < 1e-5 * wanted.features.norm()
    assert torch.equal(found.labels, wanted.labels[order])


def test_cached_features_are_extracted_once_for_each_way_to_extract_them(vit, pictures):
    source, other = pictures(3), pictures(3)
    other.split = "eval"

    def kept():
        ways = [(source, "fp32", TAPS), (source, "fp32", TAPS[:1]), (source, "bf16", TAPS)]
        found = [
            extract(vit, images, precision=precision, taps=taps).features
            for images, precision, taps in [*ways, (other, "fp32", TAPS)]
        ]
        return found, [rows.data_ptr() for rows in found]

    (alone, places), (_, others) = kept(), kept()
    assert set(places).isdisjoint(others)
    with cache_features():
        (found, places), (_, again) = kept(), kept()
        assert len(set(places)) == 4 and places == again
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert set(kept()[1]).isdisjoint(places)


def test_taps_are_columns_and_do_not_change_the_output(vit, pictures):
    found = extract(vit, pictures(5), taps=TAPS)
    assert found.features.shape == (5, 3 * 64)
    alone = extract(vit, pictures(5))
    torch.testing.assert_close(found.features[:, found.columns[Tap()]], alone.features)
    both, cls = (found.features[:, found.columns[tap]] for tap in TAPS[1:])
    assert torch.equal(both[:, :64], cls) and not torch.equal(both[:, 64:], cls)


def test_features_in_a_file_equal_features_in_memory(vit, pictures, monkeypatch):
    wanted = extract(vit, pictures(11), taps=TAPS)
    monkeypatch.setattr("ldae.evals.features.MAX_BYTES_IN_MEMORY", 0)
    found = extract(vit, pictures(11), taps=TAPS)
    assert torch.equal(found.features, wanted.features)


def test_low_precision_is_close_and_not_equal(vit, pictures):
    exact, rounded = (
        extract(vit, pictures(4), precision=precision).features for precision in ("fp32", "bf16")
    )
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


def test_an_unlabelled_source_is_refused(vit, pictures):
    source = pictures(3)
    source.labels = None
    with pytest.raises(InputError, match=r"pictures \(train\) has no labels"):
        extract(vit, source)


def test_the_first_image_with_features_that_are_not_finite_is_named(pictures):
    class Fragile(torch.nn.Flatten):
        def forward(self, x):
            return super().forward(torch.where(x == 1, torch.nan, x))  # 1 is a white pixel

    model = Fragile()
    model.pretrained_cfg = load_backbone("pixels:16").pretrained_cfg
    source = pictures(6, classes=1)
    source.pixels[[2, 4], 0, 0] = 255
    with pytest.raises(InputError, match="train/2.png in fp32 are not finite"):
        extract(model, source, batch_size=2)


def test_a_map_is_refused(pictures):
    model = load_backbone("test_resnet", random_init=True, img_size=64)
    model.reset_classifier(0, "")
    with pytest.raises(InputError, match=r"test_resnet gives a map of shape \(96, 2, 2\)"):
        extract(model, pictures(3))


def grades(source: Source, folder: Path) -> dict:
    """Return what the ranks compute together; a probe's checkpoints are in ``folder``."""
    model = load_backbone("test_vit", random_init=True, img_size=16)
    own = extract(model, source, 3, taps=TAPS)
    every = Features(own.features, own.labels)  # all columns
    held = torch.arange(len(source)) % 5 == 0
    sweep = CachedProtocol(learning_rates=(0.1, 1.0), epochs=3, total_batch=4, pools=("avg",))
    wanted = sweep.heads_of(TAPS[:2])
    heads = train_heads(own, wanted, 3, sweep, CPU, ~held)
    augmented = MAEProtocol(blr=50.0, epochs=3, warmup_epochs=1, total_batch=12, batchnorm_batch=4)
    head, _ = train_on_augmented(Encoder(model, CPU, batch_size=3), source, augmented, folder)
    chosen = torch.arange(len(source)) % 4 == 0  # of one rank only
    some = own._replace(features=own.features[:, :64])
    nearest = KNNProtocol(k=(1, 3), leave_one_out=True)
    logistic = LogregProtocol(C=(1e-3, 1.0, 10.0))
    order = RetrievalProtocol(k=(1, 3), leave_one_out=True)
    return {
        "features": gather_rows(own.features, len(source), CPU),
        "labels": gather_rows(own.labels, len(source), CPU),
        "share": len(own.labels),
        "heads": {str(tap): part.state_dict() for tap, part in heads.items()},
        "held out": {str(t): top for t, top in grade_heads(heads, own, CPU, held).items()},
        "augmented": head.state_dict(),
        "knn": knn_accuracy(some, some, nearest),
        "few-shot knn": knn_accuracy(some, some, nearest, chosen=chosen),
        "retrieval": retrieval(some, some, order),
        "logreg": logistic_regression(every, every, held | ~held, [(~held, held)], logistic),
        "segmentation": segmentation(*token_maps(), 11, SegmentProtocol(steps=3, total_batch=4)),
    }


def token_maps() -> tuple[Encoder, Source, Source]:
    """Return a reader of token maps, and a source of label maps twice."""
    digits = ScatteredDigits("digits", "train", 13, seed=0)
    model = load_backbone("pixels:32")
    encoder = Encoder(model, CPU, reader=TokenMapReader(model, 4))
    assert encoder.columns
    return encoder, digits, digits


def test_two_ranks_compute_the_same_as_one(pictures, tmp_path, on_ranks):
    """13 images divide neither by two ranks nor by batches of 3, and an update's three groups for
    BatchNorm do not divide by two ranks."""
    source = pictures(13)

    def work():
        with process_group(CPU):
            torch.save(grades(source, tmp_path / "probe"), tmp_path / str(rank()))

    assert on_ranks(work) == ["", ""]
    alone = grades(source, tmp_path / "alone")
    found = [torch.load(tmp_path / str(number)) for number in range(2)]
    assert [one.pop("share") for one in found] == [7, 6] and alone.pop("share") == 13
    for one in found:
        torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-5)
        same = (one[key] for key in ("features", "heads", "augmented"))
        torch.testing.assert_close(
            list(same),
            [found[0][key] for key in ("features", "heads", "augmented")],
            rtol=0,
            atol=0,
        )


def test_ranks_share_the_chosen_images(pictures, monkeypatch):
    """Each chosen image goes to one rank and keeps its index."""
    source, chosen = pictures(13), np.array([1, 2, 5, 7, 12])
    encoder = Encoder(load_backbone("pixels:16"), CPU, batch_size=2)
    monkeypatch.setattr("ldae.evals.features.world_size", lambda: 2)
    found = {}
    for number in (0, 1):
        monkeypatch.setattr("ldae.evals.features.rank", lambda: number)
        for rows, indices in encoder.share(source, chosen):
            found |= dict(zip(indices.tolist(), rows))
    assert sorted(found) == chosen.tolist()
    monkeypatch.undo()
    encoder.batch_size = 13
    for rows, indices in encoder.share(source):
        assert all(torch.equal(found[i], rows[i]) for i in chosen.tolist())
        assert indices.tolist() == list(range(13))
