import math

import pytest
import torch

from ldae.errors import InputError
from ldae.train.watchdog import Exploded, Report, Watchdog


def report(loss, first=0):
    losses = {"loss": torch.tensor(float(loss))}
    return Report.of(losses, first=first, where=f"step {first // 4 + 1} (images {first} to 3)")


def check_all(watchdog, losses):
    for number, loss in enumerate(losses):
        watchdog.check(report(loss, 4 * number))
    return watchdog


def test_a_report_on_one_rank_holds_the_given_losses_and_requests():
    losses = {"loss": torch.tensor(2.0), "part": torch.tensor(3.0)}
    report = Report.of(losses, stop=True, first=4, where="here")
    assert report.read() == (2.0, True, False, False)
    assert report.names == ("loss", "part") and report.losses.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(loss):
    with pytest.raises(InputError, match=rf"the loss is {loss} in step 3 \(images 8 to 3\), which"):
        check_all(Watchdog(), [1, 1, loss])


def test_without_a_factor_no_finite_loss_is_too_large():
    check_all(Watchdog(), [1.0] * 50 + [1e30])


@pytest.mark.parametrize("usual", [0.0, -1.0])
def test_losses_around_zero_have_no_scale_to_be_too_large_for(usual):
    check_all(Watchdog(3), [usual] * 50 + [5.0])


@pytest.mark.parametrize("loss, undone", [(30.1, True), (29.9, False), (math.nan, True)])
def test_a_loss_is_compared_with_the_median(loss, undone):
    """The last 100 losses are 2 to 18 around 10 and one outlier; older losses do not count."""
    watchdog = check_all(Watchdog(3), [2000] * 40 + [*range(2, 19)] * 6 + [29])
    if not undone:
        return watchdog.check(report(loss, 4))
    with pytest.raises(Exploded) as exploded:
        watchdog.check(report(loss, 4))
    assert exploded.value.first == 4
    assert str(exploded.value).startswith(f"the loss is {loss:.4g} in step 2")


def test_a_report_counts_once_and_the_first_losses_are_not_compared():
    watchdog, one = Watchdog(2), report(1.0)
    for _ in range(20):
        watchdog.check(one)
    assert watchdog.capture()["losses"] == [1.0]
    check_all(watchdog, [1.0] * 8 + [100.0])  # 9 losses before are too few
    with pytest.raises(Exploded):
        watchdog.check(report(100.0))


def test_a_second_explosion_before_the_next_checkpoint_ends_the_run():
    saved = check_all(Watchdog(2), [1.0] * 20).capture()
    watchdog = Watchdog(2)
    watchdog.leave_out(80)
    watchdog.restore(saved)
    assert watchdog.left_out == {80}
    watchdog.check(report(math.nan, 80))  # no step was trained on it
    with pytest.raises(InputError, match="second time since the last checkpoint .*explosion 2"):
        watchdog.check(report(5.0, 84))
    again = watchdog.capture()
    assert again == {"losses": [1.0] * 20, "left_out": [80]}
    with pytest.raises(Exploded):
        watchdog.check(report(5.0, 84))
