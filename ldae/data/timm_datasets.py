"""Data sets that timm opens: torchvision's and those of the Hugging Face hub."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

from ldae.data.containers import stamp_files
from ldae.data.image import BadImage, decode
from ldae.data.image_files import EVAL_NAMES
from ldae.data.source import Source
from ldae.errors import InputError, first_line, import_extra


class TorchSource(Source):
    """A torchvision data set, ``torch/NAME@ROOT``; it is downloaded into its root if absent."""

    def __init__(self, spec: str, split: str):
        name, _, root = spec.removeprefix("torch/").partition("@")
        if not root:
            raise InputError(f"{spec} names no folder for the data: write torch/{name}@ROOT")
        timm_split = "train" if split == "train" else "validation"
        try:
            self._dataset = _create_dataset(f"torch/{name}", root, timm_split)
        except Exception as error:  # of the download, a checksum, an archive or the name
            raise InputError(f"{spec} cannot be opened: {first_line(error)}") from error
        if hasattr(self._dataset, "loader"):
            self._dataset.loader = _load
        names = getattr(self._dataset, "wnids", getattr(self._dataset, "classes", None))
        super().__init__(spec, split, *_classes(names, getattr(self._dataset, "targets", None)))

    def __len__(self) -> int:
        return len(self._dataset)

    def image(self, i: int) -> Image.Image | np.ndarray:
        try:
            return self._dataset[i][0]
        except BadImage:
            raise
        except Exception as error:  # torchvision decodes, and Pillow raises nearly every type
            raise BadImage(f"{self.where(i)} cannot be decoded: {first_line(error)}") from error

    def stamp(self) -> bytes:
        if hasattr(self._dataset, "data"):
            return hashlib.sha256(np.ascontiguousarray(self._dataset.data)).digest()
        root, files = self._dataset.root, getattr(self._dataset, "imgs", ())
        names = [os.fsencode(os.path.relpath(path, root)) for path, _ in files]
        return b"\n".join(names) + stamp_files(Path(root), names)


class HfdsSource(Source):
    """A data set of the Hugging Face hub, ``hfds/NAME[@ROOT]``.

    Images are in the column ``image``, labels, if any, in the column ``label``.
    """

    def __init__(self, spec: str, split: str):
        # Without the package timm raises a bare ImportError.
        import_extra("datasets", "hfds", f"{spec} needs the package datasets")
        name, _, root = spec.removeprefix("hfds/").partition("@")
        for hub_split in ("train",) if split == "train" else EVAL_NAMES:
            try:
                self._reader = _create_dataset(f"hfds/{name}", root or None, hub_split).reader
                break
            except ValueError as error:  # most often: the split does not exist
                reason = error
            except Exception as error:  # of the network, a script or the format
                raise InputError(f"{spec} cannot be opened: {first_line(error)}") from error
        else:
            raise InputError(f"{spec} has no {split} split: {first_line(reason)}") from reason
        table, key = self._reader.dataset, self._reader.label_key
        names = sorted(self._reader.class_to_idx, key=self._reader.class_to_idx.get)
        values = list(table[key]) if key in table.column_names else None
        super().__init__(spec, split, *_classes(names, values))

    def __len__(self) -> int:
        return len(self._reader)

    def image(self, i: int) -> Image.Image | np.ndarray:
        try:
            content = self._reader[i][0]
        except Exception as error:  # of a damaged file; Arrow raises nearly every type
            raise BadImage(f"{self.where(i)} cannot be read: {first_line(error)}") from error
        return decode(content, self.where(i))

    def stamp(self) -> bytes:
        return self._reader.dataset._fingerprint.encode()


SOURCES = {"torch": TorchSource, "hfds": HfdsSource}


def timm_splits(spec: str) -> dict[str, Callable[[], Source]]:
    """Return functions that open the splits of a spec that begins with a name in ``SOURCES``.

    A set of the hub that has a train split alone has no splits, but is ``all``.
    """
    kind = spec.partition("/")[0]
    if kind == "hfds" and _split_names(spec) == ["train"]:
        return {"all": partial(HfdsSource, spec, "train")}
    return {split: partial(SOURCES[kind], spec, split) for split in ("train", "eval")}


def _split_names(spec: str) -> list[str]:
    """Return the hub's names of the splits of a set; none when it cannot be asked."""
    name = spec.removeprefix("hfds/").partition("@")[0]
    try:
        return list(import_module("datasets").get_dataset_split_names(name))
    except Exception:  # without the package or a network; opening a split says what is wrong
        return []


def _create_dataset(name: str, root: str | None, split: str):
    from timm.data import create_dataset

    root = os.path.expanduser(root) if root else None
    return create_dataset(name, root=root, split=split, download=name.startswith("torch/"))


def _load(path: str) -> Image.Image | np.ndarray:
    """Decode an image file of torchvision's, as those of other sources are."""
    return decode(path, path)


def _classes(names, values) -> tuple[list[str], np.ndarray] | tuple[None, None]:
    """Return the classes and labels of a data set, or None for both if a label is -1 or null.

    Without ``names``, each distinct value is a class.
    """
    if values is None or None in (values := np.asarray(values)) or -1 in values:
        return None, None
    if not names:
        names, values = np.unique(values, return_inverse=True)
    return [str(name) for name in names], values.astype(np.int64)
