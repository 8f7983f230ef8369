"""The machine under a run: what it resolves to, what is refused, and the state a resume needs."""

import contextlib
import os
import platform
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpair import runtime
from bertpair.console import StopFlag
from bertpair.errors import ConfigError, StoppedError
from bertpair.runtime import (
    LossScaler,
    Precision,
    cpu_bf16_flag,
    keep_freed_memory,
    random_state,
    resolve_device,
    resolve_precision,
    restore_random_state,
    seed_everything,
    set_deterministic,
    set_threads,
    usable_cores,
)

CPU = torch.device("cpu")


def test_stop_flag_raises_only_once_requested() -> None:
    flag = StopFlag()
    flag.raise_if_set()
    assert not flag and flag.signum is None
    flag.request(signal.SIGTERM)
    assert flag and flag.signum == signal.SIGTERM
    with pytest.raises(StoppedError) as caught:
        flag.raise_if_set()
    assert caught.value.signum == signal.SIGTERM
    flag.clear()
    flag.raise_if_set()


SIGNAL_PROGRAM = """
import time
from bertpair.console import install_signal_handlers, stop_flag
install_signal_handlers()
print("ready", flush=True)
while not stop_flag:
    time.sleep(0.01)
print("flag", stop_flag.signum, flush=True)
input()
"""


def signal_program() -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNAL_PROGRAM], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["SIGINT SIGTERM", "SIGTERM SIGINT"])
def test_first_signal_sets_the_flag_and_the_second_kills(pair: str) -> None:
    first, second = (signal.Signals[name] for name in pair.split())
    with signal_program() as process:
        process.send_signal(first)
        assert process.stdout is not None
        assert process.stdout.readline() == f"flag {first.value}\n"
        process.send_signal(second)
        assert process.wait(timeout=10) == -second.value


@pytest.mark.slow
def test_one_signal_lets_the_program_finish() -> None:
    with signal_program() as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate("go on\n", timeout=10)
        assert out == f"flag {signal.SIGTERM.value}\n" and process.returncode == 0


def pretend_devices(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    "cuda, mps, name, expected",
    [
        (0, False, "auto", "cpu"),
        (2, False, "auto", "cuda:0"),
        (0, True, "auto", "mps"),
        (2, False, "cpu", "cpu"),
        (2, False, "cuda", "cuda:0"),
        (2, False, "cuda:1", "cuda:1"),
        (0, True, "mps", "mps"),
    ],
)
def test_device_names_resolve(
    monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool, name: str, expected: str
) -> None:
    pretend_devices(monkeypatch, cuda, mps)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    "cuda, name, words",
    [
        (0, "cuda", ["no cuda", "there is: cpu"]),
        (2, "cuda:2", ["no cuda:2", "cuda:0, cuda:1, cpu"]),
        (0, "mps", ["no mps", "there is: cpu"]),
        (2, "gpu", ["'gpu'", "auto, cpu, cuda, cuda:N, mps"]),
        (2, "cuda:x", ["'cuda:x'"]),
        (2, "", ["''"]),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_what_is(
    monkeypatch: pytest.MonkeyPatch, cuda: int, name: str, words: list[str]
) -> None:
    pretend_devices(monkeypatch, cuda)
    with pytest.raises(ConfigError) as caught:
        resolve_device(name)
    for word in words:
        assert word in str(caught.value)


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu,cpuacct"


def v1_quota(folder: str, quota: int, period: int) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    "groups, files, expected",
    [
        ("0::/\n", {f"{V2}/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {f"{V2}/cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {f"{V2}/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {f"{V2}/cpu.max": "1000 100000\n"}, 1),
        ("0::/a/b\n", {f"{V2}/a/cpu.max": "300000 100000", f"{V2}/a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b\n", {f"{V2}/a/cpu.max": "300000 100000", f"{V2}/a/b/cpu.max": "500000 100000"}, 3),
        ("0::/a/b\n", {f"{V2}/a/cpu.max": "500000 100000", f"{V2}/a/b/cpu.max": "300000 100000"}, 3),
        ("0::/../seen/from/outside\n", {f"{V2}/cpu.max": "400000 100000"}, 4),
        ("1:name=systemd:/\n0::/u\n", {f"{V2}/unified/u/cpu.max": "7 1"}, 7),
        ("0::/\n", {f"{V2}/cpu.max": "no numbers"}, 64),
        ("4:cpu,cpuacct:/docker/x\n0::/\n", v1_quota(V1, 500000, 100000), 5),
        ("4:cpu,cpuacct:/job\n", v1_quota(f"{V1}/job", 25000, 5000), 5),
        ("4:cpu,cpuacct:/\n", v1_quota(V1, -1, 100000), 64),
        ("4:cpuset:/\n1:cpu:/\n", v1_quota(f"{V2}/cpu", 6, 1), 6),
        ("4:memory:/\n", v1_quota(f"{V2}/memory", 1, 1), 64),
        ("", {}, 64),
    ],
)
def test_usable_cores_obey_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    write_files(tmp_path, {"proc/self/cgroup": groups, **files})
    assert usable_cores(tmp_path) == expected


def test_usable_cores_never_exceed_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    write_files(tmp_path, {"proc/self/cgroup": "0::/\n", V2 + "cpu.max": "900000 100000\n"})
    assert usable_cores(tmp_path) == 2


def test_set_threads_returns_what_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert set_threads(1) == 1 == torch.get_num_threads()
        torch.set_num_threads(2)
        monkeypatch.setattr(runtime, "usable_cores", lambda: 1)
        assert set_threads(None) == 1  # a quota cuts torch's own choice
        monkeypatch.setattr(runtime, "usable_cores", lambda: 64)
        assert set_threads(None) == 1  # and more cores do not raise it
        assert set_threads(2) == 2
    finally:
        torch.set_num_threads(before)


KEEP_PROGRAM = """
import torch
from bertpair.runtime import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1])

def kept_pages():
    before = resident()
    torch.zeros(16 * 2**20)  # 64 MiB, freed at once
    return resident() - before

print(kept_pages(), keep_freed_memory(), kept_pages())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_on_glibc() -> None:
    """In a process of its own: the setting cannot be taken back."""
    run = subprocess.run([sys.executable, "-c", KEEP_PROGRAM], capture_output=True, text=True, check=True)
    before, kept, after = run.stdout.split()
    assert kept == "True"
    pages = 32 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert int(before) < pages < int(after)


def test_keep_freed_memory_does_nothing_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(runtime.ctypes, "CDLL", missing)
    assert keep_freed_memory() is False


PEAK_PROGRAM = """
import torch
from bertpair.runtime import peak_memory_gb
cpu = torch.device("cpu")
before = peak_memory_gb(cpu)
torch.ones(10**8)
print(before, peak_memory_gb(cpu))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_peak_memory_remembers_what_was_freed() -> None:
    """In a process of its own, whose peak other tests have not raised."""
    run = subprocess.run([sys.executable, "-c", PEAK_PROGRAM], capture_output=True, text=True, check=True)
    before, after = map(float, run.stdout.split())
    assert before + 0.35 < after < before + 0.45


def test_seeds_repeat_all_three_generators() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(5)
    first = draw()
    assert draw() != first
    seed_everything(5)
    assert draw() == first
    seed_everything(2**32 + 5)  # numpy's generator takes no more than 32 bits


def test_random_state_comes_back() -> None:
    torch.manual_seed(3)
    torch.rand(7)
    state = random_state(CPU)
    expected = torch.nn.functional.dropout(torch.ones(100))
    assert set(state) == {"cpu"} and state["cpu"].dtype == torch.uint8
    torch.rand(50)
    restore_random_state({"cpu": state["cpu"].clone(), "cuda": torch.zeros(16, dtype=torch.uint8)}, CPU)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(100)), expected)


def test_deterministic_switch_goes_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.backends.cudnn.benchmark is False and torch.backends.cudnn.deterministic is True
    finally:
        set_deterministic(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic is False


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_precision_that_is_set_is_taken(monkeypatch: pytest.MonkeyPatch, amp: str) -> None:
    monkeypatch.setattr(runtime, "cpu_bf16_flag", lambda: None)
    assert resolve_precision(amp, CPU, hidden_size=8) == Precision(amp, "as set")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "flag, hidden_size, name, words",
    [
        (None, 1024, "off", ["no fast bf16 instructions"]),
        ("avx512_bf16", 255, "off", ["hidden_size 255"]),
        ("avx512_bf16", 256, "bf16", ["avx512_bf16", "hidden_size 256"]),
        ("amx_bf16", 768, "bf16", ["amx_bf16", "hidden_size 768"]),
        ("svebf16", 64, "off", ["hidden_size 64"]),
    ],
)
def test_auto_on_a_cpu_follows_the_processor_and_the_models_size(
    monkeypatch: pytest.MonkeyPatch, flag: str | None, hidden_size: int, name: str, words: list[str]
) -> None:
    monkeypatch.setattr(runtime, "cpu_bf16_flag", lambda: flag)
    found = {resolve_precision("auto", CPU, hidden_size=hidden_size) for _ in range(20)}
    (precision,) = found
    assert precision.name == name
    for word in words:
        assert word in precision.reason


@pytest.mark.parametrize("has_bf16, expected", [(True, "bf16"), (False, "fp16")])
def test_auto_on_cuda_follows_the_chip(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str
) -> None:
    pretend_chip(monkeypatch, has_bf16)
    device = torch.device("cuda", 0)
    assert resolve_precision("auto", device, hidden_size=8).name == expected
    assert resolve_precision("fp16", device, hidden_size=768).name == "fp16"
    assert resolve_precision("off", device, hidden_size=768).name == "off"


def pretend_chip(monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)


@pytest.mark.parametrize(
    "amp, device, words",
    [
        ("fp16", "cpu", ["fp16", "cpu", "auto, off, bf16"]),
        ("bf16", "mps", ["bf16", "mps", "auto, off"]),
        ("bf16", "cuda:0", ["bf16", "cuda:0", "auto, off, fp16"]),
        ("half", "cpu", ["'half'", "auto, off, bf16, fp16"]),
    ],
)
def test_a_precision_the_device_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, amp: str, device: str, words: list[str]
) -> None:
    pretend_chip(monkeypatch, False)
    with pytest.raises(ConfigError) as caught:
        resolve_precision(amp, torch.device(device), hidden_size=768)
    for word in words:
        assert word in str(caught.value)


def test_auto_is_off_on_mps() -> None:
    assert resolve_precision("auto", torch.device("mps"), hidden_size=8).name == "off"


@pytest.mark.parametrize(
    "cpuinfo, expected",
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", "avx512_bf16"),
        ("processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16\n", "amx_bf16"),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16\n", "avx512_bf16"),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16\n", "amx_bf16"),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16\n", None),
        ("Features\t: fp asimd bf16 i8mm\n", "bf16"),
        ("flags\t\t: fpu avx512f avx512_vnni\nmodel name\t: bf16\n", None),
        ("Features\t: fp asimd ebf16x\n", None),
        ("", None),
    ],
)
def test_fast_bf16_is_found_in_cpuinfo(tmp_path: Path, cpuinfo: str, expected: str | None) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert cpu_bf16_flag(path) == expected


def test_no_cpuinfo_means_no_bf16(tmp_path: Path) -> None:
    assert cpu_bf16_flag(tmp_path / "absent") is None


@pytest.mark.parametrize("name, dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_products_in_the_named_type(name: str, dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(4, 4)
    with Precision(name, "test").autocast(CPU):  # type: ignore[arg-type]
        assert layer(torch.ones(2, 4)).dtype == dtype
    assert layer(torch.ones(2, 4)).dtype == torch.float32


def torch_scaler(growth_interval: int) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", growth_interval=growth_interval)
    scaler.scale(torch.ones(()))  # makes its lazy tensors
    return scaler


def update_like_torch(scaler: torch.amp.GradScaler, found_inf: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), torch.inf if found_inf else 1.0)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler.step(optimizer)
    scaler.update()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 7), st.integers(0, 60))
def test_loss_scaler_equals_torch(found: list[bool], growth_interval: int, break_at: int) -> None:
    """Also across a save and restore, of ours and of torch's, at `break_at`."""
    ours, theirs = LossScaler(True, CPU, growth_interval), torch_scaler(growth_interval)
    for step, found_inf in enumerate(found):
        if step == break_at:
            state = ours.state_dict()
            assert state["scale"] == theirs.state_dict()["scale"]
            assert state["growth_tracker"] == theirs.state_dict()["_growth_tracker"]
            ours = LossScaler(True, CPU, growth_interval)
            ours.load_state_dict(state)
        update_like_torch(theirs, found_inf)
        theirs._scale.clamp_(min=1.0)  # ours has a floor
        ours.update(torch.tensor(float(found_inf)))
        assert ours.scale.item() == theirs.get_scale()
        assert ours.growth_tracker.item() == theirs.state_dict()["_growth_tracker"]


def test_loss_scaler_does_not_grow_past_float32() -> None:
    ours, theirs = LossScaler(True, CPU, 1), torch_scaler(1)
    for _ in range(130):
        ours.update(torch.zeros(1))
        update_like_torch(theirs, False)
    assert ours.scale.item() == theirs.get_scale() == 2.0**127


def test_loss_scaler_keeps_torch_defaults() -> None:
    ours, theirs = LossScaler(True, CPU), torch_scaler(2000)
    assert ours.scale.item() == theirs.get_scale() == torch.amp.GradScaler("cpu").get_scale()
    assert ours.growth_interval == torch.amp.GradScaler("cpu").get_growth_interval()


def test_loss_scaler_changes_in_place() -> None:
    ours = LossScaler(True, CPU)
    scale = ours.scale
    ours.update(torch.ones(()))
    assert scale.item() == 32768.0 and ours.scale is scale


def test_disabled_loss_scaler_stays_at_one() -> None:
    ours = LossScaler(False, CPU)
    ours.update(torch.ones(()))
    ours.load_state_dict({"scale": 4.0, "growth_tracker": 3})
    assert ours.scale.item() == 1.0 and ours.growth_tracker.item() == 0
