"""One update of the weights, from the micro batches of a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ldae.data.workers import Batch
from ldae.train.state import State, map_tensors


@dataclass(frozen=True)
class Update:
    """Updates the weights of a model by micro batches, which accumulate gradients.

    On a GPU nothing here makes the host wait for the device.
    """

    state: State
    seed: int = 0
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    mixing: Callable[[Batch], Batch] | None = None
    """Changes each batch before the model sees it."""

    def __call__(self, batches: list[Batch], decay: float) -> dict[str, torch.Tensor]:
        """Update the weights once, and return this rank's mean loss and its parts.

        Args:
            decay: the share of the former moving average in the new one.
        """
        state = self.state
        means = {"loss": torch.zeros((), device=state.device)}
        for micro, batch in enumerate(batches, start=1):
            losses = self.add_gradients(batch, len(batches), reduce=micro == len(batches))
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value / len(batches)
        if self.clip_grad:
            nn.utils.clip_grad_norm_(state.model.parameters(), self.clip_grad)
        state.update(decay)
        return means

    def add_gradients(self, batch: Batch, count: int, reduce: bool) -> dict[str, torch.Tensor]:
        """Add the gradients of one of ``count`` micro batches, and return its loss and parts.

        Args:
            reduce: whether the gradients added so far are then averaged over the ranks.
        """
        state = self.state
        if self.mixing:
            batch = self.mixing(batch)
        torch.manual_seed(_seed_of(self.seed, batch))
        with state.parallel.gradient_sync(reduce):
            if state.cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            output = state.parallel.network(*on_device(batch, state.device))
            loss, parts = output if isinstance(output, tuple) else (output, {})
            (loss / count).backward()
        return {"loss": loss.detach(), **parts}


def on_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Move a batch to the device; return its images, positions and tree of targets."""
    parts = (batch.images, batch.positions, batch.targets)
    return map_tensors(parts, lambda _, part: part.to(device, non_blocking=True))


def _seed_of(seed: int, batch: Batch) -> int:
    return int(np.random.SeedSequence([seed, int(batch.positions[0])]).generate_state(1)[0])
