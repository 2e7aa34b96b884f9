"""A cell of a table: one backbone, graded by one protocol on one data set."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ldae.evals.evaluation import Setup
from ldae.evals.protocol import Grader, Protocol
from ldae.runs import layout


class Column(NamedTuple):
    """A table [protocols.NAME] of a suite: a grader and its protocol."""

    name: str
    grader: Grader
    protocol: Protocol
    options: dict[str, Any]
    """Keywords of the grader other than protocol and setup."""
    data: tuple[str, ...]
    """Names of the data sets."""
    changes: dict[str, Any]
    """Changes of the setup."""


@dataclass(frozen=True)
class Cell:
    """One backbone graded by one column on one data set, by their names in the suite.

    Several seeds have a cell each, at the same place of the table.
    """

    backbone: str
    data: str
    column: Column
    spec: str
    train: str
    eval: str | None
    setup: Setup
    published: float | None = None
    """The published number beside the headline, in percent. It decides no result."""
    is_repeated: bool = False
    """Whether the seed of the setup is one of several."""

    def __str__(self) -> str:
        seed = f", seed {self.setup.seed}" if self.is_repeated else ""
        return f"{self.column.name} of {self.backbone} on {self.data}{seed}"

    @property
    def place(self) -> tuple[str, str, str]:
        """The place in the table."""
        return self.backbone, self.data, self.column.name

    @property
    def name(self) -> str:
        """The folder of the results, below that of the table."""
        seed = [seed_folder(self.setup.seed)] if self.is_repeated else []
        return "/".join([*self.place, *seed])

    @property
    def results(self) -> Path:
        return Path(self.setup.out) / layout.RESULTS

    @property
    def network(self) -> tuple[str, Setup]:
        """The spec and the settings that decide the weights; the other settings have defaults."""
        setup = self.setup
        names = ("random_init", "in_chans", "img_size", *(["seed"] if setup.random_init else []))
        return self.spec, Setup(**{name: getattr(setup, name) for name in names})

    @property
    def depends_on_seed(self) -> bool:
        return self.column.protocol.depends_on_seed or self.setup.random_init

    @property
    def takes_classifier(self) -> bool:
        """Whether the grader takes a network with its head, not only a backbone."""
        return self.column.grader.takes("classifier")

    @property
    def learns(self) -> bool:
        """Whether the grader learns from or searches the images of train."""
        return self.column.grader.takes("eval_data")

    def repeats(self) -> list["Cell"]:
        """Return a cell for each seed of the setup, or one cell if no seed decides its results."""
        setup = replace(self.setup, seeds=())
        if not self.setup.seeds or not self.depends_on_seed:
            return [replace(self, setup=setup)]
        setups = [
            replace(setup, seed=seed, out=Path(setup.out) / seed_folder(seed))
            for seed in self.setup.seeds
        ]
        return [replace(self, setup=one, is_repeated=True) for one in setups]

    def run(self) -> dict:
        """Grade the backbone, and return the content of results.json.

        A grader without eval_data grades the images of eval, or of train if there is no eval.

        Raises: InputError, as the grader does.
        """
        grader, protocol, options = self.column.grader, self.column.protocol, self.column.options
        data = {"data": self.eval or self.train}
        if self.learns:
            data = {"data": self.train, "eval_data": self.eval}
        return grader.function(self.spec, **data, protocol=protocol, **options, setup=self.setup)


def seed_folder(seed: int) -> str:
    """Return the name of the folder with the results of one of several seeds."""
    return f"seed={seed}"
