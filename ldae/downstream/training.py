"""The checks before a fine-tuning or a detection, the training in its folder, and its record."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ldae import tree
from ldae.console import describe
from ldae.data.loader import Transform
from ldae.data.workers import Batch
from ldae.devices import device_for
from ldae.downstream.recipes import Recipes
from ldae.evals.call import describe_call
from ldae.evals.evaluation import Evaluation, Setup
from ldae.evals.open import Splits, labelled_splits, open_evaluation
from ldae.evals.protocol import Protocol
from ldae.files import state_hash
from ldae.precision import runs_in_bf16, unchanged_generators
from ldae.runs.checkpoints import Checkpoints
from ldae.runs.folder import open_run
from ldae.settings import OptimSettings
from ldae.train.loop import Hook
from ldae.train.plan import Plan, plan_run
from ldae.train.run import check_warmup, describe_training, train_in

_STARTS_FROM, _IMAGES_SEEN = "starts_from", "start_images_seen"


@dataclass(frozen=True)
class DownstreamProtocol(Protocol):
    """The constants of a fine-tuning or a detection."""

    name: str
    version: int
    size: str
    img_size: int | None
    augment: Any
    model: Any
    optim: OptimSettings
    seed: int
    modified: tuple[str, ...]
    """The constants that differ from the recipe's."""


@dataclass(frozen=True)
class DownstreamTraining:
    """A training on a backbone in a folder, after the checks that both kinds share."""

    kind: str
    config: Any
    run: Path
    evaluation: Evaluation
    """The images, the device, and the backbone or the network that stands on it."""
    starts_from: str
    """Hash of the backbone's weights before the training, also of one that resumes."""
    plan: Plan
    bf16: bool
    """Whether the network is trained in bfloat16."""

    @property
    def facts(self) -> dict[str, str]:
        """What a record says about the training beside the recipe: its start and its precision."""
        chosen = self.config.system.precision
        precision = "bf16" if self.bf16 else "fp32" if chosen == "auto" else chosen
        return {"starts_from": self.starts_from, "trained_in": precision}

    @property
    def recipe(self) -> str:
        """The recipe in words."""
        return f"{self.config.recipe}, version {self.config.version}, size {self.config.size}"

    @property
    def modified(self) -> str:
        """The constants that differ from the recipe's, in words."""
        return ", ".join(self.evaluation.protocol.modified) or "nothing"

    def show_plan(self, parameters: str, input: object) -> dict[str, str]:
        """Print and return what a dry run says, given the sizes of the network."""
        train = self.evaluation.train
        facts = {
            "recipe": f"{self.recipe}; changed: {self.modified}",
            "parameters": parameters,
            "input": f"{input}",
            "images": f"{len(train):,} in {train.spec}, {len(train.classes)} classes",
        } | describe_training(self.plan, self.config.optim, self.bf16, self.evaluation.device)
        print(describe(self.config, facts))
        return facts

    def open_run(self) -> AbstractContextManager[None]:
        """Open the run folder, see ``ldae.runs.folder.open_run``."""
        evaluation = self.evaluation
        return open_run(self.run, self.kind, self.config, evaluation.train, evaluation.device)

    def train(
        self,
        model: nn.Module,
        row: str,
        transform: Transform,
        mixing: Callable[[Batch], Batch],
        grade: Callable[[nn.Module], dict[str, float]],
        graded_weights: Literal["averaged", "both"] = "averaged",
    ) -> nn.Module:
        """Train a network with its loss to the end of the plan, see ``train_in``.

        ``grade`` returns the values of an evaluation for the metrics, see ``Hook``.

        Returns: the model, or its moving average where the recipe has one.
        """
        config, device = self.config, self.evaluation.device
        every = round(config.system.eval_every * self.plan.epoch)
        return train_in(
            self.run,
            model.to(device),
            config,
            config.optim,
            self.plan,
            self.evaluation.train,
            row=row,
            learns_labels=True,
            start=_start(self.starts_from, self.evaluation.model),
            transform=transform,
            mixing=mixing,
            device=device,
            hooks=(Hook(every, grade, graded_weights),) if every else (),
        )


def _start(weights: str, backbone: nn.Module) -> dict[str, Any]:
    """Return the entries of a checkpoint's description that tell the start of the training."""
    return {_STARTS_FROM: weights, _IMAGES_SEEN: getattr(backbone, "images_seen", None)}


@contextmanager
def prepare_downstream(
    command: str,
    recipes: Recipes,
    config: Any,
    run: Path,
    *,
    protocol: type[DownstreamProtocol] = DownstreamProtocol,
    splits: Splits = labelled_splits,
    multiple: int = 1,
) -> Iterator[DownstreamTraining]:
    """Join the process group, open and check a backbone and its images; nothing is written.

    Args:
        protocol: the class of the record's protocol.
        splits: opens the two splits of the images.
        multiple: see ``plan_run``.

    Raises: InputError for wrong settings, backbone or data.
    """
    tree.check(config)
    check_warmup(run, config.optim)
    bf16 = runs_in_bf16(config.system.precision, device_for(config.system.device))
    chosen = (config.recipe, config.version, config.size, config.data.img_size)
    settings = (config.augment, config.model, config.optim, config.seed)
    changed = recipes.changed_constants(config)
    modified = tuple(f"{name}={used}" for name, (_, used) in changed.items())
    setup = Setup(
        random_init=config.model.random_init,
        in_chans=config.data.in_chans,
        seed=config.seed,
        out=run,
        workers=config.system.workers,
        device=config.system.device,
    )
    data = (config.data.source, config.data.eval_source or None)
    constants = protocol(*chosen, *settings, modified)
    with (
        unchanged_generators(),
        open_evaluation(
            command, config.backbone, *data, constants, setup, splits, in_run=True
        ) as evaluation,
    ):
        evaluation = replace(evaluation, call=describe_call(command, [config]))
        images, device = len(evaluation.train), evaluation.device
        plan = plan_run(images, config.optim, config.system, device, multiple)
        # Grading takes no more images at a time than the training, which is chosen for the memory.
        at_once = min(Setup.batch_size, plan.micro_batch)
        evaluation = replace(evaluation, setup=replace(evaluation.setup, batch_size=at_once))
        begun = Checkpoints(run).describe() or {}
        starts_from = state_hash(evaluation.model.state_dict())
        if _STARTS_FROM in begun:  # the backbone may have changed since then
            starts_from, evaluation.model.images_seen = begun[_STARTS_FROM], begun[_IMAGES_SEEN]
        yield DownstreamTraining(recipes.kind, config, run, evaluation, starts_from, plan, bf16)
