"""What examples/ holds works: the client against a real server, the unit through systemd's own check."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_hf_folder
from live_server import LiveServer, make_predictor, serving

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = write_hf_folder(tmp_path_factory.mktemp("served") / "hf-tiny")
    predictor, config = make_predictor(folder, max_batch_tokens=512)
    with serving(predictor, config, b"the-right-key") as server:
        yield server


def run_client(
    live: LiveServer, *arguments: str, key: str = "the-right-key"
) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        str(EXAMPLES / "client.py"),
        "--url",
        f"http://127.0.0.1:{live.port}",
        *arguments,
    ]
    environment = {**os.environ, "BERTPAIR_KEY": key, "PYTHONUTF8": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_client_asks_for_one_pair_and_for_a_file(live: LiveServer, tmp_path: Path) -> None:
    one = run_client(live, "the cat", "中文")
    assert one.returncode == 0 and json.loads(one.stdout)["label"] in ("negative", "neutral", "positive")
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"the cat {i}\tsat {i}\n" for i in range(70)), encoding="utf-8")
    many = run_client(live, "--file", str(file))
    rows = [line.split("\t") for line in many.stdout.splitlines()]
    assert many.returncode == 0 and [row[0] for row in rows] == [f"the cat {i}" for i in range(70)]
    assert {len(row) for row in rows} == {4}
    refused = run_client(live, "the cat", "sat", key="a-wrong-key")
    assert refused.returncode == 1 and refused.stderr.startswith("error: 401") and not refused.stdout


def test_the_page_shows_the_files_that_stand_beside_it() -> None:
    page = (EXAMPLES / "serve.md").read_text(encoding="utf-8")
    for language, name in (("ini", "bertpair.service"), ("dockerfile", "Containerfile")):
        found = re.search(rf"```{language}\n(.*?)```", page, re.DOTALL)
        assert found and found[1] == (EXAMPLES / name).read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """With a command that exists here in the place of the installed one; every other line is as it stands."""
    unit = (EXAMPLES / "bertpair.service").read_text(encoding="utf-8")
    file = tmp_path / "bertpair.service"
    file.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit, flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, timeout=60
    )
    about_us = [line for line in done.stderr.splitlines() if "bertpair" in line]
    assert done.returncode == 0 and not about_us, done.stderr
