import torch

from ldae.tokenizers.moments import Moments


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
