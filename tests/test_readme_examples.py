"""The Python examples of README as a user would try them: by a type checker, in a program, in a notebook."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import write_tiny_bert
from nbclient import NotebookClient

import bertpair

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
CLASSIFIER, TRAINING = BLOCKS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples' data, and `output` and `grades`, which README trains before."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", place / "examples")
    lines = (ROOT / "data/train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (place / "few.tsv").write_text("".join(lines[:65]), encoding="utf-8")
    vocabulary = ROOT / "data/tiny-bert/vocab.txt"
    tiny = write_tiny_bert(
        place / "tiny", vocab_size=len(vocabulary.read_text(encoding="utf-8").split("\n")) - 1
    )
    shutil.copy(vocabulary, tiny / "vocab.txt")
    for name in ("output", "grades"):
        bertpair.train(
            bertpair.Config(
                model_name_or_path=str(tiny),
                from_scratch=True,
                train_file=[str(place / "few.tsv")],
                max_seq_length=40,
                max_steps=1,
                output_dir=str(place / name),
            )
        )
    return place


def test_a_strict_type_checker_accepts_them(tmp_path: Path) -> None:
    for number, block in enumerate(BLOCKS):
        (tmp_path / f"example_{number}.py").write_text(block, encoding="utf-8")
    # As in an installed package, nothing is said of what is imported. Large libraries are passed over.
    settings = "[mypy]\nfollow_imports = skip\n[mypy-bertpair.*,pydantic.*]\nfollow_imports = silent\n"
    (tmp_path / "mypy.ini").write_text(settings)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir=cache"]
    files = sorted(path.name for path in tmp_path.glob("*.py"))
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *files], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == f"Success: no issues found in {len(files)} source files\n", (
        done.stdout + done.stderr
    )
    assert (ROOT / "bertpair/py.typed").exists()


def test_a_model_answers_in_three_lines(place: Path) -> None:
    assert len(ast.parse(CLASSIFIER).body) == 3
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CLASSIFIER]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() in ("negative", "neutral", "positive"), done.stderr


def test_a_notebook_shows_the_plan_the_bar_and_the_result(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(place / name))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(TRAINING)])
    client = NotebookClient(notebook, timeout=120, kernel_name="python3")
    client.execute(cwd=str(place))
    outputs = notebook.cells[0].outputs
    assert {output.name for output in outputs} == {"stdout"}, "nothing in the colour of a fault"
    text = "".join(output.text for output in outputs)
    assert text.index("reading examples/answers.tsv") < text.index("plan: 39 steps") < text.index("  0%|")
    assert re.search(r"39/39 .*step/s", text)
    assert re.search(r"class +precision +recall.*\n(.*\n){3}", text)
    assert 0 <= float(text.splitlines()[-1]) <= 1
