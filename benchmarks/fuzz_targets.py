"""What is fuzzed: valid files of every kind that ldae reads, and how they are read."""

import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import tifffile
from PIL import Image
from pyarrow import parquet

import ldae
from ldae.backbones.weights import read_checkpoint
from ldae.data.image import BadImage, decode, decode_label_map, image_extensions, image_size
from ldae.data.label_maps import open_map_splits
from ldae.data.open import source_splits
from ldae.data.transforms import CropTransform
from ldae.errors import InputError
from ldae.runs import kinds, layout
from ldae.tree import replace

Tree = dict[str, bytes]
"""The files of a folder by their paths in it."""
_RNG = np.random.default_rng(0)
_MOST_IMAGES = 12  # that are read of a damaged source, which can claim any number


class Target(NamedTuple):
    """One kind of input: a folder of valid files, one of which is mutated, and how it is read."""

    tree: Callable[[], Tree]
    read: Callable[[Path, str], object]
    """Called with the folder and the path in it of the mutated file. It may raise InputError."""
    mutated: Callable[[str], bool] = lambda path: True
    """Whether this file of the tree is mutated."""
    words: tuple[bytes, ...] = ()
    """Bytes that mean something in such a file."""
    written: tuple[str, ...] = ()
    """Names of files that reading may write; all others must stay as they are."""
    weight: float = 1
    """Share of the cases, relative to other targets."""


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what commands print."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def pixels(side: int = 12, bands: int = 3, dtype=np.uint8) -> np.ndarray:
    """Return random pixels that compress a little, (side, side, bands)."""
    smooth = np.linspace(0, 200, side)[:, None, None] + _RNG.integers(0, 50, (side, side, bands))
    return (smooth * (np.iinfo(dtype).max // 255)).astype(dtype)


def _encoded(format: str, image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _png(image: np.ndarray | None = None) -> bytes:
    return _encoded("PNG", Image.fromarray(pixels() if image is None else image))


def _images() -> Tree:
    """Return an image of every format and mode that Pillow can write and ldae reads."""
    rgb = Image.fromarray(pixels())
    files: Tree = {}
    Image.init()
    for extension, format in sorted(Image.registered_extensions().items()):
        if extension not in image_extensions() or format not in Image.SAVE:
            continue
        # Pillow loses the palette of an ICNS file.
        for mode in ("RGB", "L", "1", "RGBA", *(["P"] if format != "ICNS" else [])):
            with suppress(OSError, ValueError, KeyError):  # formats do not take every mode
                content = _encoded(format, rgb.convert(mode))
                Image.open(io.BytesIO(content)).load()  # some are written but not read
                files[f"{format}-{mode}{extension}"] = content
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files[f"{compression}.tif"] = _encoded("TIFF", rgb, compression=compression)
    for mode in ("I;16", "F"):
        files[f"{mode}.tif"] = _encoded("TIFF", rgb.convert("L").convert(mode))
    frames = {"save_all": True, "append_images": [rgb, rgb.rotate(90)]}
    files |= {
        f"frames.{format}": _encoded(format, rgb, **frames) for format in ("gif", "webp", "png")
    }
    for dtype in (np.uint8, np.uint16):
        for options in ({}, {"compression": "zlib", "predictor": True}, {"tile": (16, 16)}):
            file = io.BytesIO()
            options = {"photometric": "minisblack", "planarconfig": "contig"} | options
            tifffile.imwrite(file, pixels(bands=5, dtype=dtype), **options)
            files[f"bands-{len(files)}.tif"] = file.getvalue()
    for shape in ((12, 12), (12, 12, 6)):
        file = io.BytesIO()
        np.save(file, np.zeros(shape, np.uint8))
        files[f"{len(shape)}.npy"] = file.getvalue()
    return files


def _read_image(folder: Path, name: str) -> None:
    with suppress(BadImage):
        image_size(folder / name, name)
    image = decode(folder / name, name)
    in_chans = image.shape[2] if isinstance(image, np.ndarray) else 3
    CropTransform(8, in_chans, crop="random")(image, np.random.default_rng(0))


def _folder() -> Tree:
    names = ("ant/1.png", "ant/2.png", "bee/1.png", "bee/2.png")
    return {name: _png() for name in names}


def _zipped(files: Tree, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def _tarred(files: Tree, format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _archives() -> Tree:
    stored, long_names = zipfile.ZIP_STORED, {f"{'x' * 120}/{n}": c for n, c in _folder().items()}
    return {
        "deflated.zip": _zipped(_folder()),
        "stored.zip": _zipped(_folder(), stored),
        "pax.tar": _tarred(long_names),
        "gnu.tar": _tarred(long_names, tarfile.GNU_FORMAT),
    }


def _shards() -> Tree:
    files = {}
    for key, content in _folder().items():
        files |= {key: content, key.replace(".png", ".cls"): b"3"}
    facts = {"1.json": b'{"label": 3, "caption": "x"}', "1.png": _png()}
    return {"shards/0.tar": _tarred(files), "shards/1.tar": _tarred(facts)}


def _parquet() -> Tree:
    files: Tree = {}
    for compression in ("snappy", "none"):
        rows = [{"bytes": content, "path": name} for name, content in _folder().items()]
        feature = {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}
        facts = {"huggingface": json.dumps({"info": {"features": feature}})}
        table = pa.table({"image": rows, "label": [0, 0, 1, 1]}).replace_schema_metadata(facts)
        file = io.BytesIO()
        parquet.write_table(table, file, row_group_size=2, compression=compression)
        files[f"{compression}.parquet"] = file.getvalue()
    return files


def _arrays() -> Tree:
    files: Tree = {}
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, np.stack([pixels()] * 3), np.array([0, 1, 1]))
        files[f"{save.__name__}.npz"] = file.getvalue()
    return files


def _lists() -> Tree:
    names = list(_folder())
    lists = {
        "a.txt": "".join(f"{name} {name[:3]}\n" for name in names),
        "b.txt": "\n".join(names),
        "a.csv": "path,label\n" + "".join(f'"{name}",{name[:3]}\n' for name in names),
        "a.tsv": "".join(f"{name}\t{n}\n" for n, name in enumerate(names)),
    }
    return _folder() | {name: text.encode() for name, text in lists.items()}


def _read_source(folder: Path, name: str) -> None:
    """Open every split of a source, and read some images of each."""
    name = name.partition("/")[0]  # of shards their folder
    for opener in source_splits(str(folder / name)).values():
        source = opener()
        source.fingerprint()
        for i in range(min(len(source), _MOST_IMAGES)):
            source.name(i), source.target(i)
            with suppress(BadImage):
                source.image(i)


def _caches() -> Tree:
    with tempfile.TemporaryDirectory() as folder:
        images, out = Path(folder, "images.zip"), Path(folder, "cache.safetensors")
        images.write_bytes(_zipped(_folder()))
        with _silent():
            ldae.cache(str(images), str(out), side=8, workers=0)
        return {out.name: out.read_bytes()}


def _read_cache(folder: Path, name: str) -> None:
    with suppress(InputError), _silent():
        ldae.cache(str(folder / name), check=True)
    _read_source(folder, name)


def _label_maps() -> Tree:
    maps = pixels(bands=1)[:, :, 0] // 50
    files = {}
    for split in ("train", "val"):
        files |= {f"images/{split}/1.png": _png(), f"labels/{split}/1.png": _png(maps)}
    palette = Image.fromarray(maps)
    palette.putpalette(bytes(range(256)) * 3)
    files["labels/val/1.png"] = _encoded("PNG", palette)
    return files | {"maps.zip": _zipped(files)}


def _read_label_maps(folder: Path, name: str) -> None:
    if name.endswith(".png"):
        with suppress(BadImage):
            decode_label_map(folder / name, name)
    for source in open_map_splits(str(folder / name if name.endswith(".zip") else folder), None):
        source.fingerprint()
        for i in range(min(len(source), _MOST_IMAGES)):
            with suppress(BadImage):
                source.label_map(i)


def _configs() -> Tree:
    rows = {name: ldae.config(name, scale="demo") for name in ("l_dae", "dit", "mae")}
    kind = {"mae": "mae"}
    return {
        f"{name}.yaml": kinds.to_yaml(config, kind.get(name, "pretraining")).encode()
        for name, config in rows.items()
    }


def _read_config(folder: Path, name: str) -> None:
    kind = kinds.kind_of_file(folder / name)
    kinds.load(folder / name, kind if kind in kinds.KINDS else "pretraining")


_TINY = {
    "data.source": "scattered-digits:16",
    "data.img_size": 16,
    "tokenizer.dim": 6,
    "tokenizer.fit_images": 16,
    "model.patch_size": 8,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.depth": 2,
    "optim.batch_size": 4,
    "optim.epochs": 1,
    "optim.warmup_epochs": 0.25,
    "system.device": "cpu",
    "system.precision": "fp32",
    "system.workers": 0,
    "system.keep": 0,
    "system.save_minutes": 0,
}


def _run() -> Tree:
    """Return the files of a finished run with two checkpoints."""
    with tempfile.TemporaryDirectory() as folder, _silent():
        run = Path(folder, "run")
        ldae.pretrain(replace(ldae.config("l_dae", scale="demo"), _TINY), run)
        return {str(file.relative_to(run)): file.read_bytes() for file in _files(run)}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _is_read(path: str) -> bool:
    """Return whether a file of a run is read again."""
    return path.endswith((".yaml", ".jsonl", ".json", ".safetensors", ".pt"))


def _open_run(folder: Path, name: str) -> None:
    with _silent():
        with suppress(InputError):
            ldae.curves(folder)
        run = ldae.load_run(folder, device="cpu")
        run.metrics(), run.row, run.classes, run.images_seen
        run.backbone()


def _resume(folder: Path, name: str) -> None:
    """Resume a run by its own settings, as the same command does."""
    with _silent():
        ldae.pretrain(replace(ldae.config("l_dae", scale="demo"), _TINY), folder)


def _exported() -> Tree:
    with tempfile.TemporaryDirectory() as folder, _silent():
        run, out = Path(folder, "run"), Path(folder, layout.EXPORTED)
        for name, content in _run().items():
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_bytes(content)
        ldae.export(run, out)
        return {file.name: file.read_bytes() for file in _files(out)}


def _read_exported(folder: Path, name: str) -> None:
    with _silent():
        ldae.load_backbone(folder)


def _checkpoints() -> Tree:
    run = _run()
    newest = max(path for path in run if path.endswith(".pt"))
    return {"a.pth": run[newest], "a.safetensors": run[layout.TOKENIZER]}


def _read_weights(folder: Path, name: str) -> None:
    read_checkpoint(folder / name)


_YAML = (
    b"null", b"[]", b"{}", b"~", b"true", b"-1", b"1e400", b".nan", b".inf", b"2001-99-99",
    b"&a {b: *a}", b"!!python/object:os.system", b"!!int x", b"!!binary x", b": ", b"- ", b"\n",
    b"?", b"[" * 5000, b"9" * 5000, b"'", b'"', b"\0", b"\xff", b"kind: mae\n", b"  ",
)  # fmt: skip
_JSON = (b"null", b"[", b"{", b"}", b'"', b"NaN", b"1e999", b"-1", b"true", b"[" * 5000, b"\n")
_TEXT = (
    b" ",
    b"\t",
    b",",
    b'"',
    b"\n",
    b"\r",
    b"\0",
    b"/",
    b"../",
    b".png",
    b"\xff",
    b"\xe2\x80\xa8",
)
_OF_A_RUN = (*_YAML, *_JSON)

TARGETS = {
    "images": Target(_images, _read_image, weight=8),
    "archives": Target(_archives, _read_source, words=(b"../", b"PK\1\2", b"/"), weight=2),
    "shards": Target(_shards, _read_source, words=(b".cls", b".tar", b"/", *_JSON), weight=2),
    "parquet": Target(_parquet, _read_source, weight=2),
    "arrays": Target(_arrays, _read_source, words=(b"(3, 12)", b"|O", b"-1"), weight=1),
    "lists": Target(
        _lists, _read_source, lambda path: path.startswith(("a.", "b.")), words=_TEXT, weight=2
    ),
    "caches": Target(_caches, _read_cache, words=_JSON, weight=1.5),
    "label maps": Target(
        _label_maps, _read_label_maps, lambda path: path.startswith(("labels", "maps")), weight=1.5
    ),
    "configs": Target(_configs, _read_config, words=_YAML, weight=2),
    "run folders": Target(_run, _open_run, _is_read, words=_OF_A_RUN, weight=0.4),
    "resumed runs": Target(
        _run,
        _resume,
        _is_read,
        words=_OF_A_RUN,
        written=(
            layout.CONFIG,
            layout.ENVIRONMENT,
            layout.METRICS,
            layout.DENOISED,
            layout.FILTERS,
        ),
        weight=0.15,
    ),
    "exported folders": Target(
        _exported,
        _read_exported,
        lambda path: path.endswith((".json", ".safetensors")),
        words=_JSON,
    ),
    "checkpoints": Target(_checkpoints, _read_weights, weight=1.5),
}
"""What is fuzzed, by name."""
