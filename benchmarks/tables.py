"""The tables of the documentation, made from the files below results/.

A page has a table between the lines ``<!-- table: NAME -->`` and ``<!-- /table -->``.
"""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machines
from benchmarks.seeds import mean_and_deviation
from ldae.errors import InputError, unknown
from ldae.files import write
from ldae.markdown import markdown_table
from ldae.runs import layout

RESULTS = Path(__file__).parent / "results"
_START, _END = "<!-- table: ", "<!-- /table -->\n"
_PLACE = re.compile(rf"({_START}([\w-]+) -->\n)(?:(?!{_START}).)*?({_END})", re.S)
_EXACT = 100.0  # dB; what benchmarks/rows.py records when nothing is lost


def write_tables(page: Path) -> None:
    """Write all tables of a Markdown page anew.

    Raises: InputError, naming the page, when it cannot be read or names a table that does not
        exist.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{page} cannot be read: {error.strerror}") from None
    write(page, fill(text, page).encode())


def fill(text: str, page: Path) -> str:
    """Return the text of a page with all its tables made anew.

    Raises: InputError, naming ``page``, for a table without end and one that does not exist.
    """
    if not len(_PLACE.findall(text)) == text.count(_START) == text.count(_END):
        raise InputError(f"{page}: each line {_START}NAME --> needs one {_END.strip()} below it")

    def place(found: re.Match) -> str:
        name = found[2]
        if name not in TABLES:
            raise unknown(f"{page}: there is no table", name, TABLES)
        return found[1] + TABLES[name]() + found[3]

    return _PLACE.sub(place, text)


def _read(*names: str) -> Any:
    return json.loads(RESULTS.joinpath(*names).read_text(encoding="utf-8"))


def _demo() -> str:
    """The table that ``ldae demo`` prints."""
    rows = [
        [name, f"{probe:.1f}", f"{neighbours:.1f}"]
        for name, (neighbours, probe) in _read("demo", layout.DEMO).items()
    ]
    return markdown_table(
        ["scattered-digits, top-1 in percent", "linear probe", "k-NN, k = 20"], rows
    )


_UNTRAINED = "the l-DAE's architecture, untrained"
_BACKBONES = {  # of suites -> their names in a table, in its order
    "cifar10": "**l-DAE** on CIFAR-10",
    "imagenette": "**l-DAE** on Imagenette",
    "demo": "**l-DAE** of `make demo`",
    "run-untrained": _UNTRAINED,
    "vit_tiny-untrained": "timm's ViT-Ti, untrained",
    "pixels-32": "raw pixels",
    "pixels": "raw pixels",
    "cifar10-resnet": "ResNet-10-T, trained with the labels",
}
_COLUMNS = {  # protocol of suites, its metric -> heading, in the table's order
    ("linear", "top1"): "linear probe",
    ("logreg", "top1"): "logistic regression",
    ("segment", "miou"): "segmentation, mIoU",
    ("knn", "top1_k20"): "k-NN, k = 20",
    ("retrieve", "mean_average_precision"): "retrieval, mAP",
}


def _suite(name: str) -> str:
    """A row for each backbone of a suite, a column for each protocol, in percent."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for cell in _read("suites", name, "table.json")["cells"]:
        for metric, value in cell["results"].items():
            found.setdefault(cell["backbone"], {})[cell["protocol"], metric] = value
    used = set().union(*found.values())
    columns = [key for key in _COLUMNS if key in used]
    rows = [
        [shown, *(f"{found[backbone][key]:.1f}" for key in columns)]
        for backbone, shown in _BACKBONES.items()
        if backbone in found
    ]
    return markdown_table(["in percent", *(_COLUMNS[key] for key in columns)], rows)


def _whitening() -> str:
    """k-NN with plain and with whitened features."""
    names = {"l_dae": "**l-DAE**", "untrained": _UNTRAINED, "pixels": "raw pixels"}
    rows = []
    for name, shown in names.items():
        both = [_read("whitening", f"{name}{end}.json") for end in ("", "-whitened")]
        rows.append([shown, *(f"{part['results']['top1_k20']:.1f}" for part in both)])
    return markdown_table(["top-1 in percent, k = 20", "plain", "`--whiten`"], rows)


def _finetune() -> str:
    """Top-1 after each epoch of fine-tuning, from pre-trained and from random weights."""
    curves = _read("finetune", "finetune.json")["curves"]
    rows = [
        [f"{one['epoch']:.0f}", f"{one['top1']:.1f}", f"{other['top1']:.1f}"]
        for one, other in zip(curves["pretrained"], curves["scratch"], strict=True)
    ]
    return markdown_table(["epoch", "from l-DAE", "from scratch"], rows)


def _rows() -> str:
    """The rows of the paper: tokenizer, linear probe, and the published accuracy."""
    rows = []
    for row in _read("rows", "table.json")["rows"]:
        reconstruction = "exact" if row["psnr"] >= _EXACT else f"{row['psnr']:.1f}"
        numbers = [f"{row['linear']:.1f}", reconstruction, f"{row['published'] or ''}"]
        rows.append([f"`{row['name']}`", f"{row['row'] or ''}", *numbers])
    header = ["", "row", "linear probe", "reconstruction, dB", "published, on ImageNet"]
    return markdown_table(header, rows)


def _latents(data: str) -> str:
    """Accuracies by the scale and the dimension of latents: means and deviations over seeds."""
    measured = _read(f"{data}-latents.json")["rows"]
    by_latents: dict[tuple[str, int], list[dict]] = {}
    for row in measured:
        by_latents.setdefault((row["scale"], row["dim"]), []).append(row)
    graders = [name for name in ("linear", "knn") if name in measured[0]]
    rows = []
    for (scale, dim), runs in sorted(by_latents.items()):
        cells = [mean_and_deviation([run[name] for run in runs]) for name in graders]
        rows.append([scale, f"{dim}", f"{len(runs)}", *cells])
    header = ["`tokenizer.scale`", "`tokenizer.dim`", "seeds"]
    return markdown_table([*header, *(_GRADERS[name] for name in graders)], rows)


_WINNER = "narrow, normalized, only dropped tokens, half without noise, sigma to 0.5"


def _leads() -> str:
    """The three best leads of each family by the linear probe, and MAE as it is."""
    found = _accuracies_of_leads()
    pixels = found.pop("raw pixels")
    ranked = sorted(found, key=found.__getitem__, reverse=True)
    rivals = [name for name in ranked if name.startswith("mae")]
    denoising = [name for name in ranked if name not in rivals and not _is_variant(name)]
    rows = {name: found[name] for name in (*denoising[:3], *rivals[:3], "mae")}
    rows |= {"raw pixels": pixels}
    return _table_of_leads(
        f"the best of {len(denoising)} leads of denoising and {len(rivals)} of MAE, in percent",
        rows,
    )


def _gap() -> str:
    """The winner, with one thing of MAE at a time, and MAE."""
    found = _accuracies_of_leads()
    variants = {name: values for name, values in found.items() if _is_variant(name)}
    rows = {"the winner": found[_WINNER], **variants, "mae": found["mae"]}
    return _table_of_leads("in percent", rows)


def _is_variant(lead: str) -> bool:
    """Return whether a lead takes the gap apart; it was run after the winner was chosen."""
    return lead.startswith("winner, ")


def _accuracies_of_leads() -> dict[str, list[float]]:
    rows = _read("contest", "leads", "table.json")["rows"]
    return {row["name"]: [value for (value,) in row["accuracies"].values()] for row in rows}


def _table_of_leads(what: str, rows: dict[str, list[float]]) -> str:
    return markdown_table(
        [what, "linear probe", "k-NN, k = 20", "whitened"],
        [[name, *(f"{value:.1f}" for value in values)] for name, values in rows.items()],
    )


_GRADERS = {
    "linear": "linear probe",
    "knn": "k-NN, k = 20",
    "knn-whitened": "whitened",
    "ten-a-class": "10 labels a class",
    "finetuned": "fine-tuned",
}
_WITH_ALL_LABELS = ("linear", "knn", "knn-whitened")


def _contest(folder: str, names: Sequence[str] = (), graders: Sequence[str] = ()) -> str:
    """The contestants of a final, and their differences to MAE with a 95 % interval over images.

    Means and deviations are over seeds. ``names`` and ``graders`` select rows and columns.
    """
    found = _read("contest", folder, "table.json")
    graders = graders or [name for name in _GRADERS if name in found["rows"][0]["accuracies"]]
    rows = []
    for row in found["rows"]:
        by_grader = row["accuracies"]
        cells = [
            mean_and_deviation(by_grader[name]) if name in by_grader else "" for name in graders
        ]
        images = f"{statistics.mean(row['images']):,.0f}" if "images" in row else ""
        rows.append([row["name"], *cells, images])
    for name, differences in found["against_mae"].items():
        cells = [_difference(differences[name]) if name in differences else "" for name in graders]
        rows.append([f"{name} less mae", *cells, ""])
    rows = [row for row in rows if not names or row[0] in names]
    return markdown_table(["in percent", *(_GRADERS[name] for name in graders), "images"], rows)


def _poolings() -> str:
    """MAE by its class token and by the mean of its patch tokens, as the contest grades it."""
    sets = {"cifar10": "CIFAR-10", "imagenette": "Imagenette"}
    poolings = {"class token": "class-token/", "mean of the patch tokens": ""}
    rows = []
    for folder, name in sets.items():
        for pooling, of in poolings.items():
            mae, *_ = _read("contest", f"{of}{folder}", "table.json")["rows"]
            cells = [mean_and_deviation(mae["accuracies"][grader]) for grader in _WITH_ALL_LABELS]
            rows.append([f"{name}, {pooling}", *cells])
    return markdown_table(
        ["MAE, in percent", *(_GRADERS[grader] for grader in _WITH_ALL_LABELS)], rows
    )


def _course() -> str:
    """What the contest's two best reach at the end of an hour, by one seed."""
    found = _read("contest", "course.json")
    ends = {part["name"]: part["checkpoints"][-1] for part in found["contestants"]}
    graders = [*found["pixels"]]
    rows = [
        [name, *(f"{end['accuracies'][grader]:.1f}" for grader in graders), f"{end['images']:,}"]
        for name, end in ends.items()
    ]
    rows.append(["raw pixels", *(f"{found['pixels'][grader]:.1f}" for grader in graders), ""])
    return markdown_table(["in percent", *(_GRADERS[name] for name in graders), "images"], rows)


def _difference(found: dict) -> str:
    low, high = found["interval"]
    return f"{found['difference']:+.1f} ({low:.1f} to {high:.1f})"


def _soak() -> str:
    """What killed runs lost."""
    both = [_read("soak.json"), _read("soak-2.json")]
    rows: dict[str, Callable[[dict], str]] = {
        "kills at random moments": lambda found: f"{found['counted']}",
        "of these during a save": lambda found: f"{found['during_a_save']}",
        "weights, moments and metrics as undisturbed, bit for bit": lambda found: (
            "yes" if found["equal"] else "no"
        ),
        "damaged checkpoints": lambda found: f"{found['damaged_checkpoints']}",
        "files left over": lambda found: f"{len(found['left_over_files'])}",
        "seconds that a kill cost": lambda found: f"{found['seconds_a_kill']:.1f}",
        "steps lost by SIGKILL": lambda found: f"{found['steps_lost_a_kill']['SIGKILL']:.1f}",
        "steps lost by SIGTERM": lambda found: f"{found['steps_lost_a_kill']['SIGTERM']:.1f}",
    }
    return markdown_table(
        ["", "one process", "two ranks"],
        [[name, *(value(found) for found in both)] for name, value in rows.items()],
    )


def _guidance() -> str:
    """Shares of samples that show the digit or class that they were asked for."""
    runs = {
        "guidance": "`patch_pca` on `digits`",
        "guidance-cifar10": "`dit` on CIFAR-10",
        "guidance-scattered-digits": "`dit` on scattered-digits",
    }
    rows: list[list[str]] = []
    for name, shown in runs.items():
        found = _read(f"{name}.json")
        shares = found["percent_of_the_class_asked_for"]["classifier-free, by weight"]
        rows.append([shown, f"{found['images']}", *(f"{share:.1f}" for share in shares.values())])
    weights = [f"weight {float(weight):g}" for weight in shares]
    return markdown_table(["in percent", "samples", *weights], rows)


TABLES: dict[str, Callable[[], str]] = {
    "demo": _demo,
    "rivals": lambda: _contest(
        "cifar10",
        ["mae", "l_dae_masked", "l_dae_masked, untrained", "raw pixels", "l_dae_masked less mae"],
        ["linear", "knn"],
    ),
    "cifar10": lambda: _suite("cifar10"),
    "imagenette": lambda: _suite("imagenette"),
    "scattered-digits": lambda: _suite("scattered-digits"),
    "whitening": _whitening,
    "finetune": _finetune,
    "rows": _rows,
    "latents": lambda: _latents("cifar10"),
    "imagenette-latents": lambda: _latents("imagenette"),
    "leads": _leads,
    "gap": _gap,
    "contest": lambda: _contest("cifar10"),
    "contest-imagenette": lambda: _contest("imagenette"),
    "poolings": _poolings,
    "course": _course,
    "contest-xeon": lambda: _contest("cifar10-xeon"),
    "guidance": _guidance,
    "soak": _soak,
    "speed": machines.table,
}
