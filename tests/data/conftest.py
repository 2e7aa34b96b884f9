import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from doors import png

UPRIGHT = {  # how to turn stored pixels, from the EXIF and TIFF standards' "row 0 is, column 0 is"
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.fixture(params=UPRIGHT)
def orientation(request):
    """The number of an orientation, and the function that turns stored pixels (H, W, C) upright."""
    return request.param, UPRIGHT[request.param]


@pytest.fixture
def make_tree(tmp_path):
    """make_tree(folder, files): write files from bytes by name; None or a list: random PNGs."""

    def make(folder: str, files: dict[str, bytes | None] | list[str]) -> Path:
        root = tmp_path / folder
        root.mkdir()
        for seed, name in enumerate(files):
            content = files[name] if isinstance(files, dict) else None
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(seed) if content is None else content)
        return root

    return make


def pack_zip(root: Path) -> Path:
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for number, file in enumerate(sorted(root.rglob("*"), reverse=True)):
            method = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            archive.write(file, file.relative_to(root), method)
    return path


def pack_tar(root: Path) -> Path:
    path = root.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(root, ".")
    return path


@pytest.fixture(params=["folder", "zip", "tar"])
def pack(request):
    """pack(folder): the folder, or a ZIP or tar archive of it."""
    return {"folder": lambda root: root, "zip": pack_zip, "tar": pack_tar}[request.param]
