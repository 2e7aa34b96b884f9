import pytest
import torch

from ldae import masking
from ldae.errors import InputError


def test_kept_tokens_depend_only_on_the_seed_and_the_position():
    positions = torch.arange(8)
    kept = masking.kept_tokens(0, positions, 16, 4)
    assert kept.shape == (8, 4)
    for part in (positions[3:5], positions[3:4]):  # of another batch or rank
        assert torch.equal(masking.kept_tokens(0, part, 16, 4), kept[3 : 3 + len(part)])
    assert not torch.equal(masking.kept_tokens(1, positions, 16, 4), kept)
    assert not torch.equal(masking.kept_tokens(0, positions + 8, 16, 4), kept)


def test_kept_tokens_are_distinct_and_rise():
    kept = masking.kept_tokens(0, torch.arange(100), 25, 10)
    assert (kept.diff(dim=1) > 0).all()
    assert kept.min() == 0
    assert kept.max() == 24


def test_every_token_is_kept_equally_often():
    images, tokens, count = 20_000, 16, 4
    kept = masking.is_kept(masking.kept_tokens(0, torch.arange(images), tokens, count), tokens)
    share = kept.float().mean(0)
    deviation = (count / tokens * (1 - count / tokens) / images) ** 0.5
    assert (share - count / tokens).abs().max() < 4.5 * deviation
    pairs = (kept.float().T @ kept.float()) / images  # also each pair
    expected = count * (count - 1) / (tokens * (tokens - 1))
    assert (pairs[~torch.eye(tokens, dtype=bool)] - expected).abs().max() < 0.01


def test_all_tokens_are_kept_in_order_without_masking():
    kept = masking.kept_tokens(0, torch.arange(3), 9, 9)
    assert torch.equal(kept, torch.arange(9).expand(3, 9))


def test_restore_puts_the_kept_tokens_back():
    tokens, others = torch.randn(5, 9, 2), torch.randn(9, 2)
    kept = masking.kept_tokens(0, torch.arange(5), 9, 4)
    restored = masking.restore(tokens.gather(1, kept[..., None].expand(-1, -1, 2)), kept, others)
    inside = masking.is_kept(kept, 9)
    assert torch.equal(restored[inside], tokens[inside])
    assert torch.equal(restored[~inside], others.expand(5, -1, -1)[~inside])


@pytest.mark.parametrize(("ratio", "kept"), [(0, 64), (0.75, 16), (0.9, 6), (0.99, 1)])
def test_number_kept(ratio, kept):
    assert masking.number_kept(ratio, 64, "masking.ratio") == kept


@pytest.mark.parametrize("ratio", [1.0, 0.995])
def test_a_ratio_that_keeps_no_token_is_refused(ratio):
    with pytest.raises(InputError, match="^masking.ratio .* keeps none of the 64 tokens"):
        masking.number_kept(ratio, 64, "masking.ratio")
