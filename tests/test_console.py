"""The scripts as processes: stopped while they start, and with standard streams of every kind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_hf_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train", "evaluate", "serve"]


def command_of(script: str, *flags: object) -> list[str]:
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]


def is_caught(pid: int, signum: int) -> bool:
    (mask,) = [line.split()[1] for line in status_of(pid) if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> (signum - 1) & 1)


def status_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/status").read_text().splitlines()


WAITS_FOR_SIGNALS = """
import sys, time
from bertpair import console
console.REPEATED_WITHIN = 1.0
console.install_signal_handlers()
print("ready", flush=True)
while not console.stop_flag:
    time.sleep(0.01)
print("asked", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("size", [1, 2])
def test_torchrun_passes_a_signal_on_and_the_repeated_one_does_not_kill(size: int) -> None:
    several = {"RANK": "0", "WORLD_SIZE": str(size)}
    with subprocess.Popen(
        [sys.executable, "-c", WAITS_FOR_SIGNALS],
        env={**os.environ, **several, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "asked\n"
            if size > 1:
                process.send_signal(signal.SIGTERM)
                time.sleep(1.1)
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == -signal.SIGTERM
        finally:
            process.kill()


MOMENTS = {
    "at once": lambda pid: is_caught(pid, signal.SIGTERM),
    "while torch is loaded": lambda pid: "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text(),
}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells the moments by /proc")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_while_a_script_starts_ends_it_quietly(
    script: str, signum: signal.Signals, moment: str, tmp_path: Path
) -> None:
    own = ("--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o")
    command = command_of(script, *(own if script == "train" else ("--model_dir", "m")))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, cwd=tmp_path)  # without a config.yaml
    while not MOMENTS[moment](process.pid):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signum)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 128 + signum


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose labels are not ASCII."""
    folder = write_hf_folder(tmp_path_factory.mktemp("console") / "hf-tiny")
    config = json.loads((folder / "config.json").read_text())
    names = {"negative": "错", "neutral": "不", "positive": "对"}
    config["id2label"] = {key: names[name] for key, name in config["id2label"].items()}
    config["label2id"] = {names[name]: index for name, index in config["label2id"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    (folder.parent / "dev.tsv").write_text(
        "index\ta\tb\tlabel\n" + "0\tthe cat\tsat\t对\n1\tthe cat\tgood\t错\n" * 4
    )
    return folder


def test_standard_output_may_be_closed_unread_full_or_ascii(folder: Path, tmp_path: Path) -> None:
    evaluate = command_of("evaluate", "--model_dir", folder, "--data_file", folder.parent / "dev.tsv")

    def run(shell: str, *command: str) -> tuple[int, str, str]:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii", "XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run(
            ["sh", "-c", shell, *command], env=environment, capture_output=True, text=True, timeout=120
        )
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    code, said, complaint = run('"$0" "$@"', *evaluate)
    assert code == 0, complaint
    assert "\\u5bf9" in said and said.isascii() and json.loads(said.splitlines()[-1])["n"] == 8
    assert run('"$0" "$@" >&-', *evaluate)[0] == 0
    code, _, complaint = run('(trap "" PIPE; "$0" "$@"; echo $? >&2) | true', *evaluate)
    assert complaint.endswith("error: standard output cannot be written: Broken pipe\n2\n")
    full = f'ulimit -f 0; "$0" "$@" > {tmp_path}/help.txt'
    complaint = "error: standard output cannot be written: File too large\n"
    assert run(full, *command_of("train", "--help")) == (2, "", complaint)
    assert run('"$0" "$@" >&-', *command_of("serve", "--help")) == (0, "", "")


@pytest.mark.parametrize(
    ("script", "shell"),
    [
        *((script, '"$0" "$@" >&- 2>&- <&-') for script in SCRIPTS),
        ("train", '"$0" "$@" 2>&-'),
        ("evaluate", 'ulimit -f 0; "$0" "$@" 2> err'),
    ],
)
def test_without_standard_error_the_exit_code_tells(
    script: str, shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = command_of(script, "--model_dir", "nowhere", "--output_dir", "nowhere")
    done = subprocess.run(["sh", "-c", shell, *command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("flag", ["--help", "--learning-rat=3"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_faulty_settings_load_no_torch(script: str, flag: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['{script}.py', '{flag}']\n"
        f"try: runpy.run_path({str(ROOT / f'{script}.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: sys.exit(repr((end.code, 'torch' in sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == repr((0 if flag == "--help" else 2, False))
