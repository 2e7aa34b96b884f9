"""Writing of checkpoints in the background, one at a time."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ldae.errors import InputError
from ldae.runs.checkpoints import Checkpoints


class Saver:
    """A context in which a thread writes checkpoints. Its exit waits for the last write.

    The error of a write is raised by the next ``check``, ``save`` or ``wait``, or at the exit.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def save(self, state: dict, copied: torch.cuda.Event | None = None) -> None:
        """Write ``state`` after the event ``copied``. Until then, ``state`` must not change.

        Raises: as ``wait``.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, state, copied)

    def _write(self, state: dict, copied: torch.cuda.Event | None) -> None:
        if copied:
            copied.synchronize()
        for name, part in state["model"].items():
            if part.is_floating_point() and part.isnan().any():
                raise InputError(
                    f"{name} is not a number after image {state['images_seen']:,}, and this state "
                    "is not saved; begin a run with a lower optim.blr or with optim.clip_grad"
                )
        self.checkpoints.save(state)

    def check(self) -> None:
        """Raise the error of the last write, if it has ended with one.

        Raises: InputError when the last state could not be written.
        """
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the end of the last write.

        Raises: InputError when the last state could not be written.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()
