import torch

from ldae.timing import TrainingStep, training_flops

CPU = torch.device("cpu")


def test_a_step_updates_the_weights_and_rate_counts_all_steps(tiny):
    step = TrainingStep(tiny(), CPU, batch_size=2)
    before = step.method.denoiser.embed.weight.clone()
    assert step.rate(steps=2) > 0
    assert not torch.equal(step.method.denoiser.embed.weight, before)
    assert {int(state["step"]) for state in step.state.optimizer.state.values()} == {3}
    assert step.rate(steps=5, at_most=0) > 0
    assert {int(state["step"]) for state in step.state.optimizer.state.values()} == {5}


def test_blocks_are_proportional_to_flops(tiny):
    """The doctor measures few blocks on a CPU, and extrapolates to 24 by FLOPs."""
    one, two, three = (
        training_flops(TrainingStep(tiny(model__depth=depth), CPU, 1).method.denoiser)
        for depth in (1, 2, 3)
    )
    assert three - two == two - one > 0
