"""``ldae grid``: probe a run at every t and after every block, as the paper's appendix does."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tyro.conf import Fixed

from ldae import noise
from ldae.backbones.run import load_run
from ldae.data.source import Source
from ldae.distributed import is_main
from ldae.errors import InputError
from ldae.evals.evaluation import EvalSourceSpec, Evaluation, Setup, SourceSpec, open_evaluation
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
    """A sweep of linear heads in every cell, on averaged tokens."""

    weight_decays: Fixed[tuple[float, ...]] = SweepProtocol.weight_decays
    total_batch: Fixed[int] = SweepProtocol.total_batch
    name: Fixed[str] = "grid"
    version: Fixed[int] = 1
    timesteps: tuple[int, ...] = (0, 10, 20, 40, 80)  # the paper's, of 1000
    """The fixed t; the default ones are scaled to the run's number of noise levels."""
    leading: tuple[int, ...] = ()
    """Numbers of leading blocks, of encoder and decoder, that are called the encoder; none: all."""
    inputs: tuple[Input, ...] = ("clean",)
    """clean: z_0, or gamma_t z_0 where the row scales its input; noisy: z_t."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("leading", tuple(sorted(set(self.leading))))


def grid(
    run: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    /,
    data: SourceSpec,
    eval_data: EvalSourceSpec = None,
    *,
    protocol: GridProtocol = GridProtocol(),
    setup: Setup = Setup(),
) -> dict:
    """Probe a run's averaged tokens at every t and after every block.

    One pass of the network for each t gives the features of all blocks. In each cell the learning
    rate is chosen on a tenth of train, and the head of that rate, trained on all of train, is
    graded. results.json, grid.md and grid.png hold the accuracy of every cell.

    Args:
        run: a run folder.

    Returns: what results.json holds; its results are every cell, and top-1 and top-5 of the one that
    is best on the tenth of train.

    Raises: InputError when there is no such run, t or block, and for data that cannot be graded.
    """
    if setup.random_init:
        raise InputError("an untrained network has no t: ldae linear grades the control")
    method, _ = load_run(Path(run))
    steps, blocks = len(method.sigma), method.denoiser.stages
    if protocol.timesteps == GridProtocol.timesteps:
        scaled = dict.fromkeys(noise.level_of_1000(t, steps) for t in protocol.timesteps)
        protocol = replace(protocol, timesteps=tuple(scaled))
    for what, values, allowed in (
        ("timesteps", protocol.timesteps, range(steps)),
        ("leading", protocol.leading, range(1, blocks + 1)),
    ):
        for value in values:
            if value not in allowed:
                raise InputError(f"{what} {value}: {run} has {what} {allowed[0]} to {allowed[-1]}")
    with open_evaluation("grid", str(run), data, eval_data, protocol, setup) as evaluation:
        labels = known_labels(evaluation.train)
        held = held_out(names(evaluation.train), labels, evaluation.protocol.held_out)
        cells = list(_cells(evaluation, method, held, int(labels.max()) + 1))
        best = max(cells, key=lambda cell: cell["held_out_top1"])
        folder = evaluation.folder
        if is_main():
            write(folder / layout.GRID_TABLE, table(cells, best).encode())
            save_heat_maps(heat_maps(cells, best), folder / layout.GRID_PICTURE)
        return evaluation.write({**best, "cells": cells}, method.denoiser.width)


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
        taps = self.method.denoiser.taps(*self.method.input_at(images, self.t, eps))
        wanted = zip(range(1, max(self.leading) + 1), taps)  # in this order: no block too many
        return [tokens.mean(1) for number, tokens in wanted if number in self.leading]

    def columns(self, image: torch.Tensor) -> dict[Tap, slice]:
        columns, first = {}, 0
        parts = self(image, torch.zeros(1, dtype=torch.int64))
        for number, part in zip(self.leading, parts, strict=True):
            columns[Tap(number - 1, "avg")] = slice(first, first := first + part.shape[1])
        return columns


def _cells(
    evaluation: Evaluation, method: LDAE, held: torch.Tensor, classes: int
) -> Iterator[dict]:
    protocol = evaluation.protocol
    leading = protocol.leading or tuple(range(1, method.denoiser.stages + 1))
    for given in protocol.inputs:
        for t in protocol.timesteps:
            found = _probe(evaluation, method, held, classes, t, leading, given == "noisy")
            yield from ({"input": given, "t": t} | cell for cell in found)


def _probe(
    evaluation: Evaluation,
    method: LDAE,
    held: torch.Tensor,
    classes: int,
    t: int,
    leading: tuple[int, ...],
    noisy: bool,
) -> Iterator[dict]:
    """Yield the cells of one t, in the order of blocks."""
    protocol, setup, device = evaluation.protocol, evaluation.setup, evaluation.device

    def features(source: Source, first: int) -> Features:
        reader = BlockReader(method, t, leading, noisy, protocol.seed, first)
        encoder = Encoder(method, device, setup.precision, evaluation.transform, reader)
        return own_rows(encoder, source, setup.batch_size, setup.workers)

    train, test = features(evaluation.train, 0), features(evaluation.eval, len(evaluation.train))
    taps = tuple(train.columns)
    swept = sweep(train, held, classes, protocol.heads_of(taps), protocol, device)
    best = {tap: max((h for h in swept if h.tap == tap), key=swept.get) for tap in taps}
    trained = train_heads(train, list(best.values()), classes, protocol, device)
    tops = grade_heads(trained, test, device)
    for tap, head in best.items():
        top1, top5 = tops[tap][0].tolist()
        yield {
            "leading": tap.block + 1,
            "learning_rate": head.learning_rate,
            "held_out_top1": swept[head],
            "top1": top1,
            "top5": top5,
        }


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
