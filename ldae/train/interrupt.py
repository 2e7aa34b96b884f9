"""Stop signals: a run stops after the current step, and at once after a second Ctrl-C."""

import signal
import threading
from types import FrameType

# Ctrl-C; the end of a job; the warning that SLURM sends before a time limit; and the end of a
# terminal or an SSH session. Windows has only the first two.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR2", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


def stop_signals() -> list[int]:
    """Return the stop signals; not SIGHUP where it is ignored, as nohup does."""
    ignored = getattr(signal, "SIGHUP", None)
    return [n for n in SIGNALS if n != ignored or signal.getsignal(n) != signal.SIG_IGN]


class Interrupted(Exception):
    """The end of a run by a stop signal, after all progress is saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number

    def __reduce__(self) -> tuple:
        """Let it be unpickled: a pool's parent waits for ever for an exception that it cannot."""
        return type(self), (self.exit_status - 128, *self.args)


class StopRequest:
    """A context in which ``received`` is the number of the first stop signal, or 0.

    The handler only records the signal. The loop reads it between steps, where the ranks agree. At
    the end the former handlers are back. Python sets handlers only in the main thread: in another
    one, as of a server, signals do what they did before.
    """

    def __enter__(self) -> "StopRequest":
        self.received = 0
        is_main = threading.current_thread() is threading.main_thread()
        # A handler that was not set from Python is None, and could not be restored.
        ours = [n for n in stop_signals() if is_main and signal.getsignal(n) is not None]
        self.previous = {number: signal.signal(number, self._receive) for number in ours}
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        # A second Ctrl-C is from an impatient person. The second signal of a scheduler is not: it
        # sends USR2 and then TERM, or TERM to each step and again to the job.
        if signal.SIGINT in self.previous:
            signal.signal(signal.SIGINT, self.previous[signal.SIGINT])

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
