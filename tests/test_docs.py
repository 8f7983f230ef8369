"""What the documents show is what the commands print, and what they link to is there.

Each line `$ command` of a ```console fence is run, in order, in one folder for each document: a copy of the
repository with a shorter training in config.yaml, and its result. What comes out must have the document's
shape: the same lines and words, other numbers. `…` in a document stands for what is left out.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [path for path in DOCUMENTS if path.exists()]
MEASURING = [path for path in (ROOT / "benchmarks").glob("*.py") if "ArgumentParser" in path.read_text()]
PARTS = ("benchmarks", "bertpair", "data", "docs", "examples", "recipes")
PAGES = [*ROOT.glob("*.md"), *(page for part in (*PARTS, "tests") for page in (ROOT / part).rglob("*.md"))]
SHORTER = {"num_train_epochs": "0.048", "logging_steps": "6\neval_steps: 6"}  # 18 steps that look the same
TRAINING = ("python train.py", "bertpair train")
SERVING = re.compile(r"(python serve\.py|bertpair serve)(?![\w.])")
LABELS = "negative|neutral|positive|partly|right|wrong"
NORMAL = [
    (rf'("label": "|label=\'|^\[")(?:{LABELS})\b', r"\1*"),  # which label wins: chance
    (rf"(?<=\S)\s(?:{LABELS})(?=\s+\d\.\d)", " *"),  # the same in tables, where its score comes next
    (rf"^(?:{LABELS})(?=$|\s\d\.\d+\s(?:True|False))", "*"),  # and where a program prints it
    (r"(?<=\w) \*(?= )", ""),  # the best of several models: chance
    (r"(?<![\w.])(?=[0-9a-f]*\d)[0-9a-f]{8,64}\b", "0"),  # digests
    (r"(?<=\d)(?:\.|e-?)(?=…)", ""),  # a number cut short
    (r"(?<!\w)[-+](?=\d)", ""),
    (r"\d+(?:,\d{3})*(?:\.\d+)*(?:e[-+]?\d+)?", "0"),
    (r"(?:0 h )?(?:0 min )?0 s\b|0 h 0 min", "0 s"),
    (r"\((?:best so far|best 0 at step 0)\)", "(best)"),  # chance
    (r"\b0 threads\b", "0 thread"),  # the machine
    (r"\bprecision: .*", "precision"),  # the processor, and so the reason
    (rf"(?<= )(?:vm|{re.escape(socket.gethostname())})$", "*"),  # the host that ends a line of a table
    (r"\s+", " "),
]


class Command(NamedTuple):
    """One command of a document, and the lines below it."""

    line: int
    text: str
    shown: list[str]


def commands(document: str) -> list[Command]:
    """Those of its console fences; continued lines and here-documents belong to the command."""
    found: list[Command] = []
    fence, ending = "", ""
    for number, line in enumerate(document.splitlines(), 1):
        if line.startswith("```"):
            fence, ending = "" if fence else line[3:] or "text", ""
        elif fence != "console":
            continue
        elif ending or (found and found[-1].text.endswith("\\") and not found[-1].shown):
            found[-1] = found[-1]._replace(text=f"{found[-1].text}\n{line}")
            ending = "" if line == ending else ending
        elif line.startswith("$ "):
            found.append(Command(number, line[2:], []))
            heredoc = re.search(r"<<'?(\w+)'?", line)
            ending = heredoc[1] if heredoc else ""
        else:
            found[-1].shown.append(line)
    return found


def normal(line: str) -> str:
    """The line without what differs from run to run."""
    for pattern, token in NORMAL:
        line = re.sub(pattern, token, line)
    return line.strip()


class Line(NamedTuple):
    """A line, its normal form, and whether chance decides if it is there."""

    text: str
    normal: str
    is_chance: bool


def normal_lines(lines: Sequence[str]) -> list[Line]:
    """The lines, without empty ones at the end. How many checkpoints an output folder has is chance."""
    found: list[Line] = []
    for text in "\n".join(lines).strip("\n").splitlines():
        this, before = normal(text), found[-1].normal if found else ""
        is_save = re.fullmatch(r"saved \S+/checkpoint-0", this) and " evaluation: " in before
        is_rate = this == "step 0/0 0 pairs/s, 0 s left"  # comes when the first steps took long enough
        found.append(
            Line(text, this, bool(is_save or is_rate or (this.startswith("checkpoint-0") and this == before)))
        )
    return found


def difference(shown: Sequence[str], printed: Sequence[str]) -> str:
    """The first line in which a document and what was printed differ, on both sides; empty if none."""
    actual = normal_lines(printed)

    def pass_over(places: set[int]) -> set[int]:
        return places | {at + 1 for at in places if at < len(actual) and actual[at].is_chance}

    places = {0}  # how many printed lines the document's lines up to here may stand for
    for text, expected, is_chance in normal_lines(shown):
        if expected == "…":
            places = set(range(min(places), len(actual) + 1))
            continue
        pattern = re.compile(".*".join(map(re.escape, expected.split("…"))))
        reached = {at + 1 for at in places if at < len(actual) and pattern.fullmatch(actual[at].normal)}
        reached |= places if is_chance else set()
        if not reached:
            where = " (or after it)" if len(places) > 1 else ""
            return f"document: {text}\nprinted:  {_line(actual, min(places))}{where}"
        places = pass_over(reached)
    if len(actual) in places:
        return ""
    return f"document: (nothing more)\nprinted:  {_line(actual, max(places))}"


def _line(lines: list[Line], at: int) -> str:
    return lines[at].text if at < len(lines) else "(nothing more)"


class Shell:
    """Runs a document's commands in its folder; at most one server runs in the background."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.code = folder, port, 0
        self.server: subprocess.Popen[bytes] | None = None
        programs = folder.with_name(folder.name + "-bin")
        programs.mkdir()
        for name, what in (("python", ""), ("bertpair", "-m bertpair ")):
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {what}"$@"\n')
            (programs / name).chmod(0o755)
        self.log = programs / "server.log"
        path = f"{programs}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.environment |= {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "80", "LC_ALL": "C.UTF-8"}

    def run(self, text: str, *, refused: bool = False) -> list[str]:
        """What the command prints, standard error included; its exit code is in `code`.

        `refused`: it ends with an error, so that a server does not begin and the one that runs goes on.
        """
        text = re.sub(r"\b8000\b", str(self.port), text)
        if not refused:
            text = self._with_checkpoints(text)
        if "--port" not in text:
            text = SERVING.sub(rf"\1 --port {self.port}", text)
        text = text.replace("examples/client.py", f"examples/client.py --url http://127.0.0.1:{self.port}")
        if text == "kill %1":
            self.stop()
            return []
        if SERVING.search(text) and not refused:
            return self._serve(text.removesuffix("&"))
        with self._start(f"(exit {self.code})\n{text}", subprocess.PIPE) as process:
            try:
                printed, _ = process.communicate(timeout=600)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                printed, _ = process.communicate()
        self.code = process.returncode
        return printed.decode().splitlines()

    def _with_checkpoints(self, text: str) -> str:
        """The command with checkpoints that are there: a shorter training has others."""

        def there(match: re.Match[str]) -> str:
            others = sorted((self.folder / match[1]).glob("checkpoint-*"))
            is_there = (self.folder / match[0]).exists() or not others
            return match[0] if is_there else f"{match[1]}/{others[0].name}"

        return re.sub(r"\b([\w/]+)/checkpoint-\d+", there, text)

    def _serve(self, text: str) -> list[str]:
        """What it says up to the line that begins with `ready`, or to its end."""
        self.stop()
        with open(self.log, "wb") as log:
            self.server = self._start(text, log.fileno())
        for _ in range(1200):
            ended = self.server.poll() is not None
            before, ready, rest = self.log.read_text(encoding="utf-8").partition("\nready")
            if ended or "\n" in rest:
                self.code = self.server.returncode or 0
                return (before + ready + rest.partition("\n")[0]).splitlines()
            time.sleep(0.1)
        raise TimeoutError(f"the server is not ready: {before}")

    def _start(self, text: str, output: int) -> "subprocess.Popen[bytes]":
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        place = {"cwd": self.folder, "env": self.environment, "start_new_session": True}
        return subprocess.Popen(["bash", "-c", text], **streams, **place)

    def stop(self) -> None:
        """End the server, if one runs."""
        if self.server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()
            self.server = None


def check(name: str, document: str, shell: Shell) -> None:
    """Run its commands; fail at the first that prints something else or ends with another exit code."""
    try:
        for line, text, shown in commands(document):
            text = re.sub(r"^pip install[^&]*(&&\s*)?", "", text)
            text = re.sub(
                r"--num_train_epochs [5-9]\b", f"--num_train_epochs {SHORTER['num_train_epochs']}", text
            )
            if not text:
                continue
            refused = any(each.startswith("error:") for each in shown)
            if text in TRAINING and not refused:  # as on the first day
                shutil.rmtree(shell.folder / "output", ignore_errors=True)
            printed = shell.run(text, refused=refused)
            # So short a training has learnt nothing yet, and says so.
            printed = [each for each in printed if " rows get the label " not in each]
            expected = (1 if "client.py" in text else 2) if refused else 0
            if text == "echo $?":
                problem = "" if printed == shown else f"document: {shown}\nprinted:  {printed}"
            elif not (problem := difference(shown, printed)) and shell.code != expected:
                problem = f"exit code {shell.code}, expected {expected}"
            if problem:
                listing = "\n".join(["all that was printed:", *printed])
                pytest.fail(f"{name}:{line}: $ {text}\n{problem}\n{listing}", pytrace=False)
    finally:
        shell.stop()


WITH_COMMANDS = [path for path in DOCUMENTS if commands(path.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository whose config.yaml trains for a few steps, and the model that this makes."""
    folder = tmp_path_factory.mktemp("documents") / "sample"
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("[!.]*.*"):
        if file.is_file():
            shutil.copy(file, folder)
    settings = (ROOT / "config.yaml").read_text()
    for name, value in SHORTER.items():
        settings, count = re.subn(rf"^{name}: .*", f"{name}: {value}", settings, flags=re.M)
        assert count == 1
    (folder / "config.yaml").write_text(settings)
    shell = Shell(folder, 0)
    said = shell.run("python train.py")
    assert shell.code == 0, "\n".join(said)
    return folder


@pytest.fixture
def shell(sample: Path, tmp_path: Path) -> Iterator[Shell]:
    folder = shutil.copytree(sample, tmp_path / "sandbox")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    yield Shell(folder, port)


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.name)
def test_commands_print_what_a_document_shows(path: Path, shell: Shell) -> None:
    document = path.read_text(encoding="utf-8")
    if any("curl " in command.text for command in commands(document)) and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    check(path.name, document, shell)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(MEASURING), ids=lambda path: path.name)
def test_a_benchmark_starts_where_the_library_is_not_installed(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and f"usage: {script.name}" in done.stdout, done.stderr


def test_commands_are_read_from_console_fences() -> None:
    document = "```sh\n$ not this\n```\n$ nor this\n```console\n$ one \\\n    --flag\n…\nlast\n"
    first, second = commands(document + "$ two <<'END'\n$ text\nEND\n```\n")
    assert first == Command(6, "one \\\n    --flag", ["…", "last"])
    assert second == Command(10, "two <<'END'\n$ text\nEND", [])


SHOWN = ["dev: 1500 rows, 2 min 05 s left", "…", "negative  0.91  …", "acc = 0.9", ""]
PRINTED = ["dev: 60 rows, 9 s left", "a", "b", "negative     0.2  7  0.1", "acc = 0.25"]


@pytest.mark.parametrize(
    ("shown", "printed", "found"),
    [
        (SHOWN, PRINTED, None),
        (SHOWN, [*PRINTED[:1], *PRINTED[3:]], None),  # `…` stands for no line too
        (["…"], [], None),
        ([], ["a"], "document: (nothing more)\nprinted:  a"),
        (SHOWN, [*PRINTED, "more"], "document: (nothing more)\nprinted:  more"),
        (SHOWN, PRINTED[:-1], "document: acc = 0.9\nprinted:  (nothing more)"),
        (SHOWN, ["test: 60 rows, 9 s left", *PRINTED[1:]], f"document: {SHOWN[0]}\nprinted:  test: 60"),
        (SHOWN, [*PRINTED[:-1], "f1 = 0.25"], "document: acc = 0.9\nprinted:  f1 = 0.25"),
        (SHOWN, [PRINTED[0], "acc = 1"], "document: negative  0.91  …\nprinted:  acc = 1 (or after it)"),
        (["out: files in out/dev.tsv-3dfa3c20"], ["out: files in out/dev.tsv-12345678"], None),
        (["files in out/dev.tsv-3dfa3c20"], ["files in out/train.tsv-12345678"], "document: files"),
        (["step 9 evaluation: acc 1 (best so far)"], ["step 9 evaluation: acc 0 (best 1 at step 3)"], None),
        (["step 9  evaluation: acc 1", "saved o/checkpoint-9"], ["step 8  evaluation: acc 1"], None),
        (['{"loss": 0.…, "acc": 0.12…, …}'], ['{"loss": 12.5, "acc": 7, "n": 3}'], None),
        (['"p": 0.5, "version": "…"'], ['"p": 1.1477176935103478e-05, "version": "e5d57429"'], None),
        (["…", "saved o/checkpoint-9"], ["step 8  evaluation: acc 1", "saved o/checkpoint-9"], None),
        (["checkpoint-3  1", "checkpoint-4 *  0.25", "final  0"], ["checkpoint-5 *  0", "final  1"], None),
        (["checkpoint-3  0.5", "final  0"], ["final  1"], "document: checkpoint-3"),
        (["saved o/checkpoint-9"], [], "document: saved o/checkpoint-9\nprinted:  (nothing more)"),
        (['{"label": "right", "score": 0.5}'], ['{"label": "wrong", "score": 0.25}'], None),
        (["right 0.5 0.5 7"], ["wrong 0.5 0.5 7"], "document: right"),  # a row of a table
        (["2\tright\twrong\t0.9"], ["2\tright\tpartly\t0.8"], None),  # a row's label, and what the model said
        (["right 0.9 False 14", "wrong"], ["wrong 0.8 False 14", "right"], None),
        (["2\tright\twrong\t0.9"], ["2\twrong\twrong\t0.8"], "document: 2\tright"),
    ],
)  # fmt: skip
def test_shapes_are_compared(shown: list[str], printed: list[str], found: str | None) -> None:
    assert difference(shown, printed).startswith(found) if found else difference(shown, printed) == ""


SMALL = """```console
$ echo 5 words > file; cat file
7 words
$ pip install nothing && echo after
after
$ echo error: no such file; exit 2
error: no such file
$ echo $?
2
```
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("7 words", "7 lines", r"small.md:2: \$ echo 5 .*\ndocument: 7 lines\nprinted:  5 words\n"),
        ("after\n$", "$", r"small.md:4: \$ echo after\ndocument: \(nothing more\)\nprinted:  after\n"),
        ("exit 2", "exit 1", r"small.md:6: .*\nexit code 1, expected 2"),
        ("cat file", "cat file; false", r"small.md:2: .*\nexit code 1, expected 0"),
        ("\n2\n", "\n1\n", r"small.md:8: .*\ndocument: \['1'\]\nprinted:  \['2'\]"),
    ],
)
def test_a_document_is_held_to_what_is_printed(old: str, new: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    shell = Shell(tmp_path / "folder", 1)
    check("small.md", SMALL, shell)
    with pytest.raises(pytest.fail.Exception, match=message):
        check("small.md", SMALL.replace(old, new), shell)


def text_of(page: Path) -> str:
    """The page without its fences."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Those of its headings, by GitHub's rules: letters, digits, `_` and `-` stay, a space becomes `-`."""
    found: dict[str, None] = {}
    for heading in re.findall(r"^#{1,6} +(.*?)[ #]*$", text_of(page), re.M):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{name}-{number}"
        found[anchor] = None
    return set(found)


def broken_links(page: Path) -> list[str]:
    """Links to files and headings that are not there, and addresses that cannot be."""
    text = re.sub(r"`[^`\n]*`", "", text_of(page))
    broken = []
    for link in re.findall(r"\]\(\s*<?([^\s)>]*)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.M):
        parts = urlsplit(link)
        if parts.scheme:
            is_there = parts.scheme == "mailto" or (parts.scheme in ("http", "https") and "." in parts.netloc)
        else:
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            is_there = target.is_relative_to(ROOT if page.is_relative_to(ROOT) else page.parent)
            is_there &= target.exists() and (not parts.fragment or parts.fragment in anchors(target))
        if not is_there:
            broken.append(link)
    return broken


def test_links_lead_somewhere() -> None:
    broken = [f"{page.relative_to(ROOT)}: {link}" for page in PAGES for link in broken_links(page)]
    assert not broken, "\n".join(broken)


def test_broken_links_are_found(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# The `a.b` & *c*\n```\n# no heading\n```\n## Twice\n## Twice\n", encoding="utf-8")
    good = ["other.md", "other.md#the-ab--c", "other.md#twice-1", "#own", "https://a.b/c"]
    bad = ["othr.md", "other.md#no-heading", "other.md#twice-2", "#other", "https://", "http//a.b", "../x"]
    links = "".join(f"[text]({link})\n" for link in good + bad)
    page.write_text(f"# Own\n`[code](x)`\n```\n[code](y)\n```\n{links}", encoding="utf-8")
    assert broken_links(page) == bad


def test_files_that_are_named_are_there() -> None:
    """A path in backticks is one of the repository, or of the library, or in a folder that a flag names."""
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    named = re.findall(r"--\w+_dir[ =](?:\./)?([\w-]+)", " ".join(texts.values()))
    others = {"output", *(folder for folder in named if not (ROOT / folder).exists())}
    kinds = "py|md|yaml|tsv|json|txt|toml|html|service"
    pattern = re.compile(rf"`(?:python )?([\w.-]+/[\w./-]+\.(?:{kinds}))\b")
    missing = [
        f"{path.name}: {name}"
        for path in DOCUMENTS
        for name in pattern.findall(text_of(path))
        if name.split("/")[0] not in others
        and not any((base / name).exists() for base in (ROOT, ROOT / "bertpair", path.parent))
    ]
    assert not missing, "\n".join(missing)
