"""Rules of the package: the order of imports, and commands that import no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ldae
from ldae.models.contract import Denoiser
from ldae.runs import layout

PACKAGE = Path(ldae.__file__).parent

# Lower layers never import higher ones. Names are files and folders of the package.
LAYERS = [
    ["errors", "help", "markdown", "processor"],
    ["files", "tree", "patches", "noise", "draws", "prediction", "precision"],
    ["distributed", "console"],
    ["devices", "masking", "moments"],
    ["pixel_statistics"],
    ["settings", "data", "models"],
    ["trajectory", "tokenizers"],
    ["runs"],
    ["train"],
    ["objective", "feature_target"],
    ["method"],
    ["backbones", "plots"],
    ["sampling", "evals", "cluster"],
    ["downstream"],
    ["finetuning", "detection"],
    ["pretraining", "deployment"],
    ["mae"],
    ["machine", "launch"],
    ["auto"],
    ["cli"],
    ["commands"],
    ["__init__", "__main__"],
]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module(path): path for path in PACKAGE.rglob("*.py")}


def room(name: str) -> str:
    """Return the name of the module's file or folder directly below the package."""
    return name.split(".")[1] if "." in name else "__init__"


def imports_of(name: str) -> set[str]:
    """Return the modules of the package that a module imports, also inside of functions."""
    imported = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            imported |= modules or {node.module}
    return imported & FILES.keys() - {name, "ldae"}


@pytest.mark.parametrize("name", FILES)
def test_imports_follow_the_layers(name):
    assert room(name) in LAYER, f"give {room(name)} a place in LAYERS"
    for imported in imports_of(name):
        assert LAYER[room(imported)] <= LAYER[room(name)], f"{name} imports {imported}"


def test_there_are_no_import_circles():
    """A folder has none inside either."""
    graph = {name: imports_of(name) for name in FILES}

    def reach(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for next_ in graph[waiting.pop()] - seen:
                seen.add(next_)
                waiting.append(next_)
        return seen

    assert [name for name in graph if name in reach(name)] == []


def test_commands_import_no_other_commands():
    """Only demo and submit do, which combine other commands."""
    for name in FILES:
        if room(name) == "commands" and name not in ("ldae.commands.demo", "ldae.commands.submit"):
            assert not {room(other) for other in imports_of(name)} & {"commands"}, name


def test_models_and_tokenizers_import_no_settings():
    for name in FILES:
        if room(name) in ("models", "tokenizers"):
            assert "ldae.settings" not in imports_of(name), name


def used_of_denoiser(path: Path) -> set[str]:
    """Return the attributes of ``denoiser`` that a file uses."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and "denoiser" in (getattr(node.value, "id", ""), getattr(node.value, "attr", ""))
    }


def test_only_the_contract_of_a_denoiser_is_used():
    """So a new denoiser needs only a file in models/. The plain ViT inside is for the fold only."""
    contract = {*dir(Denoiser(1, 1, 1)), *Denoiser.__annotations__}
    plain = {"embed", "plain_vit", "plain_state", "load_plain_state"}
    fold = PACKAGE / "backbones" / "fold.py"
    for path in (*PACKAGE.rglob("*.py"), *PACKAGE.with_name("benchmarks").rglob("*.py")):
        if path.parent.name != "models":
            inside = used_of_denoiser(path) - (contract if path == fold else contract - plain)
            assert not inside, f"{path} reaches into a denoiser: {inside}"
    assert plain <= used_of_denoiser(fold)


def test_no_file_is_named_after_leftovers():
    names = {path.stem for path in PACKAGE.rglob("*.py")}
    assert not names & {"utils", "misc", "common", "helpers", "util"}


# Names in a run folder. Names of folders are common words, so they count only in parts of paths.
NAMES = {name for key, name in vars(layout).items() if key.isupper()}
FILE_NAMES = {name for name in NAMES if "." in name}


def strings(node: ast.AST) -> Iterator[str]:
    """Yield the string literals of code, without docstrings."""
    docs = {id(part.value) for part in ast.walk(node) if isinstance(part, ast.Expr)}
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in docs:
            yield part.value


def path_parts(node: ast.AST) -> Iterator[str]:
    """Yield the string literals that are parts of paths."""
    for part in ast.walk(node):
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Div):
            yield from strings(part)
        if isinstance(part, ast.Call) and "hub.get_dir" not in ast.unparse(part):  # not of a run
            called = getattr(part.func, "attr", getattr(part.func, "id", ""))
            if called in ("Path", "joinpath", "glob", "rglob", "with_name"):
                yield from strings(part)


BENCHMARKS = {path.stem: path for path in PACKAGE.with_name("benchmarks").glob("*.py")}


@pytest.mark.parametrize("name", sorted((FILES | BENCHMARKS).keys() - {"ldae.runs.layout"}))
def test_names_in_a_run_folder_are_written_in_one_file(name):
    code = ast.parse((FILES | BENCHMARKS)[name].read_text())
    assert [text for text in strings(code) if any(name in text for name in FILE_NAMES)] == []
    assert [text for text in path_parts(code) if NAMES & {*text.split("/")}] == []


@pytest.mark.parametrize("name", FILES)
def test_no_file_that_is_read_can_run_code(name):
    """SECURITY.md says so."""
    for call in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(call, ast.Call):
            called = ast.unparse(call.func)
            how = {option.arg: ast.unparse(option.value) for option in call.keywords}
            if called.endswith(("torch.load", ".get_state_dict", "load_state_dict_from_url")):
                assert how.get("weights_only") == "True", ast.unparse(call)
            assert how.get("allow_pickle", "False") == "False", ast.unparse(call)
            assert how.get("trust_remote_code", "False") == "False", ast.unparse(call)
            assert called not in ("pickle.load", "pickle.loads", "yaml.load", "eval", "exec")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_import_has_no_side_effect_and_help_imports_no_torch():
    loaded = run(
        "import sys, ldae; from ldae.cli import main; main(['--help']); "
        "heavy = {'torch', 'timm', 'numpy', 'tyro', 'importlib.metadata'}; "
        "print('loaded', *heavy & sys.modules.keys())"
    )
    assert loaded.strip().endswith("loaded")


def test_the_batch_script_needs_nothing_but_python():
    """Its last line runs after all ranks, on a machine that may be out of memory."""
    loaded = run(
        "import sys, ldae.cluster.requeue; "
        "print('loaded', *{'torch', 'timm', 'numpy', 'tyro', 'yaml'} & sys.modules.keys())"
    )
    assert loaded.strip() == "loaded"


@pytest.mark.parametrize("name", ldae.__all__)
def test_the_public_names_can_be_imported(name):
    assert getattr(ldae, name) is not None


@pytest.mark.parametrize("argv", [["show", "l_dae"], ["diff", "l_dae", "image_output"]])
def test_show_and_diff_import_no_torch(argv):
    """Their settings refer to registries that need torch."""
    loaded = run(
        f"import sys; from ldae.cli import main; main({argv}); print('torch' in sys.modules)"
    )
    assert loaded.endswith("False\n")


def test_the_nearest_name_is_searched_in_one_place():
    using = [name for name, path in FILES.items() if "difflib" in path.read_text()]
    assert using == ["ldae.errors"]
