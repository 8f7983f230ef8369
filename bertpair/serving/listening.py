"""Where a server listens, and for whom: its socket, its key, the Host names it answers to.

A listener is bound before the model is loaded, so that a place that is taken is known at once, and listens
when the model is there, so that a load balancer is refused at once until then.
"""

import contextlib
import ctypes
import errno
import fcntl
import ipaddress
import os
import resource
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from bertpair.errors import ConfigError
from bertpair.settings.serve import ServeConfig

SPARE_DESCRIPTORS = 64  # besides connections: files, the event loop's own, libraries
BACKLOG = 2048
_SO_ATTACH_FILTER = 26
# Classic BPF over a TCP header: load the flags (byte 13); if SYN is among them keep nothing, else everything.
_DROP_SYN = struct.pack("HBBI" * 4, 0x30, 0, 0, 13, 0x45, 1, 0, 0x02, 0x06, 0, 0, 0xFFFFFFFF, 0x06, 0, 0, 0)


def check_descriptors(max_connections: int) -> None:
    """Raise the soft limit of open files to what `max_connections` needs; ConfigError if that cannot be."""
    needed = max_connections + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"max_connections {max_connections}: this process may open {hard} files, and that many "
            f"connections need {needed}; raise the limit (ulimit -n) or lower max_connections"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def read_key(path: str, most: int = 4096) -> bytes:
    """The key in the first line of a file; at most `most` bytes, for which a request must have room."""
    try:
        key = Path(path).read_bytes().partition(b"\n")[0].strip()
    except OSError as error:
        raise ConfigError(f"api_key_file: {path} cannot be read: {error.strerror}") from error
    if not 8 <= len(key) <= most or not all(33 <= byte <= 126 for byte in key):
        expected = f"8 or more printable ASCII characters, at most {most}, no spaces"
        raise ConfigError(f"api_key_file: {path}: expected {expected}")
    return key


def trusted_proxies(given: str) -> str:
    """Comma-separated addresses and networks, each IPv4 one also as `::` sees it, and back."""
    found = [item.strip() for item in given.split(",")]
    for network in [ipaddress.ip_network(item) for item in found if item not in ("", "*")]:
        if isinstance(network, ipaddress.IPv4Network):
            found.append(f"::ffff:{network.network_address}/{96 + network.prefixlen}")
        elif (inner := network.network_address.ipv4_mapped) and network.prefixlen >= 96:
            found.append(f"{inner}/{network.prefixlen - 96}")
    return ",".join(found)


def is_local(config: ServeConfig) -> bool:
    """Whether only this machine can reach the server."""
    if config.uds or config.host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(config.host).is_loopback
    return False


def allowed_hosts(config: ServeConfig) -> frozenset[str] | None:
    """The Host names that are answered, None for any.

    On a loopback address only local ones by default: a page in a browser on this machine could otherwise
    reach the server under a name of its own that resolves to it.
    """
    if config.allowed_hosts is not None:
        return None if "*" in config.allowed_hosts else frozenset(map(str.lower, config.allowed_hosts))
    if config.uds or not is_local(config):
        return None
    return frozenset({"localhost", "127.0.0.1", "[::1]", config.host.lower(), f"[{config.host.lower()}]"})


def bind(config: ServeConfig) -> "Listener":
    """Its place, taken and not listening yet; ConfigError if it is somebody else's."""
    if config.uds:
        return UnixListener(config.uds, int(config.uds_mode or "660", 8))
    return TcpListener(config.host, config.port)


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    """An OSError in it as a ConfigError that says what is wrong with the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EAGAIN):
            raise ConfigError(f"{place} is in use by another program") from error
        raise ConfigError(f"{place} cannot be used: {error.strerror or error}") from error


class TcpListener:
    """A port. SO_REUSEADDR lets two programs bind it while neither listens, so it is set only while needed:
    to bind beside connections of a server that has gone, and then for the connections taken here.
    """

    def __init__(self, host: str, port: int) -> None:
        self.place = f"port: {host}:{port}"
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, number, _, address = found[0]
            self.socket = socket.socket(family, kind, number)
        except UnicodeError as error:
            raise ConfigError(f"host {host}: no host has such a name") from error
        except OSError as error:
            raise ConfigError(f"host {host}: {error.strerror or error}") from error
        with _explained(self.place), contextlib.ExitStack() as undo:
            undo.callback(self.socket.close)
            try:
                self.socket.bind(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                self._set_reuse(True)
                self.socket.bind(address)
                self._set_reuse(False)
            undo.pop_all()

    def __str__(self) -> str:
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _set_reuse(self, is_on: bool) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, is_on)

    def listen(self) -> None:
        with _explained(self.place):
            self._set_reuse(True)
            self.socket.listen(BACKLOG)

    def hand_over(self) -> None:
        """A port has one server at a time."""

    def refuse(self) -> None:
        """Let no new client begin; one whose connection is under way still gets in, and can be accepted."""
        # Closing the listener would reset those. Linux alone has a way: drop what asks for a new connection.
        with contextlib.suppress(OSError):
            program = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
            filter = struct.pack("HP", len(_DROP_SYN) // 8, ctypes.addressof(program))
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter)

    def close(self) -> None:
        self.socket.close()


class UnixListener:
    """A Unix socket that stands at its path only while somebody listens on it.

    Whoever holds the flock on `<path>.lock` owns the path: a server from its start until it drains. From then
    on a new one may load, and takes the path over in one rename once it listens. The lock file names the
    socket of the server that wrote it, so that no other program's is taken over.
    """

    def __init__(self, path: str, mode: int) -> None:
        self.path, self.new_path, self.identity = path, path + ".new", b""
        self.socket, self.lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), -1
        with _explained(f"uds: {path}"), contextlib.ExitStack() as undo:
            undo.callback(self.socket.close)
            undo.callback(self.hand_over)
            self._acquire()
            self._check_free()
            Path(self.new_path).unlink(missing_ok=True)  # a crash's
            self.socket.bind(self.new_path)
            os.chmod(self.new_path, mode)
            undo.pop_all()

    def __str__(self) -> str:
        return self.path

    def listen(self) -> None:
        """ConfigError if another program has put something at the path in the meantime."""
        with _explained(f"uds: {self.path}"):
            self._check_free()
            self.socket.listen(BACKLOG)
            self.identity = _identity(self.new_path)
            os.ftruncate(self.lock, 0)
            os.pwrite(self.lock, self.identity, 0)
            os.rename(self.new_path, self.path)

    def hand_over(self) -> None:
        """Let a new server have the path as soon as it listens; until then clients find this one."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def refuse(self) -> None:
        """Let no new client begin: take the socket away, unless the path belongs to a new server."""
        with contextlib.suppress(OSError):
            self._acquire()
            Path(self.new_path).unlink(missing_ok=True)
            if _identity(self.path) == self.identity:
                Path(self.path).unlink(missing_ok=True)
        self.hand_over()

    def close(self) -> None:
        self.refuse()
        self.socket.close()

    def _acquire(self) -> None:
        """OSError if another server holds the lock; never waits."""
        if self.lock < 0:
            self.lock = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _check_free(self) -> None:
        """OSError if a file stands at the path, or the socket of a listening program that is not ours."""
        found = _identity(self.path)
        if not found or found == os.pread(self.lock, 100, 0):
            return
        if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
            raise OSError(errno.EEXIST, "what stands there is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            if probe.connect_ex(self.path) != errno.ECONNREFUSED:
                raise OSError(errno.EADDRINUSE, "in use")


def _identity(path: str) -> bytes:
    """Which file stands there; nothing if none does."""
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        return f"{found.st_dev} {found.st_ino}".encode()
    return b""


Listener = TcpListener | UnixListener
