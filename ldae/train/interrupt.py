"""Ctrl-C and SIGTERM ask a run to stop after the step; a second one stops it at once."""

import signal
from types import FrameType, TracebackType


class Interrupted(Exception):
    """The run was asked to stop, and everything it did is saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


class StopRequest:
    """Within it, ``received`` is the number of the signal that asked to stop, or 0."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "StopRequest":
        self.received = 0
        self.previous = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for asked, handler in self.previous.items():
            signal.signal(asked, handler)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
