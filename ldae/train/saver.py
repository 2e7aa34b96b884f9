"""Checkpoints are written beside the training, one at a time."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from ldae.errors import InputError
from ldae.runs.checkpoints import Checkpoints


class Saver:
    """Saves in a thread; within it, and when it ends, no write is left behind.

    What a write raises is raised by the next ``check``, ``save`` or ``wait``, or at the end.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def save(self, state: dict, copied: torch.cuda.Event | None = None) -> None:
        """Begin to write ``state``, which nobody changes meanwhile, once ``copied`` has happened."""
        self.wait()
        self._writing = self._thread.submit(self._write, state, copied)

    def _write(self, state: dict, copied: torch.cuda.Event | None) -> None:
        if copied:
            copied.synchronize()
        for name, part in state["model"].items():
            if part.is_floating_point() and part.isnan().any():
                raise InputError(
                    f"{name} is not a number after image {state['images_seen']:,}, which is not "
                    "saved; begin a run with a lower optim.blr or with optim.clip_grad"
                )
        self.checkpoints.save(state)

    def check(self) -> None:
        """Raises: InputError when the last state could not be written, if that is known by now."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is written.

        Raises: InputError when the last state could not be.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()
