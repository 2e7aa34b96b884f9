"""A stop signal is recorded; only a second Ctrl-C interrupts at once."""

import os
import pickle
import signal

import pytest

from ldae.train.interrupt import SIGNALS, Interrupted, StopRequest


@pytest.fixture(autouse=True)
def terminal():
    """A terminal, also under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_recorded_and_the_handlers_are_restored(number):
    before = [signal.getsignal(other) for other in SIGNALS]
    with StopRequest() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_repeated_signals_of_a_scheduler_are_one_request():
    """The first of them gives the exit status."""
    with StopRequest() as stop:
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.received == signal.SIGUSR2


def test_a_closed_terminal_is_ignored_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == 0


def test_a_second_ctrl_c_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind an `&`
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_an_interruption_crosses_a_pool_of_processes():
    error = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM, "stopped at image 3")))
    assert str(error) == "stopped at image 3" and error.exit_status == 128 + signal.SIGTERM
