"""Laws of the U-Net: DDPM's network, and a backbone that is no timm model."""

import itertools
import json
import sys
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import ldae
from ldae import distributed
from ldae.backbones.open import load_backbone
from ldae.commands.export import export
from ldae.commands.grid import GridProtocol, grid
from ldae.commands.pretrain import pretrain
from ldae.errors import InputError
from ldae.evals.evaluation import Setup
from ldae.models.unet import UNet
from ldae.sampling.generation import generate, resolve
from ldae.sampling.settings import SamplingSettings
from ldae.settings import SystemSettings
from ldae.train.parallel import parallelize

CPU = torch.device("cpu")
SIZES = {"channels": (8, 16, 8), "layers": 1, "attn_resolutions": (4,), "dropout": 0.0, "groups": 4}


@pytest.fixture
def unet(awake):
    """unet(**sizes): an awake U-Net of 64 tokens of 3 numbers, with five labels."""

    def make(**sizes) -> UNet:
        return awake(UNet(**SIZES | sizes, side=8, in_dim=3, out_dim=3, num_classes=5)).eval()

    return make


@pytest.fixture
def tokens():
    return torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(3))


def test_the_default_is_the_network_of_ddpm():
    """Its size and its maps on CIFAR-10 (Ho et al. 2020, appendix B)."""
    with torch.device("meta"):
        settings = asdict(ldae.config("ddpm").unet)
        network = UNet(**settings, side=32, in_dim=3, out_dim=3)
        taps = list(network.taps(torch.zeros(1, 32 * 32, 3), torch.zeros(1, 512)))
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    maps = [(16, 128), (8, 256), (4, 256), (4, 256), (4, 256)]  # down, and the middle
    maps += [(8, 256), (16, 256), (32, 256), (32, 128)]  # up
    assert [tuple(tap.shape[1:]) for tap in taps] == [(side**2, width) for side, width in maps]
    attending = [hasattr(block, "attentions") for block in network.network.down_blocks]
    assert attending == [False, True, False, False]  # at 16 x 16


def test_the_output_is_the_one_of_diffusers(unet, tokens):
    network, t, labels = unet(), torch.tensor([3, 700]), torch.tensor([4, 5])
    images = tokens.transpose(1, 2).reshape(2, 3, 8, 8)
    with torch.no_grad():
        expected = network.network(images, t, labels).sample
        assert torch.equal(network(tokens, t, labels), expected.flatten(2).transpose(1, 2))


def test_the_last_tap_gives_the_output(unet, tokens):
    network, t = unet(), torch.tensor([3, 700])
    with torch.no_grad():
        *_, last = network.taps(tokens, network.condition(t))
        x = network.network.conv_norm_out(last.transpose(1, 2).unflatten(2, (8, 8)))
        expected = network.network.conv_out(F.silu(x)).flatten(2).transpose(1, 2)
        assert torch.equal(network(tokens, t), expected)


def test_a_stage_runs_when_its_features_are_requested(unet, tokens):
    network, runs = unet(), []
    inner = network.network
    for block in (*inner.down_blocks, inner.mid_block, *inner.up_blocks):
        block.register_forward_hook(lambda *_: runs.append(1))
    c = network.condition(torch.tensor([3, 700]))
    with torch.no_grad():
        for count, _ in enumerate(network.taps(tokens, c), start=1):
            assert len(runs) == count
        runs.clear()
        network.encode(tokens, c)
    assert len(runs) == network.depth == 5 and network.stages == 7


def test_residual_branches_and_the_output_start_as_zero(tokens):
    network = UNet(**SIZES, side=8, in_dim=3, out_dim=3)
    t = torch.tensor([3, 700])
    assert not network(tokens, t).any()
    middle = network.network.mid_block
    x = torch.randn(2, 8, 2, 2)
    torch.testing.assert_close(middle(x, network.condition(t)), x)


def test_masking_is_refused(unet, tokens):
    network = unet()
    with pytest.raises(InputError, match="needs all tokens, so none can be masked"):
        network.encode(tokens, network.condition(torch.tensor([3, 7])), torch.zeros(2, 4).long())


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ({"channels": (8,) * 5}, "unet.channels: 8 tokens a side cannot be halved 4 times"),
        ({"channels": (8, 10, 8)}, "unet.groups 4 does not divide unet.channels 10"),
        ({"attn_resolutions": (16,)}, "unet.attn_resolutions 16: .* have sides 8, 4, 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, sentence, unet):
    with pytest.raises(InputError, match=sentence):
        unet(**sizes)


def test_a_missing_diffusers_is_named(unet, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match="^model.denoiser unet needs diffusers: pip install"):
        unet()


def test_dropout_is_in_training_only(unet, tokens):
    network, t = unet(dropout=0.5), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(network(tokens, t), network(tokens, t))
        network.train()
        assert not torch.equal(network(tokens, t), network(tokens, t))


def test_training_on_pixels_lowers_the_loss(tiny, tmp_path):
    """From 1, the variance of the noise, for an output of zero."""
    pixels = {"data__img_size": 16, "model__patch_size": 1, "tokenizer__dim": 3}
    how = {"unet__attn_resolutions": (8,), "optim__blr": 0.1, "system__log_every": 1}
    run = tmp_path / "run"
    pretrain(tiny("ddpm", optim__epochs=5, **pixels, **how), run, "ddpm")
    first, *_, last = (json.loads(line) for line in (run / "metrics.jsonl").open())
    assert first["loss"] == pytest.approx(1, abs=0.05) and last["loss"] < 0.6


@pytest.mark.parametrize("attn_resolutions", [(2,), ()])
def test_two_ranks_with_sharded_weights_equal_one(attn_resolutions, method, images, on_ranks):
    """Levels of one kind are a stack of blocks to FSDP, levels of two kinds are not."""
    one = method("ddpm", unet__attn_resolutions=attn_resolutions).train()
    expected = one(images, torch.arange(8))
    expected.backward()
    gradients = {name: part.grad for name, part in one.named_parameters() if part.requires_grad}
    one.zero_grad()

    def work():
        with distributed.process_group(CPU, rank_timeout=1):
            parallel = parallelize(one, None, SystemSettings(fsdp=True), CPU, compiled=False)
            loss = parallel.network(images, torch.arange(8))
            loss.backward()
            torch.testing.assert_close(loss, expected)
            for name, part in one.named_parameters():
                if part.requires_grad:
                    torch.testing.assert_close(parallel.full_tensor(part.grad), gradients[name])

    assert on_ranks(work) == ["", ""]


def test_a_run_is_graded_as_it_is_and_is_no_timm_model(run, tiny, tmp_path):
    folder = run("ddpm")
    backbone = load_backbone(folder)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(x), backbone.method.features(x, 10))
    refusal = "the denoiser UNet is not a plain ViT, so timm has no such model"
    with pytest.raises(InputError, match=f"{refusal}: ldae knn and linear grade the run itself"):
        export(folder, tmp_path / "exported")
    with pytest.raises(InputError, match=refusal):
        load_backbone(folder, random_init=True)
    exported = export(run("l_dae"), tmp_path / "exported")
    with pytest.raises(InputError, match="UNet is not a plain ViT, which init_from needs"):
        pretrain(tiny("ddpm", init_from=str(exported)), tmp_path / "run", "ddpm")


def test_guidance_changes_the_samples_of_a_conditional_run(method):
    one = method("ddpm", num_classes=3, model__class_conditional=True).requires_grad_(False)
    samples = []
    for guidance in (1.0, 3.0):
        how = SamplingSettings(steps=3, guidance=guidance, labels=("cat",))
        resolved = resolve(one, ["dog", "cat", "cow"], how)
        samples.append(generate(one, resolved, None, torch.arange(2)))
    assert samples[0].shape == (2, 3, 32, 32) and not torch.equal(*samples)


def test_the_grid_probes_every_stage(run, tmp_path):
    protocol = GridProtocol(timesteps=(0, 40), epochs=1, inputs=("clean", "noisy"))
    setup = Setup(out=tmp_path / "grid", workers=0, device="cpu")
    record = grid(run("ddpm"), "digits", protocol=protocol, setup=setup)
    cells = {(cell["input"], cell["t"], cell["leading"]) for cell in record["results"]["cells"]}
    assert cells == set(itertools.product(("clean", "noisy"), (0, 40), range(1, 6)))
