"""The length of a run in images, and the division of its batches."""

import dataclasses
import math
from dataclasses import dataclass

import torch

from ldae import distributed
from ldae.errors import InputError
from ldae.settings import ExecutionSettings, OptimSettings


@dataclass(frozen=True)
class Plan:
    """The length of a run in images, and the division of a step's batch."""

    epoch: int
    """Images in one pass over the data."""
    total: int
    """Images in the run: a multiple of the batch size."""
    batch_size: int
    """Images in one step, over all ranks."""
    micro_batches: int
    """Micro batches of one rank in one step; their gradients accumulate."""
    searched: bool = False
    """Whether the loop replaces ``micro_batches`` by the smallest number that memory allows."""
    multiple: int = 1
    """A micro batch that the loop finds is a multiple of this number of images."""

    @property
    def steps(self) -> int:
        return self.total // self.batch_size

    @property
    def share(self) -> int:
        """Images of one rank in one step."""
        return self.batch_size // distributed.world_size()

    @property
    def micro_batch(self) -> int:
        """Images of one rank in one forward pass."""
        return self.share // self.micro_batches

    def divisions(self) -> list[int]:
        """Return the numbers of micro batches that the loop may choose from, in rising order."""
        return [n for n in range(1, self.share + 1) if self.share % (n * self.multiple) == 0]

    def divided(self, micro_batches: int) -> "Plan":
        """Return this plan with the number of micro batches that the loop has found."""
        return dataclasses.replace(self, micro_batches=micro_batches, searched=False)


def plan_run(
    images: int,
    optim: OptimSettings,
    system: ExecutionSettings,
    device: torch.device,
    multiple: int = 1,
) -> Plan:
    """Return the plan of a run over ``images`` images, for the current number of ranks.

    With ``system.device_batch`` auto, the loop searches for the division on a GPU. With FSDP it
    does not: each pass communicates there, so a rank that runs out of memory would leave the others
    waiting.

    Args:
        multiple: number of images of which each micro batch that is searched must be a multiple.

    Raises: InputError when the batch cannot be divided as the settings require.
    """
    world = distributed.world_size()
    if optim.batch_size < 1 or optim.batch_size % world:
        raise InputError(f"optim.batch_size {optim.batch_size} cannot be split over {world} ranks")
    share, most = optim.batch_size // world, system.device_batch
    micro_batches = math.ceil(share / most) if most and most != "auto" else 1
    if share % micro_batches:
        raise InputError(
            f"a rank's share of optim.batch_size, {share}, cannot be cut into {micro_batches} "
            f"equal parts of at most system.device_batch {most}"
        )
    total = steps_of(optim.epochs, images, optim.batch_size) * optim.batch_size
    sharded = system.fsdp and world > 1
    searched = most == "auto" and device.type == "cuda" and not sharded
    return Plan(images, total, optim.batch_size, micro_batches, searched, multiple)


def steps_of(epochs: float, images: int, batch_size: int) -> int:
    """Return the steps of a run: the fewest that see each of ``images`` as often as ``epochs``."""
    return math.ceil(epochs * images / batch_size)
