"""timm's data sets: torchvision's and the Hugging Face hub's."""

import os

import numpy as np
from PIL import Image

from ldae.data.folders import HELD_OUT
from ldae.data.image import BadImage, decode
from ldae.data.source import Source
from ldae.errors import InputError


class TorchSource(Source):
    """A data set of torchvision, by timm's name for it, downloaded into its root if absent."""

    def __init__(self, spec: str, split: str):
        name, _, root = spec.removeprefix("torch/").partition("@")
        if not root:
            raise InputError(f"{spec} names no folder for the data: write torch/{name}@ROOT")
        timm_split = "train" if split == "train" else "validation"
        try:
            self._dataset = _create_dataset(f"torch/{name}", root, timm_split)
        except Exception as error:  # of download, checksum, archive or name
            raise InputError(f"{spec} can not be opened: {_first_line(error)}") from error
        names = getattr(self._dataset, "wnids", getattr(self._dataset, "classes", None))
        super().__init__(spec, split, *_labelled(names, getattr(self._dataset, "targets", None)))

    def __len__(self) -> int:
        return len(self._dataset)

    def image(self, i: int) -> Image.Image:
        try:
            return self._dataset[i][0]
        except Exception as error:  # the data set decodes: any of Pillow's errors
            raise BadImage(f"{self.where(i)} can not be decoded: {_first_line(error)}") from error


class HfdsSource(Source):
    """A data set of the Hugging Face hub, with columns ``image`` and, if labelled, ``label``."""

    def __init__(self, spec: str, split: str):
        try:
            import datasets  # noqa: F401  timm would end in a bare ImportError
        except ImportError as error:
            raise InputError(
                f"{spec} needs the package datasets: pip install 'ldae[hfds]'"
            ) from error
        name, _, root = spec.removeprefix("hfds/").partition("@")
        for hub_split in ("train",) if split == "train" else HELD_OUT:
            try:
                self._reader = _create_dataset(f"hfds/{name}", root or None, hub_split).reader
                break
            except ValueError as error:  # most often: there is no such split
                reason = error
            except Exception as error:  # of network, script or format
                raise InputError(f"{spec} can not be opened: {_first_line(error)}") from error
        else:
            raise InputError(f"{spec} has no {split} split: {_first_line(reason)}") from reason
        table, key = self._reader.dataset, self._reader.label_key
        names = sorted(self._reader.class_to_idx, key=self._reader.class_to_idx.get)
        values = list(table[key]) if key in table.column_names else None
        super().__init__(spec, split, *_labelled(names, values))

    def __len__(self) -> int:
        return len(self._reader)

    def image(self, i: int) -> Image.Image | np.ndarray:
        return decode(self._reader[i][0], self.where(i))


def _create_dataset(name: str, root: str | None, split: str):
    from timm.data import create_dataset

    root = os.path.expanduser(root) if root else None
    return create_dataset(name, root=root, split=split, download=name.startswith("torch/"))


def _labelled(names, values) -> tuple[list[str], np.ndarray] | tuple[None, None]:
    """Classes and labels; values without names are their own names, -1 means unlabelled."""
    if values is None or -1 in (values := np.asarray(values)):
        return None, None
    if not names:
        names, values = np.unique(values, return_inverse=True)
    return [str(name) for name in names], values.astype(np.int64)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
