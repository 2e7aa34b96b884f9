"""The rule of the scale auto: from facts about images and machine to settings, each with a reason.

Nothing is measured here.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ldae.errors import InputError
from ldae.train.plan import steps_of

LEAST_IMAGES = 128  # a batch of the least size
DECODER = ("model.decoder_depth", "model.decoder_embed_dim", "model.decoder_num_heads")
MOST_EPOCHS = 1600  # of MAE's longest pre-training (He et al. 2022, figure 7)

_TRAINING = 0.9  # share of the hours; the start, the tokenizer, measurements and saves get the rest
_USEFUL_EPOCHS = 400  # the paper's length: further epochs do not justify a larger network
# At 64 tokens an image these are 20 tokens a parameter, which is optimal for the compute of
# language models (Hoffmann et al. 2022). The paper's run has 1.7, but there compute is no limit.
_IMAGES_A_PARAMETER = 0.3
_BYTES_A_PARAMETER = 16  # the weight, its gradient and AdamW's two moments, in float32
_MEMORY = 0.5  # share of the memory that weights, and on a CPU activations, may fill
_STEPS = 20_000  # the fewest that a batch above the smallest leaves
_BATCHES = (128, 2048)  # the smallest and the largest: those of the scales demo and paper
_LEAST_STEPS = 10  # of the shortest run, at the smallest batch
_PEAK = 1e-3  # learning rate of the scales demo and small, with these batches; 0.8e-3 in the paper
_WARMUP = 0.1  # share of the epochs; 5 % at the scale small, 12.5 % at demo, 25 % in the paper
_VARIANCE = 0.95  # share of the variance of patches that the axes keep
# The fewest and the most axes. Fewer cost accuracy (benchmarks/results/cifar10-latents.json); the
# paper has 32.
_AXES = (8, 32)
_LEAST_SIDE = 4  # tokens along an edge
_IDLE = 0.05  # share of a core; less decoding than this needs no worker
_SPARE = 1.2  # workers for each one that decoding keeps busy


class Choice(NamedTuple):
    """The value of a setting, and the reason for it as a part of a sentence."""

    value: Any
    why: str


Choices = dict[str, Choice]  # dotted name of a setting -> its choice


class Network(NamedTuple):
    """The sizes of an encoder."""

    name: str
    depth: int
    embed_dim: int
    num_heads: int
    side: int
    """Largest number of tokens along an edge of the image."""


NETWORKS = (
    Network("vit_tiny_patch16_224", 2, 128, 4, 8),  # the scale demo
    Network("vit_tiny_patch16_224", 2, 192, 3, 8),
    Network("vit_tiny_patch16_224", 4, 192, 3, 8),  # the scale small
    Network("vit_tiny_patch16_224", 6, 192, 3, 16),
    Network("vit_small_patch16_224", 6, 384, 6, 16),
    Network("vit_base_patch16_224", 6, 768, 12, 16),
    Network("vit_large_patch16_224", 12, 1024, 16, 16),  # the paper
)
"""In the order of their sizes. As in the paper, encoders have half of the blocks of their ViTs."""

# Largest number of tokens along an edge -> sizes of images with their patches. Small networks get
# patches of at most 8 pixels: with 16, a run on Imagenette was ten points worse than one with 8,
# which was longer, however (benchmarks/results/README.md).
_SIZES = {
    8: ((32, 4), (64, 8)),
    16: ((64, 4), (96, 8), (128, 8), (224, 16), (256, 16)),
}


@dataclass(frozen=True)
class Images:
    """Facts about the training images of a run."""

    count: int
    side: int
    """Median of their short sides, in pixels."""
    decode_seconds: float
    """Seconds in which one core decodes and crops an image."""


@dataclass(frozen=True)
class Machine:
    """The part of the machine that one rank has."""

    gpu: bool
    cores: int
    memory: int
    """Bytes, of the GPU or for the process."""
    ranks: int = 1
    busy: float = 0.0
    """Cores that other processes keep busy, but not the other ranks."""


def choose_sizes(network: Network, side: int, given: Mapping[str, Any]) -> Choices:
    """Return the size of the image and of its patches for a network.

    Args:
        side: median of the short sides of the images.
        given: settings of the user by name; the size that is missing is made to fit.
    """
    known = _SIZES[network.side]
    if side < known[0][0]:  # larger images would only have more tokens
        known = _SIZES[8]
    img_size, patch_size = max((pair for pair in known if pair[0] <= side), default=known[0])
    if "data.img_size" in given:
        img_size = given["data.img_size"]
        divisors = [size for size in range(1, img_size + 1) if img_size % size == 0]
        patch_size = min(divisors, key=lambda size: abs(math.log(img_size / size / network.side)))
        if img_size // patch_size < _LEAST_SIDE:
            near = max(round(img_size / network.side), 1) * network.side
            raise InputError(
                f"data.img_size {img_size} has no patch of which {_LEAST_SIDE} fit along an edge: "
                f"take another size, such as {near}"
            )
    elif "model.patch_size" in given:
        patch_size = given["model.patch_size"]
        img_size = patch_size * max(min(network.side, side // patch_size), _LEAST_SIDE)
    why = f"half of the images have a short side of at least {side} pixels"
    if img_size > side:
        why += "; smaller ones are enlarged"
    elif img_size == known[-1][0] < side:
        why += "; this is the most for a network of this size"
    tokens = img_size // (given.get("model.patch_size") or patch_size)
    return {
        "data.img_size": Choice(img_size, why),
        "model.patch_size": Choice(patch_size, f"{tokens} x {tokens} tokens"),
    }


def describe_network(network: Network, own_decoder: bool) -> Choices:
    """Return the settings of a network.

    Args:
        own_decoder: whether the recipe has a decoder with sizes of its own, as MAE has. It then has
            half of the width, as with MAE's ViT-L, and half of the blocks, as at the scales demo
            and small. Without, the decoder is as large as the encoder.
    """
    name, depth, embed_dim, num_heads, _ = network
    encoder = {
        "model.name": Choice(name, ""),
        "model.depth": Choice(depth, "blocks of the encoder"),
        "model.embed_dim": Choice(embed_dim, "its width"),
        "model.num_heads": Choice(num_heads, ""),
    }
    if not own_decoder:
        return encoder
    decoder = (
        Choice(depth // 2, "half of the encoder's blocks"),
        Choice(embed_dim // 2, "half of its width, as in MAE's ViT-L"),
        Choice(num_heads, ""),
    )
    return encoder | dict(zip(DECODER, decoder, strict=True))


def pace(step_pace: float, images: Images, machine: Machine) -> float:
    """Return the images a second of all ranks at which a run trains.

    On a GPU the slower of step and decoding decides. On a CPU the two share the cores.

    Args:
        step_pace: images a second of the training step of one rank, without decoding.
    """
    decode = images.decode_seconds / machine.cores
    seconds = max(1 / step_pace, decode) if machine.gpu else 1 / step_pace + decode
    return machine.ranks / seconds


def images_in(hours: float, pace: float) -> float:
    """Return the images that a run of so many hours sees at ``pace`` images a second."""
    return hours * 3600 * _TRAINING * pace


def choose_network(
    parameters: Sequence[int],
    pace_of: Callable[[int], float],
    images: Images,
    machine: Machine,
    hours: float,
) -> tuple[int, str]:
    """Return the index of the largest network that sees enough images, and the reason.

    Args:
        parameters: number of parameters of each network, in rising order.
        pace_of: returns the pace of the network with this index, or 0 if the network does not fit
            into the memory. Each call measures, so a network is measured only if the one before it
            is fast enough.
    """
    useful = _USEFUL_EPOCHS * images.count
    chosen, seen, larger = 0, images_in(hours, pace_of(0)), ""
    for number, count in enumerate(parameters[1:], start=1):
        needed = _IMAGES_A_PARAMETER * count
        if needed <= min(seen, useful):
            fits = _BYTES_A_PARAMETER * count <= _MEMORY * machine.memory
            pace = pace_of(number) if fits else 0.0
            if not pace:
                larger = f"; {_millions(count)} would need more memory"
                break
            seen = images_in(hours, pace)
        lengths = {f"{hours:g} hours": seen, f"{_USEFUL_EPOCHS} epochs": useful}
        if few := [length for length, images_seen in lengths.items() if needed > images_seen]:
            larger = f"; {_millions(count)} would need {_millions(needed)} images, more than "
            larger += f"{' and '.join(few)} have"
            break
        chosen = number
    return chosen, f"{_millions(parameters[chosen])} parameters{larger}"


def too_few_hours(parameters: int, pace: float, images: Images, hours: float) -> str:
    """Return a sentence with the hours that a network needs; "" when ``hours`` are enough.

    Args:
        parameters: number of parameters of the network.
        pace: images a second at which the network trains.
    """
    needed, seen = _IMAGES_A_PARAMETER * parameters, images_in(hours, pace)
    if seen >= needed or needed > MOST_EPOCHS * images.count:  # more hours would not help
        return ""
    return (
        f"hours {hours:g} are too few for a network of {_millions(parameters)} parameters: it "
        f"needs {needed:,.0f} images and would see {seen:,.0f}; "
        f"{_rounded_up(hours * needed / seen):g} hours are enough"
    )


def choose_batch(epochs: float, images: Images, ranks: int) -> Choice:
    """Return the batch size of a run of so many epochs: a power of two, for each rank."""
    low, high = _BATCHES
    most = min(epochs * images.count / _STEPS, high, images.count)
    batch = 2 ** int(math.log2(max(most, low)))
    batch = max(batch // ranks, 1) * ranks
    steps = steps_of(epochs, images.count, batch)
    why = f"{steps:,} steps; from {2 * _STEPS:,} steps of {low} on it grows, up to {high}"
    return Choice(batch, why)


def choose_blr(batch_size: int) -> Choice:
    """Return the base learning rate ``optim.blr`` that gives the rule's peak at a batch size."""
    why = f"a peak of {_PEAK:g} at this batch, as at the scales demo and small"
    return Choice(_PEAK * 256 / batch_size, why)


def choose_epochs(pace: float, hours: float, images: Images) -> Choice:
    """Return the epochs that fit into the hours at ``pace`` images a second.

    Raises: InputError when the hours are too few for a run.
    """
    seen = images_in(hours, pace)
    if seen < _LEAST_STEPS * _BATCHES[0]:
        needed = hours * _LEAST_STEPS * _BATCHES[0] / seen
        raise InputError(
            f"hours {hours:g} are too few: at {pace:.3g} images a second, the shortest run takes "
            f"{needed:.2g} hours"
        )
    epochs = seen / images.count
    if epochs >= MOST_EPOCHS:
        why = f"the most, as in MAE's longest run; they take {MOST_EPOCHS / epochs * hours:.2g} h"
        return Choice(float(MOST_EPOCHS), why)
    why = f"{_TRAINING:.0%} of {hours:g} hours at {pace:,.0f} images a second"
    return Choice(_rounded_down(epochs), why)


def choose_warmup(epochs: float) -> Choice:
    """Return the epochs of warm-up."""
    return Choice(_rounded_down(_WARMUP * epochs), f"{_WARMUP:.0%} of the epochs")


def choose_axes(variances: Sequence[float]) -> Choice:
    """Return the number of principal axes of patches to keep, from the variance of each."""
    total, patch_dim = sum(variances), len(variances)
    shares = [part / total if total else 1.0 for part in itertools.accumulate(variances)]
    enough = (n for n, share in enumerate(shares, start=1) if share >= _VARIANCE)
    fewest = next(enough, patch_dim)
    low, high = (min(bound, patch_dim) for bound in _AXES)
    count = min(max(fewest, low), high)
    why = f"these axes have {shares[count - 1]:.0%} of the variance of patches, of {patch_dim} axes"
    bound = {low: f"the least is {low}", high: f"the most is {high}"}.get(count)
    return Choice(count, f"{why}; {bound}" if bound and count != fewest else why)


def choose_workers(pace: float, images: Images, machine: Machine) -> Choice:
    """Return the data workers of a rank at ``pace`` images a second of all ranks."""
    busy = pace / machine.ranks * images.decode_seconds
    why = f"decoding takes {1000 * images.decode_seconds:.2g} ms an image"
    if busy < _IDLE:
        return Choice(0, f"{why}, {busy:.1%} of a core")
    most = max(machine.cores - (not machine.gpu), 1)
    needed = math.ceil(_SPARE * busy)
    if needed > most:
        return Choice(most, f"{why}; more cores, or the file of `ldae cache`, would be faster")
    return Choice(needed, f"{why}, which keeps {busy:.2g} cores busy")


def choose_device_batch(batch_size: int, bytes_an_image: int, machine: Machine) -> Choice:
    """Return the images in a forward pass of a rank.

    Args:
        bytes_an_image: what a training step keeps of an image; not read for a GPU.
    """
    if machine.gpu:
        return Choice("auto", "the largest that fits into the memory, tried before the first step")
    share = batch_size // machine.ranks
    most = _MEMORY * machine.memory / max(bytes_an_image, 1)
    if share <= most:
        return Choice("auto", f"a rank's {share} images fit into the memory at once")
    parts = [size for size in range(1, share) if share % size == 0 and size <= most]
    return Choice(max(parts, default=1), "more images at once may not fit into the memory")


def _rounded_down(value: float) -> float:
    """Return a positive number with three digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / unit) * unit:.3g}")


def _rounded_up(value: float) -> float:
    """Return a positive number with two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.2g}")


def _millions(count: float) -> str:
    return f"{count / 1e6:.3g} million"
