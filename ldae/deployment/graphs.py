"""A network as a file that runs without its Python code: ONNX, or a program of torch.export."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from ldae import files
from ldae.backbones.fold import TOLERANCE
from ldae.backbones.preprocessing import preprocessing
from ldae.backbones.whitening import is_whitened
from ldae.errors import InputError, first_line, import_extra
from ldae.evals.taps import TokenMapReader
from ldae.markdown import markdown_table

ONNX, PROGRAM = "model.onnx", "model.pt2"
RECORD = "graphs.json"
"""The file, beside the graphs, that describes their inputs and outputs."""
OPSET = 18  # of torch's own translations; a newer one would need newer runtimes

_EXAMPLES = 2  # images while a network is traced: a batch of 1 would become a constant
_BATCHES = (1, 7)  # in which a graph is compared with timm
_LARGEST_FILE = 1_900_000_000  # bytes of weights in the file itself: protobuf ends at 2 GiB

Outputs = Callable[[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Graphs:
    """The files to write, and what they compute."""

    onnx: bool = False
    torch_export: bool = False
    uint8: bool = False
    """Take uint8 pixels and normalise them inside, instead of normalised float32 images."""
    tokens: bool = False
    """Give the token map too."""

    def check(self) -> None:
        """Check, before the work, that there is a file to write and that its packages are there.

        Raises: InputError.
        """
        for name in ("uint8", "tokens") if not self.files else ():
            if getattr(self, name):
                raise InputError(f"--{name} is of a graph: ask for --onnx or --torch-export too")
        for package in ("onnx", "onnxscript", "onnxruntime") if self.onnx else ():
            import_extra(package, "onnx", f"--onnx needs the package {package}")

    @property
    def files(self) -> list[str]:
        """Names of the files."""
        return [ONNX] * self.onnx + [PROGRAM] * self.torch_export


class Deployed(nn.Module):
    """What a graph computes: images (B, C, H, W) -> features or logits (B, D), and token maps.

    A token map (B, h, w, D) has the tokens of the patches behind the final norm, as ``ldae
    segment`` reads them.

    Raises: InputError when a token map is asked for and the model has none.
    """

    def __init__(self, model: nn.Module, uint8: bool = False, tokens: bool = False) -> None:
        super().__init__()
        self.model, self.uint8 = model, uint8
        self.reader = TokenMapReader(model, 1) if tokens else None
        self.transform = preprocessing(model)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.transform, name))[:, None, None]
            # Older exporters confuse a weight with an operation of its name, as mean is.
            self.register_buffer(f"pixel_{name}", values, persistent=False)
        cfg = model.pretrained_cfg
        self.name = cfg["architecture"]
        is_classifier = model.num_classes and not is_whitened(cfg)
        self.outputs = ["logits" if is_classifier else "features", "tokens"][: 1 + tokens]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.uint8:
            images = (images.float() / 255 - self.pixel_mean) / self.pixel_std
        if self.reader is None:
            return (self.model(images),)
        # Both in one pass. ``reference`` takes two, as timm's users do.
        final, (grid,) = self.model.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NCHW"
        )
        return self.model.forward_head(final), grid.permute(0, 2, 3, 1)

    @torch.no_grad()
    def reference(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs as graders compute them."""
        x = self.transform.normalize(images) if self.uint8 else images
        return [self.model(x)] + ([self.reader.tokens(x)] if self.reader else [])

    def images(self, count: int) -> torch.Tensor:
        """Return random images that a graph takes, (count, C, H, W)."""
        shape = (count, *self.transform.input_size)
        generator = torch.Generator().manual_seed(count)
        if self.uint8:
            return torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return torch.randn(shape, generator=generator)

    @torch.no_grad()
    def describe(self) -> dict:
        """Return the input, the outputs and the preprocessing, as JSON reads them back.

        Raises: InputError when the model gives no vector, or no token map.
        """
        size = self.transform.input_size
        if self.reader:
            self.reader.columns(torch.zeros(1, *size))  # refuses a model without a map
        parts = self.reference(self.images(1))
        if parts[0].ndim != 2:
            raise InputError(
                f"{self.name} gives a map of shape {tuple(parts[0].shape[1:])} for an image, not a "
                "vector: it has no global pooling"
            )
        shapes = (["batch", *part.shape[1:]] for part in parts)
        dtype = "uint8" if self.uint8 else "float32"
        return files.as_json(
            {
                "input": {"name": "images", "dtype": dtype, "shape": ["batch", *size]},
                "outputs": dict(zip(self.outputs, shapes, strict=True)),
                "preprocessing": asdict(self.transform),
            }
        )


def add_graphs(folder: Path, model: nn.Module, graphs: Graphs) -> dict[str, dict]:
    """Write graphs of a model into its timm folder, and return the records of all graphs there.

    A graph that the folder has already, of the same input and outputs, stays as it is. A new one
    appears once it has computed what the model does, on random images in batches of 1 and 7.

    Args:
        model: the folder's, as timm opens it, in eval mode on the CPU.

    Raises: InputError for a model that cannot be written as a graph, for a graph that differs from
        the model by more than 1e-5, and when the folder has a graph of another input or other
        outputs.
    """
    records = read_graphs(folder)
    if not graphs.files:
        return records
    deployed = Deployed(model, graphs.uint8, graphs.tokens).eval().requires_grad_(False)
    described = deployed.describe()
    program = None
    for name in graphs.files:
        held = records.get(name) if (folder / name).is_file() else None
        if held:
            _check_same(folder / name, held, described)
            continue
        program = program or _trace(deployed)
        with _aside(folder / name) as place:
            write = _write_onnx if name == ONNX else _write_program
            error = _relative_error(deployed, write(program, place / name, deployed))
            if not error < TOLERANCE:
                raise InputError(
                    f"not exported: {name} differs from timm by {error:.1e} on random images, more "
                    f"than {TOLERANCE:.0e}"
                )
        records[name] = described | {"largest_relative_error": error, "versions": _versions(name)}
        files.write_json(folder / RECORD, records)
    return records


def read_graphs(folder: Path) -> dict[str, dict]:
    """Return the records of the graphs in a folder, by the names of their files."""
    try:
        return dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # there are none
        return {}


def graph_table(records: dict[str, dict]) -> str:
    """Return the graphs of a folder as Markdown, for its model card; "" when there are none."""
    if not records:
        return ""
    rows = []
    for name, record in records.items():
        given, outputs = record["input"], record["outputs"].items()
        computed = ", ".join(f"{output} {_shape(shape)}" for output, shape in outputs)
        rows.append([name, f"{given['dtype']} {_shape(given['shape'])}", computed])
    return markdown_table(["file", "input", "outputs"], rows, text=3) + (
        "\nThe input `images` is resized and cropped as by `transform` above; a uint8 input is "
        f"normalised inside. `{RECORD}` has the preprocessing, and the difference from timm."
    )


def _shape(shape: list) -> str:
    return f"({', '.join(map(str, shape))})"


def _check_same(path: Path, held: dict, described: dict) -> None:
    """Raises: InputError when a graph has another input, or other outputs."""
    for key, value in described.items():
        if held.get(key) != value:
            raise InputError(
                f"{path} has {key} {held.get(key)}, not {value}: export to another folder"
            )


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Yield a folder whose files move beside it at the end, ``path`` last, unless one fails."""
    with files.report_write_errors(path.parent), files.partial_folder(path) as place:
        yield place
        for name in sorted(os.listdir(place), reverse=True):  # weights before the graph
            os.replace(place / name, path.parent / name)


def _trace(deployed: Deployed) -> torch.export.ExportedProgram:
    """Return the program of a network for batches of any size.

    Raises: InputError when torch cannot trace it.
    """
    batch = {"images": {0: torch.export.Dim("batch", min=1)}}
    example = deployed.images(_EXAMPLES)
    try:
        with torch.no_grad():
            return torch.export.export(deployed, (example,), dynamic_shapes=batch)
    except Exception as error:  # of many types
        raise InputError(
            f"{deployed.name} cannot be written as a graph: {first_line(error)}"
        ) from error


def _write_program(
    program: torch.export.ExportedProgram, path: Path, deployed: Deployed
) -> Outputs:
    """Write the program, and return what the file computes."""
    torch.export.save(program, path)
    opened = torch.export.load(path).module()
    return lambda images: list(opened(images))


def _write_onnx(program: torch.export.ExportedProgram, path: Path, deployed: Deployed) -> Outputs:
    """Write the program as ONNX, and return what onnxruntime computes by the file.

    Raises: InputError when torch or onnxruntime refuses it.
    """
    import onnxruntime

    size = sum(value.nbytes for value in program.state_dict.values())
    try:
        written = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=deployed.outputs,
            dynamic_shapes={"images": {0: "batch"}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        written.save(path, external_data=size > _LARGEST_FILE)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many types
        raise InputError(
            f"{deployed.name} cannot be written as ONNX: {first_line(error)}"
        ) from error
    return lambda images: [
        torch.from_numpy(part) for part in session.run(None, {"images": images.numpy()})
    ]


@torch.no_grad()
def _relative_error(deployed: Deployed, run: Outputs) -> float:
    """Return the largest relative error of a graph's outputs, over outputs and batches."""
    errors = []
    for count in _BATCHES:
        images = deployed.images(count)
        pairs = zip(run(images), deployed.reference(images), strict=True)
        errors += [(found - wanted).norm() / wanted.norm() for found, wanted in pairs]
    return float(torch.stack(errors).amax())


def _versions(name: str) -> dict[str, str]:
    packages = ("torch", "timm", *(("onnx", "onnxscript", "onnxruntime") if name == ONNX else ()))
    return {package: metadata.version(package) for package in packages}
