"""A tap equals the backbone's features there, however many taps are read in one pass."""

import pytest
import torch

from ldae.backbones.open import load_backbone
from ldae.errors import InputError
from ldae.evals.taps import Tap, TapReader

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def read(model, taps):
    reader = TapReader(model, taps)
    with torch.inference_mode():
        columns, rows = reader.columns(IMAGES[:1]), torch.cat(reader(IMAGES), 1)
    return [rows[:, columns[tap]] for tap in taps], rows.shape[1]


def outputs_of(model, blocks):
    """Return the outputs of these modules, by hooks, and the model's output."""
    seen = []
    hooks = [block.register_forward_hook(lambda *call: seen.append(call[2])) for block in blocks]
    with torch.inference_mode():
        final = model(IMAGES)
    for hook in hooks:
        hook.remove()
    return seen, final


def test_taps_of_a_vit_are_its_tokens_pooled():
    model = load_backbone("test_vit", random_init=True, img_size=32)  # a model with a class token
    taps = (
        Tap(),
        Tap(-1, "cls"),
        Tap(2, "avg"),
        Tap(2, "cls"),
        Tap(2, "cls+avg"),
        Tap(None, "avg"),
    )
    found, width = read(model, taps)
    seen, final = outputs_of(model, model.blocks)
    with torch.inference_mode():
        normed = [model.norm(tokens) for tokens in seen]
    cls, avg = normed[2][:, 0], normed[2][:, 1:].mean(1)
    last = normed[-1]
    wanted = (final, last[:, 0], avg, cls, torch.cat([cls, avg], 1), last[:, 1:].mean(1))
    for tap, one, other in zip(taps, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=str(tap))
    assert width == 5 * 64  # cls and avg of blocks 2 and 5, and the output, each once


def test_taps_of_a_convolutional_network_are_its_stages_averaged():
    model = load_backbone("test_resnet", random_init=True, img_size=32)
    found, _ = read(model, (Tap(1, "avg"), Tap(), Tap(-1, "avg")))
    seen, final = outputs_of(model, [model.layer1, model.layer4])
    for one, other in zip(found, (seen[0].mean((2, 3)), final, seen[1].mean((2, 3))), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_pass_for_early_blocks_stops_there():
    model = load_backbone("test_vit", random_init=True, img_size=32)
    model.blocks[3].forward = None  # calling it would be a TypeError
    read(model, (Tap(0, "avg"), Tap(2, "cls")))


@pytest.mark.parametrize(
    ("name", "tap", "message"),
    [
        ("test_vit", Tap(6, "avg"), "test_vit has blocks 0 to 5, or -6 to -1, and no block 6"),
        ("test_vit", Tap(0), "block 0 has no pooling of its own: ask for avg, cls or cls"),
        ("test_vit2", Tap(0, "cls"), "test_vit2 has no class token: pool by avg"),
        ("test_resnet", Tap(0, "cls+avg"), "test_resnet has no class token: pool by avg"),
        ("pixels:8", Tap(0, "avg"), "pixels gives only its output, not block 0, avg"),
    ],
)
def test_what_a_backbone_lacks_is_refused(name, tap, message):
    backbone = load_backbone(name, random_init=name != "pixels:8")
    with pytest.raises(InputError, match=message):
        TapReader(backbone, (tap,))


def test_an_output_that_changes_when_blocks_are_read_is_refused(monkeypatch):
    model = load_backbone("test_vit", random_init=True, img_size=32)
    given = model.forward_intermediates

    def doubled(*args, **options):
        final, found = given(*args, **options)
        return 2 * final, found

    monkeypatch.setattr(model, "forward_intermediates", doubled)
    with pytest.raises(InputError, match="gives another output when its blocks are read too"):
        read(model, (Tap(), Tap(0, "avg")))
