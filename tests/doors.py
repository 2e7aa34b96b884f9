"""Random images, and writers of those of a folder in the other forms that are read in place."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet


def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def images(root: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield name, class and bytes of each image, sorted by name."""
    for path in sorted(root.rglob("*.png")):
        yield str(path.relative_to(root)), path.parent.name, path.read_bytes()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(root: Path, to: Path, size: int = 2, label: str = "cls") -> Path:
    """Write shards of ``size`` samples, whose labels are the names of the classes."""
    files = [*images(root)]
    for first in range(0, len(files), size):
        shard: dict[str, bytes] = {}
        for name, kind, content in files[first : first + size]:
            key = name.removesuffix(".png")
            text = json.dumps({"label": kind, "key": key}) if label == "json" else f"{kind}\n"
            shard |= {f"{key}.{label}": text.encode(), f"{key}.png": content}
        write_tar(to / f"shard-{first // size:04d}.tar", shard)
    return to


def write_list(root: Path, to: Path) -> Path:
    lines = [f"{root.name}/{name} {kind}" for name, kind, _ in images(root)]
    to.write_text("\n".join(lines) + "\n")
    return to


def write_parquet(root: Path, to: Path, rows: int = 2, **columns) -> Path:
    """Write one file as the package datasets does, with ``rows`` rows in a row group."""
    names, kinds, contents = zip(*images(root))
    classes = sorted(set(kinds))
    feature = {"label": {"names": classes, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    facts = {"huggingface": json.dumps({"info": {"features": feature}})}
    table = {
        "image": [{"bytes": content, "path": name} for name, content in zip(names, contents)],
        "label": [classes.index(kind) for kind in kinds],
    }
    to.parent.mkdir(parents=True, exist_ok=True)
    written = pa.table(table | columns).replace_schema_metadata(facts)
    parquet.write_table(written, to, row_group_size=rows)
    return to
