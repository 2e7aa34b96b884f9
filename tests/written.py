"""What a run has written: the records of its metrics, and the weights of its last checkpoint."""

import json
from pathlib import Path

import torch

from ldae.runs.checkpoints import Checkpoints


def lines(run: Path) -> list[dict]:
    """Return the records of metrics.jsonl; its last line may be incomplete."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return Checkpoints(run).load()["model"]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
