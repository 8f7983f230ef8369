"""Two machines, as far as a network can tell: namespaces with addresses of their own and a cable between."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torchrun


def ip(*words: str) -> bool:
    """Whether that went well."""
    try:
        return subprocess.run(["ip", *words], capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]


@dataclass(frozen=True)
class Host:
    """A namespace, the end of the cable in it, and its address."""

    name: str
    device: str
    address: str

    def start(
        self, node_rank: int, master: str, settings: Mapping[str, object], **variables: str
    ) -> torchrun.Worker:
        """torchrun with the one process of this host."""
        meet = ["--master_addr", master, "--master_port", "29400"]
        options = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node_rank), *meet]
        command = ["ip", "netns", "exec", self.name, *torchrun.line(options, settings)]
        said = Path(f"said-{self.name}-{time.monotonic_ns()}")
        return torchrun.Worker(command, said, variables)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two of them, joined; skips where the system does not make namespaces for us."""
    pid = os.getpid()
    one, two = (Host(f"host{k}-{pid}", f"c{k}-{pid}", f"10.91.0.{k}") for k in (1, 2))
    if not ip("netns", "add", one.name):
        pytest.skip("takes root and network namespaces")
    try:
        assert ip("netns", "add", two.name)
        ends = [["netns", one.name, "type", "veth"], ["peer", "name", two.device, "netns", two.name]]
        if not ip("link", "add", one.device, *ends[0], *ends[1]):
            pytest.skip("takes veth devices")
        for host in (one, two):
            assert ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.device)
            for device in ("lo", host.device):
                assert ip("-n", host.name, "link", "set", device, "up")
        yield one, two
    finally:
        for host in (one, two):
            ip("netns", "delete", host.name)


def test_two_hosts_train_like_two_processes_and_go_on_after_the_link_was_down(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """The link goes down after step 17, in the middle of a run that two processes of one host do whole."""
    settings = {**torchrun.write_task(tmp_path), **torchrun.SAVES, "ddp_timeout": 10}
    torchrun.train(2, {**settings, "output_dir": "whole"})
    break_off(hosts, settings)
    assert not Path("out/model.safetensors").exists()
    run_on(hosts, settings)
    torchrun.assert_same_end(Path("whole"), Path("out"))


def run_on(hosts: tuple[Host, Host], settings: Mapping[str, object]) -> None:
    with ExitStack() as stack:
        workers = [host.start(k, hosts[0].address, settings) for k, host in enumerate(hosts)]
        for worker in workers:
            stack.enter_context(worker)
        assert torchrun.finish(workers) == [0, 0], [worker.said for worker in workers]


def break_off(hosts: tuple[Host, Host], settings: Mapping[str, object]) -> None:
    """Process 0 stands still at step 17 while the link goes down; both ends then say so, and end."""
    told = {"HAPPENS": "0:17:SIGSTOP", "STEPS": "steps-"}
    with ExitStack() as stack:
        workers = [host.start(k, hosts[0].address, settings, **told) for k, host in enumerate(hosts)]
        for worker in workers:
            stack.enter_context(worker)
        stopped = wait_for_step(17, Path("steps-0"), workers)
        assert ip("-n", hosts[0].name, "link", "set", hosts[0].device, "down")
        os.kill(stopped, signal.SIGCONT)
        codes = torchrun.finish(workers)
        said = [worker.said for worker in workers]
    assert 0 not in codes, said
    assert "error: another process of this run has ended, or does not answer" in said[0]
    assert "process 1: error: another process of this run has ended, or does not answer" in said[1]
    assert ip("-n", hosts[0].name, "link", "set", hosts[0].device, "up")


def wait_for_step(step: int, path: Path, workers: list[torchrun.Worker]) -> int:
    """The process that is at this step."""
    end = time.monotonic() + torchrun.WITHIN
    while time.monotonic() < end:
        if path.exists() and (told := [each for each in torchrun.records(path) if each["step"] == step]):
            return int(told[0]["pid"])
        time.sleep(0.05)
    raise AssertionError([worker.said for worker in workers])
