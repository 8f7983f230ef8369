"""Load on a running server: `python benchmarks/serve_load.py --url http://127.0.0.1:8000 --pairs FILE`.

Closed loop (each client asks, waits, asks again) at 1, 4, 16 and 64 clients, then open loop (requests arrive
at a fixed rate whatever the answers do). The load comes from a process of its own, and latency is counted
from when a request was due, not from when it could be sent. FILE: index, sentence1, sentence2, … with a
header. Where wrk is installed its figures come too (`--timeout 60s`: it drops what takes longer than its
default of 2 s).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

PATH = "/v1/model_prediction/"
WRK = """\
local bodies, n, i = {}, 0, 0
for line in io.lines(os.getenv("BODIES")) do n = n + 1; bodies[n] = line end
function request()
  i = i % n + 1
  return wrk.format("POST", nil, {["Content-Type"] = "application/json"}, bodies[i])
end
function done(summary, latency)
  local e = summary.errors
  local form = '{"requests_per_s": %.2f, "p50_ms": %.1f, "p95_ms": %.1f, "p99_ms": %.1f, "errors": %d}\\n'
  io.write(string.format(form,
    summary.requests / (summary.duration / 1e6), latency:percentile(50) / 1e3, latency:percentile(95) / 1e3,
    latency:percentile(99) / 1e3, e.connect + e.read + e.write + e.timeout + e.status))
end
"""


@dataclass
class Seen:
    """Latencies of the good answers (seconds), and how often what else happened."""

    seconds: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    lasted: float = 0  # seconds of a closed loop, to its last answer

    def describe(self, name: str, duration: float) -> dict[str, object]:
        found = sorted(self.seconds)

        def at(part: float) -> float | None:
            return round(1000 * found[min(len(found) - 1, int(part * len(found)))], 1) if found else None

        rate = round(len(found) / duration, 2)
        figures = {"requests_per_s": rate, "p50_ms": at(0.5), "p95_ms": at(0.95), "p99_ms": at(0.99)}
        return {"load": name, **figures, "max_ms": at(1), **dict(sorted(self.kinds.items()))}


class Client:
    """One kept connection."""

    def __init__(self, host: str, port: int, key: str | None) -> None:
        self.host, self.port = host, port
        self.head = f"POST {PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        self.head += f"Authorization: Bearer {key}\r\n" if key else ""
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> int:
        """The status of the answer, once all of it is there."""
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.host, self.port)
        reader, writer = self.streams
        writer.write(f"{self.head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        await reader.readexactly(length)
        if "connection: close" in head:
            self.close()
        return int(head.split(" ", 2)[1])

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


async def timed(client: Client, body: bytes, due: float, seen: Seen) -> None:
    """One request; what became of it goes into `seen`."""
    try:
        status = await asyncio.wait_for(client.ask(body), 60)
    except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
        seen.kinds[type(error).__name__] += 1
        client.close()
        return
    seen.kinds[str(status)] += 1
    if status == 200:
        seen.seconds.append(time.perf_counter() - due)


async def closed_loop(
    make: object, bodies: list[bytes], clients: int, duration: float, back_off: bool
) -> Seen:
    assert callable(make)
    seen = Seen()
    began = time.perf_counter()
    end = began + duration

    async def loop(number: int) -> None:
        client, at = make(), number
        while time.perf_counter() < end:
            before = seen.kinds["429"]
            await timed(client, bodies[at % len(bodies)], time.perf_counter(), seen)
            at += clients
            if back_off and seen.kinds["429"] > before:
                await asyncio.sleep(0.05)
        client.close()

    await asyncio.gather(*(loop(number) for number in range(clients)))
    seen.lasted = time.perf_counter() - began
    return seen


async def open_loop(make: object, bodies: list[bytes], rate: float, duration: float) -> Seen:
    assert callable(make)
    seen, free, tasks = Seen(), list[Client](), set[asyncio.Task[None]]()
    start = time.perf_counter()

    async def one(number: int, due: float) -> None:
        client = free.pop() if free else make()
        await timed(client, bodies[number % len(bodies)], due, seen)
        free.append(client)

    for number in range(int(rate * duration)):
        due = start + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(one(number, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    for client in free:
        client.close()
    return seen


def run_load(
    url: str, key: str | None, bodies: list[bytes], kind: str, amount: float, duration: float
) -> Seen:
    """In a process of its own, so that the load's Python does not share a core's time slice with ours."""
    parts = urlsplit(url)

    def make() -> Client:
        return Client(parts.hostname or "127.0.0.1", parts.port or 80, key)

    if kind == "closed":
        return asyncio.run(closed_loop(make, bodies, int(amount), duration, back_off=False))
    return asyncio.run(open_loop(make, bodies, amount, duration))


def in_process(*arguments: object) -> Seen:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run_load, arguments)  # type: ignore[arg-type]


def read_bodies(path: str) -> list[bytes]:
    rows = [line.rstrip("\n").split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines()[1:]]
    return [json.dumps({"sentence1": row[1], "sentence2": row[2]}).encode() for row in rows]


def run_wrk(url: str, bodies: list[bytes], clients: int, duration: float) -> dict[str, object] | None:
    """wrk's figures, None where it is not installed."""
    if shutil.which("wrk") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        script, lines = Path(folder, "load.lua"), Path(folder, "bodies")
        script.write_text(WRK, encoding="utf-8")
        lines.write_bytes(b"\n".join(bodies) + b"\n")
        command = ["wrk", "-t1", f"-c{clients}", f"-d{duration:g}s", "--timeout", "60s", "--latency"]
        command += ["-s", str(script), url + PATH]
        environment = {**os.environ, "BODIES": str(lines)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"load": f"wrk, {clients} clients", **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--key")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--runs", type=int, default=1, help="of each closed loop; the median is shown")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="requests/s of the open loop")
    arguments = parser.parse_args()
    bodies = read_bodies(arguments.pairs)
    common = (arguments.url, arguments.key, bodies)
    in_process(*common, "closed", 1, 2.0)
    for clients in arguments.clients:
        turns = [in_process(*common, "closed", clients, arguments.seconds) for _ in range(arguments.runs)]
        rows = [seen.describe(f"closed loop, {clients} clients", seen.lasted) for seen in turns]
        rows.sort(key=lambda row: row["requests_per_s"])  # type: ignore[arg-type,return-value]
        print(json.dumps(rows[len(rows) // 2]), flush=True)
        if found := run_wrk(arguments.url, bodies, clients, arguments.seconds):
            print(json.dumps(found), flush=True)
    for rate in arguments.rates:
        seen = in_process(*common, "open", rate, arguments.seconds)
        print(json.dumps(seen.describe(f"open loop, {rate:g}/s", arguments.seconds)), flush=True)
    print(json.dumps({"rows": len(bodies), "median_bytes": statistics.median(map(len, bodies))}))


if __name__ == "__main__":
    main()
