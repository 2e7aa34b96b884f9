"""``ldae grid``: probe a run at every t and after every block, as in the paper's appendix."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from tyro.conf import Fixed

from ldae import draws, noise
from ldae.backbones.run import load_method
from ldae.console import print_main
from ldae.distributed import gather_values, is_main
from ldae.errors import InputError
from ldae.evals.evaluation import EvalSourceSpec, Evaluation, Setup, SourceSpec
from ldae.evals.features import extract_share, image_names, known_labels
from ldae.evals.heads import SweepProtocol, grade_heads, report_few_updates, sweep, train_heads
from ldae.evals.open import open_evaluation
from ldae.evals.seeds import over_seeds
from ldae.evals.subsets import held_out
from ldae.evals.taps import Tap
from ldae.files import as_json, read_object, report_write_errors, write, write_json
from ldae.markdown import markdown_table
from ldae.method import LDAE
from ldae.plots.heat_maps import HeatMap, save_heat_maps
from ldae.runs import layout
from ldae.runs.kinds import KINDS, pretraining_in
from ldae.tree import AnyPath

Input = Literal["clean", "noisy"]

_CELLS = "cells"  # the key of the cells, among results and in the file of a pass


@dataclass(frozen=True)
class GridProtocol(SweepProtocol):
    """A sweep of linear heads on averaged tokens, in every cell."""

    weight_decays: Fixed[tuple[float, ...]] = SweepProtocol.weight_decays
    total_batch: Fixed[int] = SweepProtocol.total_batch
    name: Fixed[str] = "grid"
    version: Fixed[int] = 1
    timesteps: tuple[int, ...] = (0, 10, 20, 40, 80)  # the paper's, of 1000
    """Timesteps to probe at; the default ones are scaled to the run's number of noise levels."""
    leading: tuple[int, ...] = ()
    """Numbers of leading blocks, of encoder and decoder, to probe after; by default all."""
    inputs: tuple[Input, ...] = ("clean",)
    """clean: z_0, or gamma_t z_0 where the row scales its input; noisy: z_t, where each image has
    one draw of noise, by --seed, at every t and in all epochs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("leading", tuple(sorted(set(self.leading))))
        for name in ("timesteps", "inputs"):  # named twice, a pass would be done twice
            self._set(name, tuple(dict.fromkeys(getattr(self, name))))


@over_seeds
def grid(
    run: Annotated[AnyPath, tyro.conf.arg(metavar="RUN")],
    /,
    data: SourceSpec,
    eval_data: EvalSourceSpec = None,
    *,
    protocol: GridProtocol = GridProtocol(),
    setup: Setup = Setup(),
) -> dict:
    """Probe a run's averaged tokens at every t and after every block.

    One pass of the network for each t gives the features of all blocks. In each cell the learning
    rate is chosen on a held-out tenth of train, and a head of that rate, trained on all of train,
    is graded. results.json, grid.md and grid.png hold the accuracy of every cell. Each finished
    pass is kept beside them, and the same command goes on with the first one that is missing.

    Args:
        run: a run folder.

    Returns: the content of results.json; its results are all cells, and top-1 and top-5 of the cell
    that is best on the held-out tenth.

    Raises: InputError when there is no such run, t or block, and for data that cannot be graded.

    Examples:
        >>> protocol = ldae.GridProtocol(timesteps=(10, 80), inputs=("clean", "noisy"))
        >>> record = ldae.grid("runs/l_dae", "/data/imagenet", protocol=protocol)
        >>> max(cell["top1"] for cell in record["results"]["cells"])
    """
    if setup.random_init:
        raise InputError("an untrained network has no t: ldae linear grades the control")
    run = Path(run).expanduser()
    kind = pretraining_in(run)
    if kind != "pretraining":
        raise InputError(
            f"{run} is {KINDS[kind].noun}, which has no t: ldae linear {run} --blocks 0 1 probes "
            "its blocks"
        )
    method, _ = load_method(run)
    steps, blocks = len(method.sigma), method.denoiser.stages
    if protocol.timesteps == GridProtocol.timesteps:
        scaled = dict.fromkeys(noise.level_of_1000(t, steps) for t in protocol.timesteps)
        protocol = replace(protocol, timesteps=tuple(scaled))
    for name, allowed in (("timesteps", range(steps)), ("leading", range(1, blocks + 1))):
        for value in getattr(protocol, name):
            if value not in allowed:
                raise InputError(f"{name} {value}: {run} has {name} {allowed[0]} to {allowed[-1]}")
    with open_evaluation("grid", run, data, eval_data, protocol, setup) as evaluation:
        cells = list(_cells(evaluation, method))
        best = max(cells, key=lambda cell: cell["held_out_top1"])
        folder, seed = evaluation.folder, evaluation.protocol.seed
        if is_main():
            write(folder / layout.GRID_TABLE, table(cells, best, seed).encode())
            save_heat_maps(heat_maps(cells, best), folder / layout.GRID_PICTURE)
        draw = {"draws_per_image": 1, "seed": seed} if "noisy" in protocol.inputs else None
        record = evaluation.write({**best, _CELLS: cells}, method.denoiser.width, noise=draw)
        print_main(
            f"the best cell on the held-out tenth of train is {best['input']} input, t = "
            f"{best['t']}, leading blocks {best['leading']}; every cell is in "
            f"{folder / layout.GRID_TABLE}"
        )
        return record


class BlockReader:
    """A reader of a run's averaged tokens at a fixed t, after each of the ``leading`` blocks.

    ``leading`` are ascending numbers, from 1 on. The noise of an image is drawn by its index plus
    ``first``.
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
            eps = draws.normal(self.seed, numbers, shape)
        taps = self.method.denoiser.taps(*self.method.input_at(images, self.t, eps))
        # In this order zip ends before it computes the next block.
        numbered = zip(range(1, max(self.leading) + 1), taps)
        return [tokens.mean(1) for number, tokens in numbered if number in self.leading]

    def columns(self, image: torch.Tensor) -> dict[Tap, slice]:
        columns, first = {}, 0
        parts = self(image, torch.zeros(1, dtype=torch.int64))
        for number, part in zip(self.leading, parts, strict=True):
            columns[Tap(number - 1, "avg")] = slice(first, first := first + part.shape[1])
        return columns


class Pass(NamedTuple):
    """A pass over all images: one kind of input at one t, and the file that keeps its cells."""

    kind: Input
    t: int
    key: dict
    """Everything that decides the cells, in JSON's types."""
    path: Path

    def kept_cells(self) -> list[dict] | None:
        """Return the cells of an earlier start. A file with another key or damage is removed."""
        held = read_object(self.path)
        cells = held.pop(_CELLS, None)
        if held == self.key:
            return cells
        with report_write_errors(self.path):
            self.path.unlink(missing_ok=True)
        return None

    def keep(self, cells: list[dict]) -> None:
        """Write the cells. Raises: InputError when they cannot be written."""
        write_json(self.path, self.key | {_CELLS: cells})


def _passes(evaluation: Evaluation) -> list[Pass]:
    """Return the passes of a grid, whose model is the whole method."""
    protocol, origins, passes = evaluation.protocol, evaluation.origins(), []
    for kind, t in itertools.product(protocol.inputs, protocol.timesteps):
        alone = asdict(replace(protocol, inputs=(kind,), timesteps=(t,)))
        key = {"protocol": alone | {"precision": evaluation.setup.precision}, **origins}
        path = evaluation.folder / layout.GRID_PASSES / f"{kind}-t={t}.json"
        passes.append(Pass(kind, t, as_json(key), path))
    return passes


def _cells(evaluation: Evaluation, method: LDAE) -> Iterator[dict]:
    """Yield the cells by input, t and block. The passes of an earlier start are not done again."""
    protocol, labels = evaluation.protocol, known_labels(evaluation.train)
    held = held_out(image_names(evaluation.train), labels, protocol.held_out)
    report_few_updates(held, protocol)
    evaluation = replace(evaluation, model=method)
    passes = _passes(evaluation)
    # Rank 0 alone may see the files.
    kept = gather_values([one.kept_cells() for one in passes] if is_main() else [])[0]
    for number, (one, cells) in enumerate(zip(passes, kept, strict=True), 1):
        state = "" if cells is None else ", finished before"
        print_main(f"pass {number} of {len(passes)}: {one.kind} input, t = {one.t}{state}")
        if cells is None:
            try:
                cells = _probe(evaluation, method, one.kind, one.t, held)
            except KeyboardInterrupt:
                done = sum(each.path.exists() for each in passes)
                print_main(f"passes kept: {done} of {len(passes)}; the same command goes on")
                raise
            if is_main():
                one.keep(cells)
        yield from cells


def _probe(
    evaluation: Evaluation, method: LDAE, kind: Input, t: int, held: torch.Tensor
) -> list[dict]:
    """Return the cells of one pass; ``held`` (N,) marks the train images that choose the heads."""
    protocol, device = evaluation.protocol, evaluation.device
    classes = int(known_labels(evaluation.train).max()) + 1
    leading = protocol.leading or tuple(range(1, method.denoiser.stages + 1))
    read = partial(BlockReader, method, t, leading, kind == "noisy", protocol.seed)
    train = extract_share(evaluation.encoder(read(first=0)), evaluation.train)
    after_train = evaluation.encoder(read(first=len(evaluation.train)))
    test = extract_share(after_train, evaluation.eval)
    taps = tuple(train.columns)
    swept = sweep(train, held, classes, protocol.heads_of(taps), protocol, device)
    best = {tap: max((h for h in swept if h.tap == tap), key=swept.get) for tap in taps}
    trained = train_heads(train, list(best.values()), classes, protocol, device)
    graded = grade_heads(trained, test, device)
    cells = []
    for tap, head in best.items():
        top1, top5 = graded[tap][0].tolist()
        cells.append(
            {
                "input": kind,
                "t": t,
                "leading": tap.block + 1,
                "learning_rate": head.learning_rate,
                "held_out_top1": swept[head],
                "top1": top1,
                "top5": top5,
            }
        )
    return cells


def table(cells: list[dict], best: dict, seed: int) -> str:
    """Return top-1 of every cell as Markdown: a table for each input, the best cell in bold.

    ``seed`` is the seed of the noise.
    """
    text = ""
    for kind, steps, leading, by_place in _tables(cells):
        text += f"Top-1 in percent, {kind} input"
        if kind == "noisy":
            text += (
                f": each image has one draw of noise, by seed {seed}, at every t and in all epochs"
            )
        rows = []
        for t in steps:
            row = (by_place[t, number] for number in leading)
            top1 = (f"**{c['top1']:.2f}**" if c is best else f"{c['top1']:.2f}" for c in row)
            rows.append([str(t), *top1])
        header = ["t \\ leading blocks", *map(str, leading)]
        text += f"\n\n{markdown_table(header, rows)}\n"
    return text + (
        f"The bold cell is best on the held-out tenth of train, {best['held_out_top1']:.2f} there. "
        "Report its accuracy: the highest of a table would be chosen on the images that it is "
        "measured on. Each cell's learning rate was chosen on the held-out tenth too; "
        f"{layout.RESULTS} has it, and the accuracy there.\n"
    )


def heat_maps(cells: list[dict], best: dict) -> list[HeatMap]:
    """Return a heat map of top-1 for each input, with the best cell framed."""
    return [
        HeatMap(
            title=f"Top-1 in percent, {kind} input; framed: best on the held-out tenth of train",
            rows=[f"t = {t}" for t in steps],
            columns=[str(number) for number in leading],
            column_label="leading blocks",
            values=[[by_place[t, number]["top1"] for number in leading] for t in steps],
            framed=(steps.index(best["t"]), leading.index(best["leading"]))
            if kind == best["input"]
            else None,
        )
        for kind, steps, leading, by_place in _tables(cells)
    ]


def _tables(cells: list[dict]) -> Iterator[tuple[str, list[int], list[int], dict]]:
    """Yield for each input its timesteps, its leading blocks and its cells by both."""
    for kind in dict.fromkeys(cell["input"] for cell in cells):
        by_place = {(c["t"], c["leading"]): c for c in cells if c["input"] == kind}
        steps, leading = (list(dict.fromkeys(place[i] for place in by_place)) for i in (0, 1))
        yield kind, steps, leading, by_place
