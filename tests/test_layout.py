"""The module table of the README is true: it names every module, and imports go to a lower floor only."""

import ast
import re
from pathlib import Path

import bertpair

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bertpair"
ROW = re.compile(r"^\| (\d+) \| `(\w+)\.py` \| .+ \|$", re.MULTILINE)
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")}
FLOORS = {name: int(floor) for floor, name in ROW.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
FLOORS["errors"] = -1  # everybody may raise


def imports_of(tree: ast.Module) -> list[str]:
    """Modules of ours that a module imports, wherever in it the import stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [node.module.split(".")[1]] if (node.module or "").startswith("bertpair.") else []
            assert node.module != "bertpair", "import from the module, not from the package"
        elif isinstance(node, ast.Import):
            assert not any(name.name.startswith("bertpair") for name in node.names)
    return found


def test_the_readme_names_every_module() -> None:
    assert set(FLOORS) == set(MODULES) - {"__init__"}


def test_imports_go_to_a_strictly_lower_floor() -> None:
    wrong = [
        f"{name} (floor {FLOORS[name]}) imports {other} (floor {FLOORS[other]})"
        for name, tree in MODULES.items()
        if name != "__init__"
        for other in imports_of(tree)
        if FLOORS[other] >= FLOORS[name]
    ]
    assert not wrong


def test_only_these_modules_see_a_config() -> None:
    seeing = {name for name, tree in MODULES.items() if "config" in imports_of(tree)}
    assert seeing <= {
        "__init__",
        "command_line",
        "layer",
        "preparation",
        "resumption",
        "scoring",
        "serve_command_line",
        "training",
        "sweep",
    }


def test_names_and_sizes() -> None:
    assert not {"utils", "common", "helpers"} & set(MODULES)
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ClassDef) and "Trainer" in node.name), name
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), name
        assert len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 450, name


def test_no_transformers_in_the_library() -> None:
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(module.split(".")[0] == "transformers" for module in modules), name


def test_public_names() -> None:
    assert bertpair.__all__ == sorted(bertpair.__all__)
    assert set(bertpair.__all__) == {
        "BertpairError",
        "CheckpointError",
        "Config",
        "ConfigError",
        "DataError",
        "EvaluationResult",
        "PairClassifier",
        "Prediction",
        "StoppedError",
        "TrainResult",
        "TrainingError",
        "evaluate",
        "train",
    }
