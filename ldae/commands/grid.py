"""The verb that probes a run at every t and after every block: the appendix's tables."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ldae import noise
from ldae.backbones.fold import input_at
from ldae.backbones.preprocessing import preprocessing
from ldae.backbones.run import load_run
from ldae.distributed import is_main
from ldae.errors import InputError
from ldae.evals.evaluation import Evaluation, Setup, SourceSpec, open_evaluation
from ldae.evals.features import Encoder, Features, known_labels, names, own_rows
from ldae.evals.heads import grade_heads, train_heads
from ldae.evals.subsets import held_out
from ldae.evals.sweep import SweepProtocol, sweep
from ldae.evals.taps import Tap
from ldae.files import write
from ldae.method import LDAE
from ldae.plots.heat_maps import HeatMap, save_heat_maps
from ldae.runs import layout

Input = Literal["clean", "noisy"]


@dataclass(frozen=True)
class GridProtocol(SweepProtocol):
    """Every constant of the numbers; averaged tokens are probed."""

    name: str = "grid"
    version: int = 1
    timesteps: tuple[int, ...] = (0, 10, 20, 40, 80)  # the paper's
    leading: tuple[int, ...] = ()
    """Numbers of leading blocks, of the encoder and the decoder; none: all of them."""
    inputs: tuple[Input, ...] = ("clean",)
    """clean: z_0, or gamma_t z_0 where the row scales its input; noisy: z_t."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inputs:
            raise InputError("inputs must name clean, noisy or both")


def grid(
    run: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    /,
    data: SourceSpec,
    eval_data: SourceSpec | None = None,
    *,
    timesteps: tuple[int, ...] | None = None,
    leading: tuple[int, ...] = (),
    inputs: tuple[Input, ...] = GridProtocol.inputs,
    learning_rates: tuple[float, ...] = GridProtocol.learning_rates,
    epochs: int = GridProtocol.epochs,
    setup: Annotated[Setup, tyro.conf.arg(name="")] = Setup(),
) -> dict:
    """Probe a run's averaged tokens at every t and after every block.

    One pass of the network for each t gives the features of all blocks. In each cell the learning
    rate is chosen on a tenth of train, and the head of that rate, trained on all of train, is
    graded. results.json, grid.md and grid.png hold the accuracy of every cell.

    Args:
        run: a run folder.
        data: the labelled images whose train split is learned from.
        eval_data: the images to classify instead of the evaluation split of data.
        timesteps: the fixed t; by default those of 0, 10, 20, 40 and 80 that the run has.
        leading: numbers of leading blocks that are called the encoder; by default all.
        inputs: clean, noisy or both.
        learning_rates: at a batch of 256; the best on a tenth of train is used.
        epochs: passes over the features.
        setup: how the run is opened and computed.

    Returns: what results.json holds; its results are every cell, and top-1 and top-5 of the one that
    is best on the tenth of train.

    Raises: InputError when there is no such run, t or block, and for data that can not be graded.
    """
    if setup.random_init:
        raise InputError("an untrained network has no t: ldae linear grades the control")
    method, _ = load_run(Path(run))
    steps, blocks = len(method.sigma), 2 * method.denoiser.shape.depth
    protocol = GridProtocol(
        learning_rates=tuple(learning_rates),
        epochs=epochs,
        timesteps=timesteps or tuple(t for t in GridProtocol.timesteps if t < steps),
        leading=tuple(sorted(set(leading))),
        inputs=tuple(inputs),
        seed=setup.seed,
    )
    for what, values, allowed in (
        ("timesteps", protocol.timesteps, range(steps)),
        ("leading", protocol.leading, range(1, blocks + 1)),
    ):
        for value in values:
            if value not in allowed:
                raise InputError(f"{what} {value}: {run} has {what} {allowed[0]} to {allowed[-1]}")
    with open_evaluation("grid", str(run), data, eval_data, setup) as graded:
        labels = known_labels(graded.train)
        held = held_out(names(graded.train), labels, protocol.held_out)
        cells = list(_cells(graded, method, protocol, held, int(labels.max()) + 1))
        best = max(cells, key=lambda cell: cell["held_out_top1"])
        folder = graded.folder(protocol)
        if is_main():
            write(folder / layout.GRID_TABLE, table(cells, best).encode())
            save_heat_maps(heat_maps(cells, best), folder / layout.GRID_PICTURE)
        return graded.write(protocol, {**best, "cells": cells}, method.denoiser.shape.embed_dim)


class BlockReader:
    """The averaged tokens after each of the ``leading`` blocks of a run's network, at a fixed t.

    ``leading`` are ascending numbers from 1 on. ``first`` is added to an image's index for the number that its noise is drawn by.
    """

    def __init__(
        self, method: LDAE, t: int, leading: tuple[int, ...], noisy: bool, seed: int, first: int
    ) -> None:
        self.method, self.t, self.leading = method, t, leading
        self.noisy, self.seed, self.first = noisy, seed, first

    def __call__(
        self, images: torch.Tensor, indices: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        eps = None
        if self.noisy:
            numbers = self.first + indices.to(images.device)
            shape = (self.method.tokenizer.num_tokens, self.method.tokenizer.dim)
            eps = noise.normal(self.seed, numbers, shape)
        outputs = self.method.denoiser.outputs(*input_at(self.method, images, self.t, eps))
        wanted = zip(range(1, max(self.leading) + 1), outputs)  # in this order: no block too many
        return [tokens.mean(1) for number, tokens in wanted if number in self.leading]

    def columns(self, image: torch.Tensor) -> dict[Tap, slice]:
        width = self.method.denoiser.shape.embed_dim
        return {
            Tap(number - 1, "avg"): slice(place * width, (place + 1) * width)
            for place, number in enumerate(self.leading)
        }


def _cells(
    graded: Evaluation, method: LDAE, protocol: GridProtocol, held: torch.Tensor, classes: int
) -> Iterator[dict]:
    leading = protocol.leading or tuple(range(1, 2 * method.denoiser.shape.depth + 1))
    for given in protocol.inputs:
        for t in protocol.timesteps:
            found = _probe(graded, method, protocol, held, classes, t, leading, given == "noisy")
            yield from ({"input": given, "t": t} | cell for cell in found)


def _probe(
    graded: Evaluation,
    method: LDAE,
    protocol: GridProtocol,
    held: torch.Tensor,
    classes: int,
    t: int,
    leading: tuple[int, ...],
    noisy: bool,
) -> Iterator[dict]:
    """The cells of one t, in the order of blocks."""
    train, evaluation = (
        _features(
            graded, method, BlockReader(method, t, leading, noisy, protocol.seed, first), part
        )
        for part, first in (("train", 0), ("eval", len(graded.train)))
    )
    device, taps = graded.device, tuple(train.columns)
    swept = sweep(train, held, classes, protocol.heads_of(taps), protocol, device)
    best = {tap: max((h for h in swept if h.tap == tap), key=swept.get) for tap in taps}
    trained = train_heads(train, list(best.values()), classes, protocol, device)
    tops = grade_heads(trained, evaluation, device)
    for tap, head in best.items():
        top1, top5 = tops[tap][0].tolist()
        yield {
            "leading": tap.block + 1,
            "learning_rate": head.learning_rate,
            "held_out_top1": swept[head],
            "top1": top1,
            "top5": top5,
        }


def _features(graded: Evaluation, method: LDAE, reader: BlockReader, part: str) -> Features:
    setup, source = graded.setup, getattr(graded, part)
    encoder = Encoder(method, graded.device, setup.precision, preprocessing(graded.model), reader)
    return own_rows(encoder, source, setup.batch_size, setup.workers)


def table(cells: list[dict], best: dict) -> str:
    """Top-1 of every cell as Markdown, a table for each input, the chosen cell in bold."""
    text = ""
    for given in dict.fromkeys(cell["input"] for cell in cells):
        own = [cell for cell in cells if cell["input"] == given]
        leading = list(dict.fromkeys(cell["leading"] for cell in own))
        text += f"Top-1 in percent, {given} input\n\n"
        text += f"| t \\ leading blocks | {' | '.join(map(str, leading))} |\n"
        text += "|---" * (len(leading) + 1) + "|\n"
        for t in dict.fromkeys(cell["t"] for cell in own):
            row = [
                f"**{cell['top1']:.2f}**" if cell is best else f"{cell['top1']:.2f}"
                for cell in own
                if cell["t"] == t
            ]
            text += f"| {t} | {' | '.join(row)} |\n"
        text += "\n"
    return text + (
        f"In bold the cell that is best on the held-out tenth of train, with "
        f"{best['held_out_top1']:.2f} there: its number is the honest one. The highest of a table was "
        "chosen on what it reports. Each cell's learning rate was chosen on that tenth too; "
        f"{layout.RESULTS} holds it, and the accuracy there.\n"
    )


def heat_maps(cells: list[dict], best: dict) -> list[HeatMap]:
    """One for each input."""
    maps = []
    for given in dict.fromkeys(cell["input"] for cell in cells):
        own = {(c["t"], c["leading"]): c for c in cells if c["input"] == given}
        steps, leading = (list(dict.fromkeys(key[axis] for key in own)) for axis in (0, 1))
        maps.append(
            HeatMap(
                title=f"Top-1 in percent, {given} input; framed: best on the held-out tenth of train",
                rows=[f"t = {t}" for t in steps],
                columns=[str(number) for number in leading],
                column_label="leading blocks",
                values=[[own[t, number]["top1"] for number in leading] for t in steps],
                framed=next(
                    (
                        (steps.index(t), leading.index(number))
                        for (t, number), cell in own.items()
                        if cell is best
                    ),
                    None,
                ),
            )
        )
    return maps
