"""The choice of the settings of one run, step by step, from its images to its workers."""

from typing import Any, NamedTuple

import torch

from ldae import tree
from ldae.auto import facts, rule
from ldae.auto.rule import Choice, Choices, Images
from ldae.data.source import Source
from ldae.errors import InputError
from ldae.machine.hardware import find_other_load
from ldae.train.compilation import compiles


class Candidate(NamedTuple):
    """A network that a run may have."""

    choices: Choices
    """Its sizes, and those of its images."""
    config: Any
    """The settings with these choices."""
    parameters: int


class Choosing:
    """The settings of a run while they are chosen.

    Each step measures what it needs by the settings chosen before it. The user's settings stay, and
    the others are fitted to them.

    Args:
        config: the settings of the user.
        source: the training images.
        device: the device of this rank.
        hours: the time that the run may take.
        given: the settings that are the user's, by name.
    """

    def __init__(
        self,
        config: Any,
        source: Source,
        device: torch.device,
        hours: float,
        given: dict[str, Any],
    ) -> None:
        self.config, self.source, self.device = config, source, device
        self.hours, self.given = hours, given
        self.machine = facts.machine_of_rank(device)
        self.choices: Choices = {}
        self.warnings = find_other_load(self.machine.busy, self.machine.cores)

    def choose(self) -> Choices:
        """Return the choices by the names of the settings, with the user's among them.

        Raises: InputError for too few or unreadable images, too few hours or too little memory.
        """
        self._choose_network()
        self._choose_axes()
        self._choose_length()
        self._choose_execution()
        yours = {name: Choice(value, "yours") for name, value in self.given.items()}
        return yours | self.choices

    def _take(self, choices: Choices) -> None:
        """Add the choices for settings that the recipe has."""
        known = tree.flatten(self.config)
        for name, choice in choices.items():
            if name in self.given:
                other = "" if choice.value == self.given[name] else f" (auto: {choice.value})"
                self.choices[name] = Choice(self.given[name], f"yours{other}")
            elif name in known:
                self.choices[name] = choice
                self.config = tree.put(self.config, {name: choice.value})

    def _choose_network(self) -> None:
        """Choose the largest network that the hours allow, and the size of its images."""
        self._take({"data.stats": Choice("auto", "the mean and deviation of your images")})
        side = facts.median_side(self.source, self.config)
        candidates = candidates_for(self.config, side, self.given)
        decode_seconds = facts.decode_seconds(self.source, candidates[0].config)
        self.images = Images(len(self.source), side, decode_seconds)
        speeds: dict[int, facts.Speed] = {}

        def pace(number: int) -> float:
            eager = tree.put(candidates[number].config, {"system.compile": "off"})
            try:
                speeds[number] = facts.measure_step(eager, self.device)
            except InputError:  # too little memory, since the network could be built
                if number == 0:
                    raise
                return 0.0
            return self._pace(speeds[number])

        parameters = [candidate.parameters for candidate in candidates]
        number, reason = rule.choose_network(
            parameters, pace, self.images, self.machine, self.hours
        )
        self.parameters = parameters[number]
        self.speed, choices = speeds[number], candidates[number].choices
        if "model.name" in choices:
            choices["model.name"] = choices["model.name"]._replace(why=reason)
        self._take(choices)

    def _choose_axes(self) -> None:
        """Choose the dimension of the latents by the spectrum of the patches."""
        if not hasattr(self.config, "tokenizer"):  # MAE
            return
        variances = facts.patch_variances(self.source, self.config)
        choice = Choice(len(variances), "all numbers of a patch")
        if self.config.tokenizer.name == "patch_pca":
            choice = rule.choose_axes(variances)
        self._take({"tokenizer.dim": choice})

    def _choose_length(self) -> None:
        """Choose the epochs that fit into the hours, and the batch and its learning rate."""
        if compiles(self.config.system.compile, self.device):  # the steps so far were not compiled
            compiled = facts.measure_step(self.config, self.device, self.speed.batch_size)
            self.speed = self.speed._replace(images_per_second=compiled.images_per_second)
        if "optim.epochs" not in self.given:
            pace = self._pace(self.speed)
            self._take({"optim.epochs": rule.choose_epochs(pace, self.hours, self.images)})
            few = rule.too_few_hours(self.parameters, pace, self.images, self.hours)
            self.warnings += [few] if few else []
        epochs = self.config.optim.epochs
        self._take(
            {
                "optim.warmup_epochs": rule.choose_warmup(epochs),
                "optim.batch_size": rule.choose_batch(epochs, self.images, self.machine.ranks),
            }
        )
        self._take({"optim.blr": rule.choose_blr(self.config.optim.batch_size)})

    def _choose_execution(self) -> None:
        """Choose the images in a pass of a rank, and its data workers."""
        batch_size, kept = self.config.optim.batch_size, self.speed.bytes_an_image
        pace = self._pace(self.speed)
        self._take(
            {
                "system.device_batch": rule.choose_device_batch(batch_size, kept, self.machine),
                "system.workers": rule.choose_workers(pace, self.images, self.machine),
            }
        )

    def _pace(self, speed: facts.Speed) -> float:
        return rule.pace(speed.images_per_second, self.images, self.machine)


def candidates_for(config: Any, side: int, given: dict[str, Any]) -> list[Candidate]:
    """Return the networks that fit the user's settings, in the order of their sizes.

    Args:
        side: median of the short sides of the images.
        given: the settings that are the user's; with ``model.name``, all sizes of the network are.

    Raises: InputError when no network fits the user's settings.
    """
    found: list[Candidate] = []
    refused = None
    sizes = tree.flatten(config)
    own_decoder = any(sizes.get(name) is not None for name in rule.DECODER if name not in given)
    for network in rule.NETWORKS:
        choices = rule.choose_sizes(network, side, given)
        if "model.name" not in given:
            choices |= rule.describe_network(network, own_decoder)
        values = {name: choice.value for name, choice in choices.items() if name not in given}
        candidate = _with_axes(tree.put(config, values))
        if found and candidate == found[-1].config:
            continue
        try:
            found.append(Candidate(choices, candidate, facts.parameters_of(candidate)))
        except InputError as error:  # such as a width that is not a multiple of the heads
            refused = error
    if refused and not found:
        raise refused
    return found


def _with_axes(config: Any) -> Any:
    """Return the settings with all axes of a patch, as many as any tokenizer of patches takes."""
    patch_dim = config.data.in_chans * config.model.patch_size**2
    return tree.put(config, {"tokenizer.dim": patch_dim})
