"""The batches of the next steps, fetched before they are needed."""

from collections import deque
from collections.abc import Generator
from itertools import islice

from ldae.data.workers import Batch
from ldae.distributed import gather_values
from ldae.errors import InputError


class Lookahead:
    """This rank's batches of the next steps.

    Bad data do not raise while batches are fetched. ``error`` keeps the exception instead, so that
    all ranks can agree on the last step that every rank has batches for, and save after it.
    """

    def __init__(self, batches: Generator[Batch], micro_batches: int) -> None:
        self.batches, self.micro_batches = batches, micro_batches
        self.error: InputError | None = None
        self._steps: deque[list[Batch]] = deque()

    def fetch(self) -> None:
        """Fetch the micro batches of one more step; nothing after an error or the last step."""
        if self.error:
            return
        try:
            self._steps.append(list(islice(self.batches, self.micro_batches)))
        except InputError as error:
            self.error = error

    def next_batch(self) -> Batch:
        """Return the first micro batch of the next step, which stays in place."""
        return self._steps[0][0]

    def next_step(self) -> list[Batch]:
        """Return the micro batches of the next step."""
        return self._steps.popleft()

    def raise_errors(self) -> None:
        """Raise an InputError on all ranks if the data of any rank are bad. All must call this."""
        errors = gather_values(str(self.error or ""))
        if self.error:
            raise self.error
        reports = [f"rank {rank} reported: {error}" for rank, error in enumerate(errors) if error]
        if reports:
            raise InputError("; ".join(reports))

    def close(self) -> None:
        """End the data workers."""
        self.batches.close()
