"""All graders with their protocols, and constants with which each of them is short."""

import ldae
from ldae.cli.protocols import graders
from ldae.evals.protocol import Grader, Protocol

GRADERS = {**graders(), "grid": Grader("grid", ldae.grid)}  # grid takes runs only
KINDS = [(verb, name) for verb, grader in GRADERS.items() for name in grader.protocols]
_SHORT = {
    "k": (1,), "epochs": 2, "warmup_epochs": 1, "total_batch": 16, "C": (0.1, 1.0), "steps": 2,
    "learning_rates": (0.1, 1.0), "timesteps": (10,), "leading": (1,), "shots": (2,), "draws": 2,
    "corruption": ("contrast",), "severity": (1,), "temperature": 0.2,
}  # fmt: skip


def short(verb: str, name: str) -> Protocol:
    """Return the protocol ``name`` of a grader, with few steps, images and repetitions."""
    kind = GRADERS[verb].protocols[name]
    return kind(**{key: value for key, value in _SHORT.items() if key in kind.__dataclass_fields__})
