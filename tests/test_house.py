"""Laws of the house itself: who imports whom, and what costs no time."""

import ast
import subprocess
import sys
from pathlib import Path

import ldae

PACKAGE = Path(ldae.__file__).parent

# Lower layers never import higher ones, nor their neighbours of the same line in a circle.
LAYERS = [
    ["errors"],
    ["tree", "patches", "distributed", "log", "moments", "timm_folder"],
    ["settings", "requeue"],
    ["noise", "prediction", "sampling", "trajectory", "slurm"],
    ["tokenizers", "models"],
    ["objective"],
    ["method"],
    ["plots", "data", "weights"],
    ["preprocessing"],
    ["train"],
    ["export"],
    ["backbone", "latents", "album", "unfold"],
    ["generation"],
    ["sample"],
    ["perceptual"],
    ["evals"],
    ["finetuning"],
    ["fit"],
    ["pretrain", "finetune"],
    ["demo", "sending", "jobs"],
    ["cli"],
    ["pipeline"],
    ["__init__", "__main__"],
]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}


def room(module: str) -> str:
    return module.removeprefix("ldae.").split(".")[0] if module != "ldae" else "__init__"


def imports_of(path: Path) -> set[str]:
    """Rooms that a file imports, at its top or inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {room(name.name) for name in node.names if name.name.startswith("ldae")}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldae"):
            if node.module == "ldae":
                found |= {room(f"ldae.{name.name}") for name in node.names}
            else:
                found.add(room(node.module))
    return {name for name in found if name in LAYER}


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        assert parts[0] in LAYER, f"{path}: give this room a place in LAYERS"
        for imported in imports_of(path) - {parts[0], "__init__"}:
            assert LAYER[imported] <= LAYER[parts[0]], f"{path} imports {imported}"


def test_no_circles():
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        graph.setdefault(name, set()).update(imports_of(path) - {name, "__init__"})

    def reach(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for next_ in graph.get(waiting.pop(), ()):
                if next_ not in seen:
                    seen.add(next_)
                    waiting.append(next_)
        return seen

    assert [name for name in graph if name in reach(name)] == []


def test_models_and_tokenizers_know_no_settings():
    for folder in ("models", "tokenizers"):
        for path in (PACKAGE / folder).rglob("*.py"):
            assert "settings" not in imports_of(path), path


def test_no_room_for_leftovers():
    names = {path.stem for path in PACKAGE.rglob("*.py")}
    assert not names & {"utils", "misc", "common", "helpers", "util"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_import_has_no_side_effect_and_help_imports_no_torch():
    loaded = run(
        "import sys, ldae; from ldae.cli import main; main(['--help']); "
        "print('loaded', *[m for m in ('torch', 'timm', 'numpy', 'tyro') if m in sys.modules])"
    )
    assert loaded.strip().endswith("loaded")
