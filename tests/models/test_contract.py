"""Laws of every denoiser, with random parameters."""

import pytest
import torch
from conftest import PARTS

from ldae.backbones.run import backbone_of
from ldae.errors import InputError
from ldae.method import build
from ldae.models import DENOISERS
from ldae.models.contract import NoPlainViT
from ldae.models.vit import fuse_attention

B, N, CLASSES = 3, 16, 10


NETWORKS = {name: {"model__denoiser": name} for name in DENOISERS} | {"dit with all parts": PARTS}


@pytest.fixture(params=NETWORKS)
def network(request):
    """The settings of a network."""
    return NETWORKS[request.param]


@pytest.fixture
def make(network, tiny, awake):
    """make(**changes): a conditional denoiser of 16 tokens."""

    def make(**changes):
        config = tiny("l_dae", **network, model__class_conditional=True, **changes)
        return awake(build(config, CLASSES).denoiser)

    return make


@pytest.fixture
def denoiser(make):
    return make().eval()


@pytest.fixture
def tokens(denoiser):
    return torch.randn(B, N, denoiser.in_dim, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def c(denoiser):
    return denoiser.condition(torch.tensor([3, 500, 999]))


@pytest.fixture
def encode(denoiser, tokens, c):
    """encode(kept, tokens): features of kept tokens; skipped if the denoiser needs all tokens."""

    def encode(kept, tokens=tokens):
        try:
            return denoiser.encode(tokens, c, kept)
        except InputError as refused:
            pytest.skip(str(refused))

    with torch.no_grad():
        yield encode


def test_the_output_has_the_shape_of_the_tokens(denoiser, tokens):
    assert denoiser.side**2 == N
    output = denoiser(tokens, torch.tensor([3, 500, 999]))
    assert output.shape == (B, N, denoiser.out_dim) and output.isfinite().all()


def test_t_and_the_label_change_the_prediction(denoiser, tokens):
    t, labels = torch.tensor([3, 500, 999]), torch.tensor([1, 2, 3])
    with torch.no_grad():
        outputs = [denoiser(tokens, t, labels), denoiser(tokens, t.flip(0), labels)]
        outputs += [denoiser(tokens, t, labels.flip(0))]
    for image in (0, 2):
        assert not torch.allclose(outputs[1][image], outputs[0][image])
        assert not torch.allclose(outputs[2][image], outputs[0][image])


def test_no_label_is_the_null_label(denoiser, tokens):
    t, null = torch.tensor([3, 500, 999]), torch.full((B,), CLASSES)
    with torch.no_grad():
        assert torch.equal(denoiser(tokens, t), denoiser(tokens, t, null))
    assert torch.equal(denoiser.condition(t), denoiser.condition(t, null))


def test_the_encoder_is_the_first_stages(denoiser, tokens, c):
    with torch.no_grad():
        features, taps = denoiser.encode(tokens, c), list(denoiser.taps(tokens, c))
    assert 0 < denoiser.depth <= denoiser.stages == len(taps)
    assert torch.equal(taps[denoiser.depth - 1], features)
    assert features.shape[::2] == (B, denoiser.width)
    assert all(tap.shape[0] == B and tap.ndim == 3 for tap in taps)


def test_the_encoder_is_a_part_of_the_parameters(denoiser):
    whole = sum(parameter.numel() for parameter in denoiser.parameters())
    assert 0 < denoiser.encoder_size < whole


def test_keeping_all_tokens_changes_no_bit(denoiser, encode):
    assert torch.equal(encode(torch.arange(N).expand(B, N)), encode(None))


def test_kept_features_do_not_depend_on_dropped_tokens(denoiser, tokens, encode):
    kept = torch.stack([torch.randperm(N)[:5] for _ in range(B)])
    others = torch.randn_like(tokens)
    for image, numbers in enumerate(kept):
        others[image, numbers] = tokens[image, numbers]
    features = encode(kept)
    assert features.shape == (B, 5, denoiser.width)
    assert torch.equal(encode(kept, others), features)
    assert not torch.allclose(encode(None)[0, kept[0]], features[0])


def test_kept_features_come_in_the_order_of_kept(encode):
    kept = torch.stack([torch.randperm(N)[:5] for _ in range(B)])
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(encode(kept[:, order]), encode(kept)[:, order])


@pytest.fixture
def masked(make, awake):
    """A denoiser with a mask token; skipped if it needs all tokens."""
    denoiser = make().eval()
    try:
        denoiser.add_mask_token()
    except InputError as refused:
        pytest.skip(str(refused))
    return awake(denoiser)


def test_the_prediction_does_not_depend_on_dropped_tokens(masked, tokens):
    t, kept = torch.tensor([3, 500, 999]), torch.stack([torch.randperm(N)[:5] for _ in range(B)])
    others = torch.randn_like(tokens)
    for image, numbers in enumerate(kept):
        others[image, numbers] = tokens[image, numbers]
    with torch.no_grad():
        output = masked(tokens, t, kept=kept)
        assert output.shape == (B, N, masked.out_dim)
        assert torch.equal(masked(others, t, kept=kept), output)
        assert not torch.allclose(masked(tokens, t), output)
        masked.mask_token.add_(1.0)
        assert not torch.allclose(masked(tokens, t, kept=kept), output)


def test_a_prediction_from_all_tokens_does_not_depend_on_the_mask_token(masked, tokens):
    """Neither without ``kept`` nor when all are kept; only tokens at other places are replaced."""
    t, everyone = torch.tensor([3, 500, 999]), torch.arange(N).expand(B, N)
    with torch.no_grad():
        output = masked(tokens, t)
        masked.mask_token.add_(1.0)
        assert torch.equal(masked(tokens, t), output)
        assert torch.equal(masked(tokens, t, kept=everyone), output)


def test_a_mask_token_changes_no_other_weight(network, tiny):
    try:
        masked = build(tiny(**network, masking__ratio=0.5)).denoiser.state_dict()
    except InputError as refused:
        pytest.skip(str(refused))
    plain = build(tiny(**network)).denoiser.state_dict()
    assert masked.keys() > plain.keys()
    assert all(torch.equal(masked[name], value) for name, value in plain.items())


def test_fused_attention_gives_the_same_output(denoiser, tokens):
    t, outputs = torch.tensor([3, 500, 999]), []
    for fused in (False, True):
        fuse_attention(denoiser, fused)
        with torch.no_grad():
            outputs.append(denoiser(tokens, t))
    torch.testing.assert_close(*outputs)


def test_recomputed_activations_give_the_same_gradients(make, tokens):
    t, gradients = torch.tensor([3, 500, 999]), []
    for recompute in (False, True):
        denoiser = make(system__checkpoint_activations=recompute).train()
        denoiser(tokens, t).square().sum().backward()
        gradients.append([parameter.grad for parameter in denoiser.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_load_plain_state_inverts_plain_state(denoiser, make, tokens, c):
    """The encoder at one condition becomes the encoder at all conditions."""
    try:
        denoiser.plain_vit()
    except NoPlainViT as refused:
        pytest.skip(str(refused))
    other = make()
    with torch.no_grad():
        for image in range(B):
            expected = denoiser.encode(tokens[image : image + 1], c[image : image + 1])
            other.load_plain_state(denoiser.plain_state(c[image : image + 1]))
            for at in (0, 2):
                actual = other.encode(tokens[image : image + 1], c[at : at + 1])
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_backbone_has_the_encoders_features(network, method, images):
    """For a timm ViT, and for a part of the run."""
    trained = method(**network)
    x = trained.tokenizer.normalize(images)
    with torch.no_grad():
        actual, expected = backbone_of(trained)(x), trained.features(x, 10)
    assert actual.shape == (len(images), trained.denoiser.width)
    assert (actual - expected).norm() / expected.norm() < 1e-5
