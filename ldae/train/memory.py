"""The search for the largest micro batch that fits into the memory of a device."""

import gc

import torch

from ldae import distributed
from ldae.data.workers import Batch
from ldae.errors import InputError
from ldae.train.plan import Plan
from ldae.train.update import Update


def fewest_micro_batches(update: Update, whole: Batch, plan: Plan) -> int:
    """Return the smallest number of micro batches with which every rank has enough memory.

    Each division of a rank's share is tried by real passes, the largest micro batch first. There is
    no estimate before it: the share fits in most runs, and its first pass compiles what the
    training needs anyway. A trial changes neither the model nor any random draw, and it uses no
    collective, so a rank that runs out of memory leaves no other rank waiting.

    Args:
        whole: this rank's share of a batch, of which the trials take the first images.

    Raises: InputError when even the smallest micro batch does not fit.
    """
    for micro_batches in plan.divisions():
        tried = plan.divided(micro_batches)
        fits = _fits(update, whole, tried)
        if all(distributed.gather_values(fits)):
            return micro_batches
        release_memory(update.state.device, update.state.compiled)
    raise too_little_memory(tried, update.state.device)


def too_little_memory(plan: Plan, device: torch.device) -> InputError:
    """Return the error of a device that runs out of memory, with the settings to change."""
    images = plan.micro_batch
    smaller = f"system.device_batch below {images}, " if images > plan.multiple else ""
    return InputError(
        f"{device} has too little memory to train on {images} image{'s' * (images > 1)} at a time: "
        f"set {smaller}a lower system.memory_budget (with system.compile on) or "
        "system.checkpoint_activations; the same command then goes on"
    )


def _fits(update: Update, whole: Batch, plan: Plan) -> bool:
    """Return whether the passes of a step fit into the memory of this rank."""
    state, size = update.state, plan.micro_batch
    # The last images of the run: what begins late in it, such as an adversary, has begun there.
    positions = torch.arange(plan.total - size, plan.total)
    batch = Batch(whole.images[:size], whole.targets[:size], positions, [])
    # The second pass has the gradients of the first in memory. Graphs are recorded in the second.
    passes = 3 if state.cuda_graphs else min(2, plan.micro_batches)
    generators = [state.device] if state.device.type == "cuda" else []
    with distributed.alone(), torch.random.fork_rng(generators), state.unchanged():
        try:
            reserved = state.reserve()
            for _ in range(passes):
                update.add_gradients(batch, plan.micro_batches, reduce=False)
            del reserved
        except torch.OutOfMemoryError:
            return False
    return True


def release_memory(device: torch.device, compiled: bool) -> None:
    """Free the memory of what is not used any more, and forget what was compiled for its size."""
    gc.collect()  # a compiled network refers to itself
    if compiled:
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
