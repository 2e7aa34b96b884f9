"""``ldae rerun``: repeat an evaluation by its record, and compare the numbers."""

import itertools
import json
import shlex
from collections.abc import Callable
from inspect import BoundArguments
from pathlib import Path
from typing import Annotated, Any

import tyro

from ldae import tree
from ldae.cli.commands import GRADERS, function_of
from ldae.console import print_main
from ldae.devices import device_for
from ldae.distributed import gather_values, is_main, process_group
from ldae.errors import DifferentResult, InputError
from ldae.evals.call import bind_call
from ldae.evals.comparison import compare
from ldae.evals.predictions import count_changed
from ldae.files import as_json, write_json
from ldae.runs import layout
from ldae.tree import NOT_NEGATIVE, AnyPath

_TRAININGS = ("finetune", "detect")  # each is a run with settings of its own
_REPEATED = (*GRADERS, "grid", "fid", *_TRAININGS)


def rerun(
    results: Annotated[AnyPath, tyro.conf.arg(metavar="RESULTS.json")],
    /,
    *,
    out: AnyPath | None = None,
    device: str | None = None,
    tolerance: float = 0.1,
) -> dict:
    """Repeat an evaluation by its results.json, and say whether the numbers are the same.

    The settings are those of the record, whose paths begin in the current folder. It prints a table
    of the numbers then and now, and a sentence: the numbers are the same to the bit; they are the
    same within what a change of device or version explains; or they are different, and the exit
    status is 1. The sentence names the weights and the images that have changed behind their names.
    A repetition that was interrupted goes on by the same command.

    Args:
        results: the results.json of an evaluation, or its folder.
        out: new folder for the repetition; by default rerun, rerun-2 and so on beside the file.
        device: auto, cpu, cuda or cuda:N; by default that of the record.
        tolerance: points by which a percent may differ if a device or a version does, although one
            image always may; of a Frechet distance, percent of its value.

    Returns: the content of rerun.json in the new folder: the verdict, the numbers then and now, and
    what has changed.

    Raises: DifferentResult when the numbers are different. InputError when the file does not say
        how to repeat it, and as the evaluation does.

    Examples:
        >>> ldae.rerun("runs/l_dae/evals/knn-imagenet/results.json")["verdict"]
        >>> ldae.rerun("runs/l_dae/evals/linear-imagenet", device="cpu", tolerance=0.3)
    """
    NOT_NEGATIVE.check("tolerance", tolerance)
    path = Path(results).expanduser()
    path = path / layout.RESULTS if path.is_dir() else path
    then = _read(path)
    function, bound = _bind(path, then["call"])
    command = then["call"]["command"]
    device = _set_device(command, bound, device)
    with process_group(device_for(device)):
        # Rank 0 decides, before it writes there.
        out = Path(out).expanduser() if out else _new_folder(path.parent)
        folder = Path(gather_values(str(out))[0])
        if (folder / layout.RESULTS).exists():
            raise InputError(f"{folder} has results already: name a new folder with --out")
        _place(command, bound, folder)
        now = function(*bound.args, **bound.kwargs)
        comparison = compare(then, now, _headlines(bound, then["results"]), tolerance)
        comparison["predictions"] = count_changed(path.parent, folder) if is_main() else {}
        comparison |= {"then": str(path), "now": str(folder / layout.RESULTS)}
        print_main(_table(comparison))
        if is_main():
            write_json(folder / layout.RERUN, comparison)
        if comparison["verdict"] != "different":
            print_main(f"{comparison['sentence']}; {folder / layout.RERUN}")
            return as_json(comparison)
    raise DifferentResult(f"{path}: {comparison['sentence']}; {folder / layout.RERUN}")


def _read(path: Path) -> dict:
    """Return a record that says how to repeat it. Raises: InputError, naming the file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        record = None
    record = record if isinstance(record, dict) else {}
    parts = [record.get(name) for name in ("results", "environment")]
    if "task" not in record or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path} is no {layout.RESULTS} of an evaluation")
    if "call" not in record:
        words = map(str, record["environment"].get("command", []))
        raise InputError(
            f"{path} is of an ldae that did not record how to repeat it; its command was: "
            f"{shlex.join(words)}"
        )
    return record


def _bind(path: Path, call: dict) -> tuple[Callable[..., dict], BoundArguments]:
    """Return the function of a call and its arguments. Raises: InputError, naming the file."""
    try:
        if call["command"] not in _REPEATED:
            raise InputError(f"ldae {call['command']} is no evaluation")
        function = function_of(call["command"])
        return function, bind_call(function, call)
    except InputError as error:
        raise InputError(f"{path} cannot be repeated: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} cannot be repeated: its call is damaged") from None


def _set_device(command: str, bound: BoundArguments, device: str | None) -> str:
    """Set the device, if one is given, and return the device of the evaluation."""
    name, key = ("config", "system.device") if command in _TRAININGS else ("setup", "device")
    settings = bound.arguments[name]
    device = device or tree.flatten(settings)[key]
    bound.arguments[name] = tree.replace(settings, {key: device})
    return device


def _new_folder(beside: Path) -> Path:
    """Return the first of the folders rerun, rerun-2, ... that has no results."""
    names = itertools.chain(["rerun"], (f"rerun-{number}" for number in itertools.count(2)))
    return next(beside / name for name in names if not (beside / name / layout.RESULTS).exists())


def _place(command: str, bound: BoundArguments, folder: Path) -> None:
    """Set the folder of the results."""
    if command in _TRAININGS:
        bound.arguments["run"] = folder
    else:
        out = folder / layout.RESULTS if command == "fid" else folder
        bound.arguments["setup"] = tree.replace(bound.arguments["setup"], {"out": out})


def _headlines(bound: BoundArguments, results: dict) -> list[str]:
    """Return the names of the results to list: those of the protocol, or all numbers."""
    protocol = bound.arguments.get("protocol")
    names = protocol.headlines if protocol else results
    return [name for name in names if isinstance(results.get(name), int | float)]


def _table(comparison: dict[str, Any]) -> str:
    """Return a line for each number: then, now and the difference."""
    width = max(map(len, comparison["numbers"]), default=0)
    lines = [f"{'':{width}} {'then':>12} {'now':>12} {'difference':>12}"]
    for name, number in comparison["numbers"].items():
        cells = ["-" if number[key] is None else f"{number[key]:.4f}" for key in ("then", "now")]
        difference = number["difference"]
        cells.append("-" if difference is None else f"{difference:+.4g}" if difference else "0")
        lines.append(f"{name:{width}}" + "".join(f" {cell:>12}" for cell in cells))
    if comparison["others"]:
        lines.append(f"these differ too: {', '.join(comparison['others'])}")
    for name, (changed, images) in comparison["predictions"].items():
        lines.append(f"predictions of {name}: {changed:,} of {images:,} images have another class")
    return "\n".join(lines)
