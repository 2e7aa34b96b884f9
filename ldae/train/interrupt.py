"""A signal asks a run to stop after the current step; a second Ctrl-C stops it at once."""

import signal
from types import FrameType

# Ctrl-C; what schedulers send to end a job; and what SLURM is asked to send before a time limit.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Interrupted(Exception):
    """The run was asked to stop, and all of its progress is saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


class StopRequest:
    """A context in which ``received`` is the number of the first signal that asked to stop, or 0.

    The handler only records the signal. The loop reads it between two steps, where the ranks agree.
    """

    def __enter__(self) -> "StopRequest":
        self.received = 0
        self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        # Only a person means more by asking twice. A scheduler sends USR2 and then TERM, or TERM to
        # each step and once more to the job, while the first is being obeyed.
        signal.signal(signal.SIGINT, self.previous[signal.SIGINT])

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
