import math

import pytest
import torch

from ldae.errors import InputError
from ldae.train.watchdog import Exploded, Report, Watchdog


def report(loss, first=0):
    losses = {"loss": torch.tensor(float(loss))}
    return Report.of(losses, False, False, first, f"step {first // 4 + 1} (images {first} to 3)")


def fed(watchdog, losses):
    for number, loss in enumerate(losses):
        watchdog.check(report(loss, 4 * number))
    return watchdog


def test_flags_and_means_are_what_was_given():
    losses = {"loss": torch.tensor(2.0), "part": torch.tensor(3.0)}
    found = Report.of(losses, True, False, 4, "here")
    assert found.read() == (2.0, True, False)
    assert found.names == ("loss", "part") and found.losses.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(loss):
    with pytest.raises(InputError, match=rf"the loss is {loss} in step 3 \(images 8 to 3\), which"):
        fed(Watchdog(), [1, 1, loss])


def test_without_a_factor_no_finite_loss_is_too_large():
    fed(Watchdog(), [1.0] * 50 + [1e30])


@pytest.mark.parametrize("loss, undone", [(30.1, True), (29.9, False), (math.nan, True)])
def test_an_explosion_is_measured_by_the_median(loss, undone):
    """Of the last 100: 2 to 18 around 10, an outlier among them, older ones forgotten."""
    watchdog = fed(Watchdog(3), [2000] * 40 + [*range(2, 19)] * 6 + [29])
    if not undone:
        return watchdog.check(report(loss, 4))
    with pytest.raises(Exploded) as found:
        watchdog.check(report(loss, 4))
    assert found.value.first == 4 and str(found.value).startswith(
        f"the loss is {loss:.4g} in step 2"
    )


def test_a_report_counts_once_and_the_first_steps_are_not_compared():
    watchdog, one = Watchdog(2), report(1.0)
    for _ in range(20):
        watchdog.check(one)
    assert watchdog.capture()["losses"] == [1.0]
    fed(watchdog, [1.0] * 8 + [100.0])  # 10 are too few to know what is usual
    with pytest.raises(Exploded):
        watchdog.check(report(100.0))


def test_a_second_time_before_the_next_checkpoint_ends_the_run():
    saved = fed(Watchdog(2), [1.0] * 20).capture()
    watchdog = Watchdog(2)
    watchdog.leave_out(80)
    watchdog.restore(saved)
    assert watchdog.left_out == {80}
    watchdog.check(report(math.nan, 80))  # nothing was trained on it
    with pytest.raises(InputError, match="second time since the last checkpoint .*explosion 2"):
        watchdog.check(report(5.0, 84))
    again = watchdog.capture()
    assert again == {"losses": [1.0] * 20, "left_out": [80]}
    with pytest.raises(Exploded):
        watchdog.check(report(5.0, 84))
