"""A signal asks a run to stop after the step; a second Ctrl-C stops it at once."""

import signal
from types import FrameType, TracebackType

# Ctrl-C; what schedulers send to end a job; and what SLURM is asked to send before a time limit.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Interrupted(Exception):
    """The run was asked to stop, and everything it did is saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


class StopRequest:
    """Within it, ``received`` is the number of the signal that first asked to stop, or 0.

    The handler only notes it: what the ranks do together, they do between two steps.
    """

    def __enter__(self) -> "StopRequest":
        self.received = 0
        self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        # Only a person means more by asking twice. A scheduler sends USR2 and then TERM, or TERM to
        # each step and once more to the job, while the first is being obeyed.
        signal.signal(signal.SIGINT, self.previous[signal.SIGINT])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
