"""Where a server listens, and for whom: its socket, its key, the Host names it answers to."""

from __future__ import annotations

import errno
import ipaddress
import os
import resource
import socket
import stat
from pathlib import Path

from bertpair.errors import ConfigError
from bertpair.serve_config import ServeConfig

SPARE_DESCRIPTORS = 64  # besides connections: files, the event loop's own, libraries


def check_descriptors(max_connections: int) -> None:
    """Raise the soft limit of open files to what `max_connections` needs; ConfigError if that cannot be."""
    needed = max_connections + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ConfigError(
                f"max_connections {max_connections}: this process may open {hard} files, and that many "
                f"connections need {needed}; raise the limit (ulimit -n) or lower max_connections"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def read_key(path: str) -> bytes:
    """The key in the first line of a file."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"api_key_file: {path} cannot be read: {error.strerror}") from error
    key = lines[0].strip() if lines else b""
    if len(key) < 8 or not all(33 <= byte <= 126 for byte in key):
        raise ConfigError(f"api_key_file: {path}: expected 8 or more printable ASCII characters, no spaces")
    return key


def bind(config: ServeConfig) -> socket.socket:
    """A socket that is bound and does not listen yet; ConfigError if its place is taken or not ours."""
    if config.uds:
        return _bind_unix(config.uds)
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, number, _, address = found[0]
        bound = socket.socket(family, kind, number)
    except OSError as error:
        raise ConfigError(f"host {config.host}: {error.strerror or error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        place = f"{config.host}:{config.port}"
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port: {place} is in use by another program") from error
        raise ConfigError(f"port: {place} cannot be bound: {error.strerror}") from error
    return bound


def _bind_unix(path: str) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            os.unlink(path)
        bound.bind(path)
        os.chmod(path, 0o660)
    except OSError as error:
        bound.close()
        reason = "in use by another program" if error.errno == errno.EADDRINUSE else error.strerror or error
        raise ConfigError(f"uds: {path}: {reason}") from error
    return bound


def _is_stale(path: str) -> bool:
    """Whether a socket stands there that nobody listens on."""
    if not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def is_local(config: ServeConfig) -> bool:
    """Whether only this machine can reach the server."""
    if config.uds or config.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(config.host).is_loopback
    except ValueError:
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
