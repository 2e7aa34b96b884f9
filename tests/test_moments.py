import torch

from ldae.distributed import process_group, rank, world_size
from ldae.moments import Moments


def test_streamed_moments_are_exact():
    """Pixels are integers, and the products of a block sum to at most 2^24."""
    vectors = torch.randint(-128, 128, (5000, 5)).float()
    vectors[:1024] = -128  # the largest sum there is
    moments = Moments(5)
    for part in vectors.split(1700):
        moments.update(part)
    exact = vectors.double()
    assert torch.equal(moments.second, exact.T @ exact)
    torch.testing.assert_close(moments.mean(), exact.mean(0))
    for correction in (0, 1):
        expected = exact.T.cov(correction=correction)
        torch.testing.assert_close(moments.covariance(correction), expected)
    assert moments.count == 5000


def test_memory_does_not_grow_with_the_number_of_vectors():
    moments = Moments(4)
    size = [part.numel() for part in (moments.sum, moments.second, moments.count)]
    for _ in range(50):
        moments.update(torch.randn(100, 4))
    assert [part.numel() for part in (moments.sum, moments.second, moments.count)] == size
    assert len(vars(moments)) == 3


def test_the_vectors_of_all_ranks_count_in_float64(on_ranks, tmp_path):
    vectors = torch.randn(300, 4)

    def write() -> None:
        with process_group(torch.device("cpu")):
            moments = Moments.of(vectors[rank() :: world_size()].split(70), 4)
            torch.save((moments.count, moments.second), tmp_path / f"{rank()}.pt")

    assert on_ranks(write) == ["", ""]
    exact = vectors.double()
    for number in (0, 1):
        count, second = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert count == 300
        torch.testing.assert_close(second, exact.T @ exact, rtol=1e-14, atol=1e-13)
