"""How a run knows its images and labels again: the keys and hashes in checkpoints."""

import hashlib
import re
from typing import Any

import numpy as np

from ldae.data.source import Source

# Keys of the description in a checkpoint.
NAMES_HASH = "the hash of the images' names"
FINGERPRINT = "the fingerprint of the images"  # of images that only have numbers
LABELS_HASH = "the hash of the labels"  # for models that learn them
LATENTS_OF = "the hash of the latents' tokenizer"  # empty for a training on images

_NUMBER = re.compile(r"(train|eval|all)/\d{6,}")  # the default of Source.name


def describe_images(source: Source, resizes_twice: bool, learns_labels: bool) -> dict[str, Any]:
    """Return what a checkpoint says about the images that a run must resume with.

    Args:
        resizes_twice: whether the training changes pixels that were resized before.
        learns_labels: whether the labels must stay too.
    """
    return {
        "images": len(source),
        "classes": list(source.classes or ()),
        **images_hashes(source),
        **({LABELS_HASH: labels_hash(source)} if learns_labels else {}),
        "resized twice": resizes_twice,
        LATENTS_OF: source.latents_of,
    }


def images_hashes(source: Source) -> dict[str, str]:
    """Return the hashes by which a run that resumes knows its images.

    The names of files, in order, tell it wherever the files lie and whenever they were copied.
    Images that only have numbers are known by their fingerprint too.
    """
    digest = hashlib.sha256()
    for number in range(len(source)):
        digest.update(source.name(number).encode() + b"\0")
    hashes = {NAMES_HASH: digest.hexdigest()[:16]}
    if _NUMBER.fullmatch(source.name(0)):
        hashes[FINGERPRINT] = source.fingerprint()[:16]
    return hashes


def labels_hash(source: Source) -> str:
    """Return a hash of the names of the classes and of the label of each image, in order."""
    digest = hashlib.sha256("\0".join(source.classes or ()).encode("utf-8", "backslashreplace"))
    if source.labels is not None:
        digest.update(source.labels.astype(np.int64).tobytes())
    return digest.hexdigest()[:16]
