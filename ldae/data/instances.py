"""Images with instances: a box, a class and a mask for each object, in COCO's terms."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ldae.data.image import BadImage
from ldae.data.source import Source
from ldae.errors import first_line, import_extra

_FARTHEST = 100_000  # pixels; a polygon that reaches farther is damaged and takes long to fill


@dataclass(frozen=True)
class Instances:
    """The objects of one image."""

    size: tuple[int, int]
    """Width and height of the image, in pixels."""
    boxes: np.ndarray
    """float32 (N, 4): left, top, right, bottom, in pixels from the image's corner."""
    labels: np.ndarray
    """int64 (N,), indices into the classes of the source."""
    masks: np.ndarray | None
    """bool (N, H, W); None where the source has boxes only."""


class InstanceSource(Source):
    """A source with the instances of each image; their numbers follow the order of ``classes``.

    - ``categories`` maps the name of each class to its id in annotations.
    - ``has_masks`` is whether all annotations have a segmentation.
    """

    def __init__(self, spec: str, split: str, categories: dict[str, int], has_masks: bool) -> None:
        by_id = sorted(categories, key=lambda name: categories[name])
        super().__init__(spec, split, by_id, None)
        self.categories, self.has_masks = categories, has_masks

    def size(self, i: int) -> tuple[int, int]:
        """Return width and height of image ``i``."""
        raise NotImplementedError

    def image_id(self, i: int) -> int:
        """Return the id of image ``i`` in annotations and results."""
        return i

    def annotations(self, i: int) -> list[dict[str, Any]]:
        """Return the annotations of image ``i`` in COCO's format.

        Each has ``category_id`` and ``bbox`` (left, top, width, height), with ``has_masks`` also
        ``segmentation`` (polygons, or run lengths), and may have ``area`` and ``iscrowd``.
        """
        raise NotImplementedError

    def drop_empty(self) -> None:
        """Leave out images without an instance; where each image has one, nothing is left out."""

    def target(self, i: int) -> Instances:
        """Return the instances of image ``i``, without crowds and boxes that have no area.

        Raises: BadImage when a segmentation cannot be read.
        """
        width, height = self.size(i)
        number = {self.categories.get(name): n for n, name in enumerate(self.classes or ())}
        parts = [part for part in self.annotations(i) if not part.get("iscrowd")]
        boxes = corners([part["bbox"] for part in parts], (width, height))
        kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
        parts = [parts[n] for n in kept]
        labels = np.array([number[part["category_id"]] for part in parts], np.int64)
        masks = None
        if self.has_masks:
            masks = np.zeros((len(parts), height, width), bool)
            for mask, part in zip(masks, parts):
                mask[:] = import_pycocotools("mask").decode(self._run_lengths(i, part))
        return Instances((width, height), boxes[kept], labels, masks)

    def dataset(self) -> dict[str, list[dict[str, Any]]]:
        """Return all annotations as a COCO file holds them, with segmentations as run lengths.

        Ids of annotations count from 1, since pycocotools takes an id of 0 for no match.

        Raises: BadImage when a segmentation cannot be read.
        """
        images, annotations = [], []
        for i in range(len(self)):
            width, height = self.size(i)
            image = {"id": self.image_id(i), "file_name": self.name(i)}
            images.append(image | {"width": width, "height": height})
            for part in self.annotations(i):
                entry = {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": part["category_id"],
                    "bbox": part["bbox"],
                    "area": part.get("area", part["bbox"][2] * part["bbox"][3]),
                    "iscrowd": int(part.get("iscrowd", 0)),
                }
                if self.has_masks:
                    entry["segmentation"] = as_text(self._run_lengths(i, part))
                annotations.append(entry)
        categories = [{"id": number, "name": name} for name, number in self.categories.items()]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _run_lengths(self, i: int, annotation: dict[str, Any]) -> dict[str, Any]:
        try:
            return run_lengths(annotation["segmentation"], self.size(i))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            number = annotation.get("id", "")
            raise BadImage(
                f"{self.where(i)}: the segmentation of annotation {number} is wrong: "
                f"{first_line(error)}"
            ) from None


class Pictures(Source):
    """The images of another source alone, without classes and targets."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.spec, source.split, None, None)
        self._source = source
        self.name, self.where = source.name, source.where
        self.image, self.stamp = source.image, source.stamp

    def __len__(self) -> int:
        return len(self._source)


def corners(boxes: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """Convert boxes (left, top, width, height) to corners within the image, float32 (N, 4)."""
    found = np.array(boxes, np.float32).reshape(-1, 4)
    found[:, 2:] += found[:, :2]
    return found.clip(0, np.array([*size, *size], np.float32))


def run_lengths(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Return COCO's compressed run lengths of polygons or of run lengths.

    Args:
        segmentation: a list of polygons [x, y, x, y, ...]; or ``{"size": [height, width],
            "counts": ...}`` with a list of numbers or compressed text.
        size: width and height of the image.

    Raises: ValueError, TypeError or KeyError for anything else.
    """
    width, height = size
    library = import_pycocotools("mask")
    if isinstance(segmentation, list):
        if not segmentation:
            raise ValueError("it has no polygon")
        for polygon in segmentation:
            points = np.array(polygon, np.float64)
            if points.ndim != 1 or len(points) < 6 or len(points) % 2:
                raise ValueError("a polygon needs x and y of at least three points")
            if not (np.abs(points) <= _FARTHEST).all():
                raise ValueError("a polygon reaches far out of the image")
        return library.merge(library.frPyObjects(segmentation, height, width))
    counts = segmentation["counts"]
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its size is {segmentation['size']}, and that of the image {size[::-1]}")
    if isinstance(counts, list):
        if min(counts, default=0) < 0 or sum(counts) != height * width:
            raise ValueError("its counts do not cover the image")
        return library.frPyObjects(segmentation, height, width)
    found = {"size": [height, width], "counts": counts}
    library.decode(found)  # refuses text that is cut off
    return found


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Return the run lengths of a mask, bool (H, W), as JSON holds them."""
    return as_text(import_pycocotools("mask").encode(np.asfortranarray(mask, np.uint8)))


def as_text(found: dict[str, Any]) -> dict[str, Any]:
    """Return run lengths with their counts as text, as JSON holds them."""
    counts = found["counts"]
    return {
        "size": [int(length) for length in found["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def import_pycocotools(module: str) -> Any:
    """Import a module of pycocotools. Raises: InputError when it is not installed."""
    return import_extra(f"pycocotools.{module}", "detection", "detection needs pycocotools")
