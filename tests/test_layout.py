"""The wings of the library: their order, no cycles inside one, and what none of them may hold."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import bertpair

PACKAGE = Path(bertpair.__file__).parent
IMPORTS_FROM = {  # each wing, and the wings before it that it may import from
    "settings": (),
    "data": ("settings",),
    "model": ("settings", "data"),
    "checkpoints": ("settings", "data", "model"),
    "evaluation": ("settings", "data", "model", "checkpoints"),
    "training": ("settings", "data", "model", "checkpoints", "evaluation"),
    "serving": ("settings", "data", "model", "checkpoints", "evaluation"),
    "search": ("settings", "data", "model", "checkpoints", "evaluation", "training"),
    "__main__": ("settings", "checkpoints", "evaluation", "training", "search", "serving"),
}
SHARED = ("errors", "runtime", "console", "processes")
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): ast.parse(path.read_text())
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imports_of(tree: ast.Module) -> set[str]:
    """Modules of ours that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bertpair"):
            assert node.level == 0
            if node.module == "bertpair":
                assert [name.name for name in node.names] == ["__version__"], "import from the module itself"
                continue
            found.add(str(node.module).removeprefix("bertpair."))
        elif isinstance(node, ast.Import):
            assert not any(name.name.startswith("bertpair") for name in node.names)
    return found


IMPORTS = {name: imports_of(tree) for name, tree in MODULES.items()}


def test_each_wing_imports_from_those_before_it() -> None:
    assert {name.partition(".")[0] for name in MODULES} == {*IMPORTS_FROM, *SHARED}
    wrong = {
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if (wing := other.partition(".")[0]) not in SHARED
        and wing not in (name.partition(".")[0], *IMPORTS_FROM.get(name.partition(".")[0], ()))
    }
    assert not wrong


def test_there_are_no_cycles() -> None:
    TopologicalSorter(IMPORTS).prepare()


def test_what_no_module_holds() -> None:
    for name, tree in MODULES.items():
        assert not {"utils", "common", "helpers"} & set(name.split("."))
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(module.split(".")[0] == "transformers" for module in modules), name
            assert not (isinstance(node, ast.ClassDef) and "Trainer" in node.name), name
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), name


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
        "SweepResult",
        "TrainResult",
        "TrainingError",
        "cross_validate",
        "evaluate",
        "run_seeds",
        "sweep",
        "train",
    }
