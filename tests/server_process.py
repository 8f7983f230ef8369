"""serve.py as a process of its own, and the plainest client."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent


class Process:
    """serve.py as a user starts it; what it says on standard error, line by line. `stdout`: who gets that."""

    def __init__(self, *flags: str, stdout: int = subprocess.PIPE, **variables: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
        command = [sys.executable, str(ROOT / "serve.py"), *flags]
        self.process = subprocess.Popen(
            command, stdout=stdout, stderr=subprocess.PIPE, env=environment, text=True, cwd=ROOT
        )
        self.said: list[str] = []
        self.access: list[str] = []
        self.reader = threading.Thread(target=collect, args=(self.process.stderr, self.said))
        self.reader.start()
        self.drainer = threading.Thread(target=collect, args=(self.process.stdout, self.access))
        self.drainer.start()

    def wait_for(self, pattern: str, within: float = 60) -> re.Match[str]:
        end = time.monotonic() + within
        while time.monotonic() < end:
            for line in list(self.said):
                if found := re.search(pattern, line):
                    return found
            assert self.process.poll() is None or self.reader.is_alive(), self.said
            time.sleep(0.02)
        raise AssertionError(f"{pattern} was not said: {self.said}")

    def wait(self, within: float = 60) -> int:
        code = self.process.wait(within)
        self.reader.join(5)
        self.drainer.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code

    @property
    def port(self) -> int:
        """Once it is ready."""
        self.wait_for("^ready")
        return int(self.wait_for(r"listening on http://\S+:(\d+)$")[1])

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *args: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.wait()


def collect(stream: IO[str] | None, lines: list[str]) -> None:
    for line in stream or ():
        lines.append(line.rstrip("\n"))


def ask(port: int, path: str, body: object = None) -> tuple[int, bytes]:
    data = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(
            f"{method} {path} HTTP/1.0\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    return int(answer.split(b" ", 2)[1]), answer
