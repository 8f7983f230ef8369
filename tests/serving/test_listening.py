"""Where a server listens: one server a port, and a Unix socket that always has somebody behind it."""

import errno
import json
import signal
import socket
import stat
import time
from pathlib import Path

import pytest
from conftest import write_hf_folder
from live_server import make_config
from server_process import Process

from bertpair.errors import ConfigError
from bertpair.serving.listening import bind
from bertpair.settings.serve import ServeConfig, parse_serve_command_line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_folder(tmp_path_factory.mktemp("served") / "hf-tiny")


def at(path: Path) -> ServeConfig:
    return make_config({"uds": str(path)})


def say(path: Path, data: bytes, timeout: float = 10) -> bytes:
    """What comes back from the socket, up to its end."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(timeout)
        line.connect(str(path))
        line.sendall(data)
        return b"".join(iter(lambda: line.recv(65536), b""))


def is_ready(path: Path) -> bool:
    return say(path, b"GET /readyz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_socket_whose_server_is_too_busy_to_take_a_client_is_not_taken_for_stale(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(0)
        waiting = []
        while True:
            waiting.append(socket.socket(socket.AF_UNIX))
            waiting[-1].setblocking(False)
            if waiting[-1].connect_ex(str(path)) == errno.EAGAIN:
                break
        with pytest.raises(ConfigError, match="in use"):
            bind(at(path))
        assert path.is_socket()
        for client in waiting:
            client.close()


# Ports


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "given"),
    [("::", "127.0.0.1"), ("127.0.0.1", "::ffff:127.0.0.1"), ("::", "10.1.2.3, 127.0.0.0/8")],
)
def test_a_proxy_is_known_by_its_ipv4_address_on_both_kinds_of_socket(
    tmp_path: Path, host: str, given: str
) -> None:
    flags = ["--model_dir", str(write_hf_folder(tmp_path / "hf-tiny")), "--port", "0", "--host", host]
    with Process(*flags, "--forwarded_allow_ips", given) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
            line.sendall(b"GET /livez HTTP/1.0\r\nX-Forwarded-For: 192.0.2.7, ::ffff:127.0.0.1\r\n\r\n")
            assert line.recv(100).startswith(b"HTTP/1.1 200")
        end = time.monotonic() + 20
        while not server.access:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert json.loads(server.access[0])["client"] == "192.0.2.7"


def test_a_port_is_taken_from_the_moment_it_is_bound() -> None:
    """Also right after a server that went with clients connected to it, and for one with SO_REUSEADDR."""
    first = bind(make_config({"port": 0}))
    port = first.socket.getsockname()[1]
    for number in range(2):
        for is_listening in (False, True):
            if is_listening:
                first.listen()
            with pytest.raises(ConfigError, match=f"^port: 127.0.0.1:{port} is in use by another program$"):
                bind(make_config({"port": port}))
            with socket.socket() as foreign, pytest.raises(OSError):
                foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                foreign.bind(("127.0.0.1", port))
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = first.socket.accept()
            accepted.close()  # the server closes first: its end waits, as TIME_WAIT
        first.close()
        if number == 0:
            first = bind(make_config({"port": port}))


@pytest.mark.slow
def test_of_two_starts_on_one_port_the_second_ends_in_one_line(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = ["--model_dir", str(folder), "--port", port, "--drain_seconds", "0"]
    with Process(*flags) as one, Process(*flags) as other:
        codes = {}
        while not codes:
            codes = {server: server.process.poll() for server in (one, other) if server.process.poll()}
        ((loser, code),) = codes.items()
        loser.wait()
        assert code == 2 and loser.said == [f"error: port: 127.0.0.1:{port} is in use by another program"]
        winner = one if loser is other else other
        winner.wait_for("^ready")
        winner.process.send_signal(signal.SIGTERM)
        assert winner.wait() == 0


# Unix sockets


def test_a_path_belongs_to_one_server_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = bind(at(path))
    with pytest.raises(ConfigError, match="in use"):  # it loads, and does not listen yet
        bind(at(path))
    assert not path.exists()
    first.listen()
    assert stat.S_ISSOCK(path.stat().st_mode)
    with pytest.raises(ConfigError, match="in use"):
        bind(at(path))
    first.close()
    assert [found.name for found in tmp_path.iterdir()] == ["s.lock"]


def test_an_old_server_leaves_a_new_ones_socket_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    old = bind(at(path))
    old.listen()
    old.hand_over()
    new = bind(at(path))
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(path))
        old.socket.accept()[0].close()  # until the new one listens, the old one answers
    new.listen()
    old.refuse()
    old.close()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(path))
        new.socket.accept()[0].close()
    new.close()
    assert not path.exists()


def test_a_new_server_that_fails_leaves_the_old_one_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    old = bind(at(path))
    old.listen()
    old.hand_over()
    bind(at(path)).close()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(path))
    old.refuse()
    assert not path.exists()
    old.close()


def test_what_others_put_at_the_path_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("a file of somebody's")
    with pytest.raises(ConfigError, match="what stands there is no socket"):
        bind(at(path))
    assert path.read_text() == "a file of somebody's"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(path))
        foreign.listen()
        with pytest.raises(ConfigError, match="in use by another program"):
            bind(at(path))
    late = bind(at(tmp_path / "t"))
    (tmp_path / "t").write_text("put there while the model was loaded")
    with pytest.raises(ConfigError, match="what stands there is no socket"):
        late.listen()
    late.close()
    assert (tmp_path / "t").exists()
    with pytest.raises(ConfigError, match="No such file"):
        bind(at(tmp_path / "nowhere" / "s"))


@pytest.mark.slow
def test_a_killed_servers_socket_is_replaced(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    flags = ["--model_dir", str(folder), "--uds", str(path), "--drain_seconds", "0"]
    with Process(*flags, "--uds_mode", "600") as killed:
        killed.wait_for("^ready")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and is_ready(path)
        killed.process.kill()
        killed.wait()
    assert path.exists()
    with Process(*flags) as server:
        server.wait_for("^ready")
        assert stat.S_IMODE(path.stat().st_mode) == 0o660 and is_ready(path)


@pytest.mark.slow
def test_a_restart_over_a_unix_socket_loses_nobody(folder: Path, tmp_path: Path) -> None:
    """The new server is started while the old one drains; each ask finds one that answers."""
    path = tmp_path / "s"
    flags = ["--model_dir", str(folder), "--uds", str(path)]
    with Process(*flags, "--drain_seconds", "30") as old:
        old.wait_for("^ready")
        old.process.send_signal(signal.SIGTERM)
        old.wait_for("draining")
        with Process(*flags, "--drain_seconds", "0") as new:
            while not any(line.startswith("ready") for line in new.said):
                assert b'"live"' in say(path, b"GET /livez HTTP/1.0\r\n\r\n")
            assert is_ready(path)
            old.process.send_signal(signal.SIGTERM)
            old.wait()
            assert is_ready(path) and new.process.poll() is None
            new.process.send_signal(signal.SIGTERM)
            assert new.wait() == 0 and not path.exists()


def test_the_mode_is_octal_text(tmp_path: Path) -> None:
    assert make_config({"uds": "s", "uds_mode": "0600"}).uds_mode == "0600"
    for wrong in ("678", "1777", "rw", "60", ""):
        with pytest.raises(ConfigError, match="octal digits in quotes"):
            make_config({"uds": "s", "uds_mode": wrong})
    with pytest.raises(ConfigError, match="uds_mode 600 is given without uds"):
        make_config({"uds_mode": "600"})
    file = tmp_path / "my.yaml"
    for unquoted in ("0660", "660", "0o660"):  # for PyYAML: 432, 660 and text
        file.write_text(f"model_dir: x\nuds: s\nuds_mode: {unquoted}\n")
        with pytest.raises(ConfigError, match="my.yaml:3: .*quote"):
            parse_serve_command_line(["--config", str(file)])
    file.write_text("model_dir: x\nuds: s\nuds_mode: '640'\n")
    assert parse_serve_command_line(["--config", str(file)])[0].uds_mode == "640"
