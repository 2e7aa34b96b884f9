"""A folder in COCO's layout: annotations/instances_SPLIT.json beside the images."""

import functools
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldae.data.containers import stamp_files
from ldae.data.image import BadImage, decode
from ldae.data.image_files import EVAL_NAMES
from ldae.data.instances import InstanceSource
from ldae.data.open import open_splits
from ldae.data.scenes import SCENES, scene_splits
from ldae.data.source import Splits
from ldae.errors import InputError, first_line

_PREFIX = "instances_"


def open_instance_splits(data: str, eval_data: str | None) -> tuple[InstanceSource, InstanceSource]:
    """Open the train and the eval source, chosen as :func:`ldae.data.open.open_splits` does.

    Images of train without an instance are left out, as detectron2 and torchvision do.

    Raises: InputError as ``open_splits`` and ``instance_splits`` do, and when a split has no
        instance.
    """
    train, evaluation = open_splits(data, eval_data, instance_splits)
    train.drop_empty()
    for source in (train, evaluation):
        if not any(_has_instance(source, i) for i in range(len(source))):
            raise InputError(f"{source.spec} ({source.split}) has no instance")
    return train, evaluation


def instance_splits(spec: str) -> Splits:
    """Return functions that open the splits of a COCO folder, or of ``digit-scenes``.

    The names of the annotation files begin with instances_train and with instances_val (or valid,
    validation, test). A single file of another name is the whole of the data. The images lie in a
    folder of the name behind ``instances_``, in images/ with or without such a folder, or directly
    in the folder, as ``file_name`` says.

    Raises: InputError when there is no such folder, or no file or several files for a split.
    """
    if spec.partition(":")[0] == SCENES:
        return scene_splits(spec)
    if not spec:
        raise InputError("no images: name their source with --data SOURCE")
    folder = Path(os.path.expanduser(spec))
    if not os.path.isdir(folder):
        raise InputError(f"{spec!r} is neither a folder in COCO's layout nor {SCENES}[:N[:SEED]]")
    files = sorted((folder / "annotations").glob(f"{_PREFIX}*.json"))
    if not files:
        raise InputError(
            f"{spec} has no annotations/{_PREFIX}train.json or {_PREFIX}val.json, as COCO's layout"
        )
    found = {
        split: [file for file in files if _name(file).startswith(names)]
        for split, names in (("train", ("train",)), ("eval", EVAL_NAMES))
    }
    if not any(found.values()):
        found = {"all": files}
    for split, candidates in found.items():
        if len(candidates) > 1:
            names = ", ".join(file.name for file in candidates)
            raise InputError(f"{spec} has several annotation files for {split}: {names}; keep one")
    return {
        split: functools.partial(CocoImages, spec, split, candidates[0])
        for split, candidates in found.items()
        if candidates
    }


def _name(file: Path) -> str:
    return file.stem.removeprefix(_PREFIX)


class CocoImages(InstanceSource):
    """The images of one annotation file, in its order.

    The annotations are kept as JSON text for each image, which takes a fraction of the memory that
    parsed ones take and which forked data workers share.

    Raises: InputError naming the file for content that is not COCO's.
    """

    def __init__(self, spec: str, split: str, file: Path) -> None:
        images, annotations, categories, has_masks = _read(file)
        super().__init__(spec, split, categories, has_masks)
        self._images = images
        self._annotations = [json.dumps(annotations[image["id"]]).encode() for image in images]
        self._root = _root_of(file, [image["file_name"] for image in images])

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        return self._images[i]["file_name"]

    def size(self, i: int) -> tuple[int, int]:
        return self._images[i]["width"], self._images[i]["height"]

    def image_id(self, i: int) -> int:
        return self._images[i]["id"]

    def image(self, i: int) -> Image.Image | np.ndarray:
        image = decode(self._root / self.name(i), self.where(i))
        size = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        if tuple(size) != self.size(i):
            width, height = self.size(i)
            raise BadImage(
                f"{self.where(i)} is {size[0]} x {size[1]} pixels, and {width} x {height} in its "
                "annotations"
            )
        return image

    def annotations(self, i: int) -> list[dict[str, Any]]:
        return json.loads(self._annotations[i])

    def drop_empty(self) -> None:
        kept = [i for i in range(len(self)) if _has_instance(self, i)]
        self._images = [self._images[i] for i in kept]
        self._annotations = [self._annotations[i] for i in kept]

    def stamp(self) -> bytes:
        names = [os.fsencode(self.name(i)) for i in range(len(self))]
        digest = hashlib.sha256(stamp_files(self._root, names))
        for annotations in self._annotations:
            digest.update(annotations + b"\0")
        return digest.digest()


def _has_instance(source: InstanceSource, i: int) -> bool:
    """Return whether image ``i`` has an annotation that is neither a crowd nor without area."""
    parts = source.annotations(i)
    return any(not part.get("iscrowd") and min(part["bbox"][2:]) > 0 for part in parts)


def _root_of(file: Path, names: list[str]) -> Path:
    """Return the folder in which ``names`` lie. Raises: InputError when the first is in none."""
    folder, split = file.parent.parent, _name(file)
    roots = (folder / split, folder / "images" / split, folder / "images", folder)
    for root in roots:
        if not names or os.path.isfile(root / names[0]):
            return root
    places = ", ".join(f"{root}" for root in roots)
    raise InputError(f"the image {names[0]} of {file} is in none of the folders {places}")


def _read(
    file: Path,
) -> tuple[list[dict[str, Any]], dict[int, list[dict[str, Any]]], dict[str, int], bool]:
    """Return images, annotations by image id, categories by name, and whether all have masks.

    Raises: InputError naming the file and what is wrong in it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {first_line(error)}") from None
    try:
        categories = {str(part["name"]): _integer(part["id"]) for part in content["categories"]}
        images = [_image(part) for part in content["images"]]
        annotations: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
        if len(annotations) < len(images) or len(categories) < len(content["categories"]):
            raise ValueError("two images have one id, or two categories one name")
        ids = {*categories.values()}
        if len(ids) < len(categories):
            raise ValueError("two categories have one id")
        for part in content["annotations"]:
            _check_annotation(part, ids)
            if part["image_id"] not in annotations:
                raise ValueError(f"annotation {part.get('id')} is of no image of the file")
            annotations[part["image_id"]].append(part)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"{file} is not in COCO's format: {first_line(error)}") from None
    has_masks = all(part.get("segmentation") for part in content["annotations"])
    return images, annotations, categories, has_masks


def _image(part: dict[str, Any]) -> dict[str, Any]:
    """Return what is used of the entry of an image. Raises: ValueError, KeyError or TypeError."""
    name, width, height = str(part["file_name"]), _integer(part["width"]), _integer(part["height"])
    if min(width, height) < 1:
        raise ValueError(f"the image {name} has {width} x {height} pixels")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"the image {name!r} has a name that leads outside")
    return {"id": _integer(part["id"]), "file_name": name, "width": width, "height": height}


def _check_annotation(part: dict[str, Any], categories: set[int]) -> None:
    """Raise ValueError, KeyError or TypeError for an annotation that cannot be used."""
    number, box = part.get("id"), part["bbox"]
    if part["category_id"] not in categories:
        raise ValueError(f"annotation {number} is of no category of the file")
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        raise ValueError(f"the bbox of annotation {number} is {box}, not four numbers")
    area = part.get("area", 0)
    if not math.isfinite(area):
        raise ValueError(f"the area of annotation {number} is {area}")


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no whole number")
    return value
