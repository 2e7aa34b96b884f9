"""A file of ``ldae embed`` in the place of the images, or of the backbone, that it is from."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ldae.data.open import source_splits
from ldae.data.source import Source, Splits
from ldae.distributed import rank, share_of, world_size
from ldae.errors import InputError
from ldae.evals.embedded_file import (
    IDENTITY,
    EmbeddedFile,
    check_same,
    is_embedded,
    is_of_others,
    open_embedded,
)
from ldae.evals.features import Features, Precision, allocate_rows, known_labels
from ldae.evals.taps import Tap


class EmbeddedSource(Source):
    """The names, labels and fingerprint of the images of a file of features, without images."""

    def __init__(self, spec: str, split: str, file: EmbeddedFile) -> None:
        self.file, self._rows = file, file.rows_of(split)
        classes = file.splits[split]["classes"]
        labels = None
        if classes is not None:
            number = {name: i for i, name in enumerate(classes)}
            names = file.table.classes[self._rows.start : self._rows.stop]
            labels = np.array([number[name] for name in names], np.int64)
        super().__init__(spec, split, classes, labels)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> str:
        return self.file.table.names[self._rows[i]]

    def image(self, i: int) -> np.ndarray:
        raise InputError(f"{self.spec} holds features, not images")

    def fingerprint(self) -> str:
        return self.file.splits[self.split]["fingerprint"]

    def resizes_twice(self, transform: Callable) -> bool:
        return self.file.splits[self.split]["resized_twice"]


def images_or_embedded(spec: str) -> Splits:
    """Return functions that open the splits of a source of images, or of a file of features.

    Raises: InputError as ``source_splits`` and ``open_embedded`` do.
    """
    if not is_embedded(spec) or is_of_others(Path(spec)):
        return source_splits(spec)
    file = open_embedded(Path(spec))
    return {split: partial(EmbeddedSource, spec, split, file) for split in file.splits}


class EmbeddedBackbone(nn.Module):
    """A file of features in the place of the backbone that they are from.

    Raises: InputError as ``open_embedded`` does, and for token maps, which have no row an image.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.file = open_embedded(Path(path))
        if len(self.file.shape) > 1:
            shape = " x ".join(map(str, self.file.shape))
            raise InputError(
                f"{path} holds token maps of {shape}, not a vector for each image: embed without "
                "--tokens"
            )
        record = self.file.record
        self.random_init: bool = record["backbone"]["random_init"]
        self.precision: Precision = record["extraction"]["precision"]
        self.pretrained_cfg = {"architecture": str(path)}
        self.pretrained_cfg |= record["backbone"]["preprocessing"]
        # The hash of the state is that of all that decides the features.
        text = json.dumps({key: record[key] for key in IDENTITY}, sort_keys=True).encode()
        self.register_buffer("record", torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def describe(self) -> dict:
        """Return what a record says about the backbone, and about this file."""
        record = self.file.record
        origin = {"file": str(self.file.path), **{key: record[key] for key in IDENTITY[1:]}}
        return record["backbone"] | {"embedded": origin}

    def share(self, source: Source, taps: tuple[Tap, ...] = (Tap(),)) -> Features:
        """Return this rank's share of the features of ``source``: rows rank, rank + world size, ...

        The model's own output stands for all columns of the file.

        Raises: InputError when the file has no such taps or images, or is damaged.
        """
        columns = {tap: self._columns(tap) for tap in taps}
        file, split = self.place(source)
        count = len(share_of(len(source)))
        features = allocate_rows(count, self.file.shape[0])
        for first, rows in file.blocks(split):
            skipped = (rank() - first) % world_size()
            mine = torch.tensor(rows[skipped :: world_size()])
            into = (first + skipped) // world_size()
            features[into : into + len(mine)] = mine
        return Features(features, known_labels(source)[rank() :: world_size()], columns)

    def place(self, source: Source) -> tuple[EmbeddedFile, str]:
        """Return the file and the split in which the features of a source are.

        Raises: InputError when these are not of the same images, or of another backbone.
        """
        if isinstance(source, EmbeddedSource):
            check_same(self.file, source.file)
            return source.file, source.split
        fingerprint = source.fingerprint()
        for split, held in self.file.splits.items():
            if held["fingerprint"] == fingerprint:
                return self.file, split
        raise InputError(
            f"{self.file.path} holds features of other images than {source.spec} ({source.split}) "
            f"has now: it was embedded from {self.file.record['data']['spec']}"
        )

    def _columns(self, tap: Tap) -> slice:
        if tap == Tap():
            return slice(None)
        held = self.file.record["features"]
        depth = held["depth"]
        wanted = Tap(tap.block % depth if tap.block is not None and depth else tap.block, tap.pool)
        known = {Tap(part["block"], part["pool"]): part["columns"] for part in held["taps"]}
        if wanted not in known:
            raise InputError(
                f"{self.file.path} has no features of {tap}: it holds {'; '.join(map(str, known))}"
            )
        return slice(*known[wanted])


def check_rows(model: nn.Module, *sources: Source | None) -> None:
    """Check that the features of all sources are at hand if they are not to be extracted.

    Raises: InputError when a file of features has other images, is of another backbone, or is given
        as a source of images to a backbone that needs them.
    """
    for source in sources:
        if source and isinstance(model, EmbeddedBackbone):
            model.place(source)
        elif isinstance(source, EmbeddedSource):
            raise InputError(
                f"{source.spec} holds features, not images: name it in the place of the backbone"
            )
