import pytest
import torch

from ldae.errors import InputError
from ldae.machine.timing import (
    TrainingStep,
    fitting_step,
    kept_bytes,
    prepared_method,
    training_flops,
)
from ldae.method import build
from ldae.train.compilation import fuses_attention

CPU = torch.device("cpu")


def test_a_step_updates_the_weights_and_rate_counts_all_steps(tiny):
    step = TrainingStep(tiny(), CPU, batch_size=2)
    assert step.first_seconds > 0
    before = step.method.denoiser.embed.weight.clone()
    assert step.rate(steps=2) > 0
    assert not torch.equal(step.method.denoiser.embed.weight, before)
    assert {int(state["step"]) for state in step.state.optimizer.state.values()} == {4}
    assert step.rate(steps=5, at_most=0) > 0
    assert {int(state["step"]) for state in step.state.optimizer.state.values()} == {6}


@pytest.mark.parametrize("precision, bf16", [("bf16", True), ("fp32", False)])
def test_a_prepared_method_is_fitted_and_trains_in_the_precision_of_the_settings(
    tiny, precision, bf16
):
    config = tiny(system__precision=precision)
    images = torch.randint(100, (64, 3, *2 * [config.data.img_size]), dtype=torch.uint8)
    method = prepared_method(config, CPU, images)
    assert method.training and method.bf16 == bf16
    fused = {part.fused_attn for part in method.modules() if hasattr(part, "fused_attn")}
    assert fused == {fuses_attention(bf16, CPU)}
    encoded = method.tokenizer.encode(method.tokenizer.normalize(images))
    assert encoded.std(unbiased=False).item() == pytest.approx(1, abs=0.05)


def test_kept_bytes_grow_with_the_batch(tiny):
    """By the same number for each image, beside the weights."""
    config = tiny()
    images = torch.randint(256, (6, 3, *2 * [config.data.img_size]), dtype=torch.uint8)
    method = prepared_method(config, CPU, images)
    two, four, six = (kept_bytes(method, images[:n], torch.arange(n)) for n in (2, 4, 6))
    assert six - four == four - two > 0


def test_blocks_are_proportional_to_flops(tiny):
    """The doctor measures few blocks on a CPU, and extrapolates to 24 by FLOPs."""
    one, two, three = (
        training_flops(TrainingStep(tiny(model__depth=depth), CPU, 1).method) for depth in (1, 2, 3)
    )
    assert three - two == two - one > 0


def test_dropped_tokens_and_a_feature_target_count(tiny):
    """Of 16 tokens the encoder gets 4. The average gets all, without a backward pass."""
    changes = ({}, {"masking__ratio": 0.75}, {"masking__ratio": 0.75, "features__share": 0.5})
    plain, masked, second = (
        training_flops(build(tiny(model__depth=3, **change))) for change in changes
    )
    assert 0.5 * plain < masked < 0.75 * plain
    assert masked + plain / 6 < second < masked + plain / 5


def test_a_batch_is_halved_until_it_fits(tiny, monkeypatch):
    tried, original = [], TrainingStep.__call__

    def call(self):
        tried.append(self.batch_size)
        if self.batch_size > limit:
            raise torch.OutOfMemoryError("out of memory")
        original(self)

    monkeypatch.setattr(TrainingStep, "__call__", call)
    limit = 3
    assert fitting_step(tiny(), CPU, 8).batch_size == 2 and tried == [8, 4, 2]
    limit = 0
    with pytest.raises(InputError, match="cpu has too little memory"):
        fitting_step(tiny(), CPU, 2)
