"""Chaos against a server of its own: `python benchmarks/serve_chaos.py --model_dir output`.

Starts serve.py in fp32 on a free port and sends a mixture: good requests, bad ones, too large ones, clients
that leave before, during and after the body, and slow sockets. Then: one good request answers; every good
answer equals the offline prediction for its own text within 1e-5; memory has not grown by more than 32 MB
since 10 % of the requests; threads and descriptors after five idle seconds are what they were; the log holds
no traceback. `--minutes N` goes on for that long instead (fault 23), `--overload` offers three times the
capacity for 60 s (fault 19; with a model of real size: of a tiny one HTTP itself is the limit), `--slow N`
holds N slow sockets beside 16 clients and asks livez meanwhile (fault 25). Exit code 1 if anything fails.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bertpair import PairClassifier  # noqa: E402
from bertpair.serving.batcher import MicroBatcher, QueueLimits  # noqa: E402

KINDS = ["good"] * 6 + ["bad", "oversized", "before", "during", "after", "slow", "garbage"]
BAD = [b"", b"{", b"[]", b'{"text_a": 1}', b'{"text_a": "\xff"}', b'{"text_a": "a", "text_b": "\\ud800"}']
TOLERANCE = 1e-5
MEMORY = 32 * 2**20


@dataclass
class Server:
    """serve.py, as a process to look at from outside."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    def memory(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def counts(self) -> tuple[int, int]:
        """Threads and open descriptors."""
        base = Path(f"/proc/{self.process.pid}")
        return len(os.listdir(base / "task")), len(os.listdir(base / "fd"))


def start(model_dir: str, flags: list[str], folder: Path) -> Server:
    log = folder / "log"
    with log.open("w") as err, (folder / "access").open("w") as out:
        command = [
            sys.executable,
            str(ROOT / "serve.py"),
            "--model_dir",
            model_dir,
            "--port",
            "0",
            "--amp",
            "off",
        ]
        process = subprocess.Popen([*command, *flags], stdout=out, stderr=err, text=True, cwd=ROOT)
    end = time.monotonic() + 300
    while time.monotonic() < end:
        said = log.read_text()
        if "ready: batches" in said:
            found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", said)
            assert found
            return Server(process, int(found[1]), log)
        if process.poll() is not None:
            raise SystemExit(said)
        time.sleep(0.1)
    raise SystemExit("the server did not become ready within 300 s")


@dataclass
class Chaos:
    """What was sent and what came back."""

    port: int
    pairs: list[tuple[str, str]]
    rng: random.Random
    kinds: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def request(self, body: bytes, promised: int | None = None) -> bytes:
        length = len(body) if promised is None else promised
        head = "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {length}\r\n\r\n".encode() + body

    def good_body(self, number: int) -> bytes:
        text_a, text_b = self.pairs[number]
        return json.dumps({"text_a": text_a, "text_b": text_b}).encode()

    async def one(self, kind: str) -> None:
        """One request of that kind on a connection of its own."""
        number = self.rng.randrange(len(self.pairs))
        body = self.good_body(number)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            if kind == "good":
                await self.good(number, reader, writer)
            elif kind == "bad":
                writer.write(self.request(self.rng.choice(BAD)))
                self.expect(kind, (await read_answer(reader))[0], (400, 422))
            elif kind == "oversized":
                writer.write(self.request(b" " * 100_000, 2**26 + 1))  # above any max_body_bytes
                self.expect(kind, (await read_answer(reader))[0], (413,))
            elif kind == "garbage":
                writer.write(self.rng.randbytes(200) + b"\r\n\r\n")
                self.expect(kind, (await read_answer(reader))[0], (400, 414, 431))
            elif kind == "during":
                writer.write(self.request(body[: len(body) // 2], len(body)))
                await asyncio.sleep(0.01)
            elif kind == "after":
                writer.write(self.request(body))
                await asyncio.sleep(self.rng.random() * 0.05)
            elif kind == "slow":
                for byte in self.request(body)[: self.rng.randrange(40)]:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.005)
        finally:
            self.kinds[kind] += 1
            writer.close()

    async def attempt(self, kind: str) -> None:
        """The same; a connection that fails is a fault to report, not the end."""
        try:
            await asyncio.wait_for(self.one(kind), 60)
        except (OSError, EOFError, TimeoutError) as error:
            self.faults.append(f"{kind}: {error!r}")

    async def good(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        began = time.perf_counter()
        writer.write(self.request(self.good_body(number)))
        status, answer = await read_answer(reader)
        if status == 200:
            self.seconds.append(time.perf_counter() - began)
            self.answers.append((number, answer["probabilities"]))
        else:
            self.expect("good", status, (429, 503))
            self.kinds[f"good: {status}"] += 1

    def expect(self, kind: str, status: int, allowed: tuple[int, ...]) -> None:
        if status not in allowed:
            self.faults.append(f"{kind}: answered {status}, expected {allowed}")

    async def send(self, count: int, clients: int, until: float | None = None) -> None:
        """`count` requests from so many clients at a time; with `until`, as many as go until then."""
        left = [count]

        async def client() -> None:
            while (until is None and left[0] > 0) or (until is not None and time.monotonic() < until):
                left[0] -= 1
                await self.attempt(self.rng.choice(KINDS))

        await asyncio.gather(*(client() for _ in range(clients)))


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, Any]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    body = await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
    return int(head.split(" ", 2)[1]), json.loads(body)


def largest_change(chaos: Chaos, offline: PairClassifier) -> float:
    """Between each answer and the offline prediction for its own text."""
    numbers = sorted({number for number, _ in chaos.answers})
    exact = dict(zip(numbers, offline.predict([chaos.pairs[n] for n in numbers]), strict=True))
    return max(
        abs(p - exact[number].probabilities[label])
        for number, probabilities in chaos.answers
        for label, p in probabilities.items()
    )


async def mixture(server: Server, chaos: Chaos, count: int, minutes: float) -> dict[str, object]:
    """The main run; what is measured before, at a tenth and after."""
    await chaos.send(max(50, count // 10), 16)
    await asyncio.sleep(5)
    memory, counts = server.memory(), server.counts()
    if minutes:
        await chaos.send(0, 16, time.monotonic() + 60 * minutes)
    else:
        await chaos.send(count - count // 10, 16)
    grown = server.memory() - memory
    await chaos.attempt("good")
    await asyncio.sleep(5)
    after = server.counts()
    if grown > MEMORY:
        chaos.faults.append(f"memory grew by {grown / 2**20:.1f} MB")
    if after != counts:
        chaos.faults.append(f"threads and descriptors were {counts}, are {after}")
    return {"memory_growth_mb": round(grown / 2**20, 1), "threads": after[0], "descriptors": after[1]}


async def one_client(chaos: Chaos, seconds: float) -> float:
    """p50 of one client in a closed loop."""
    chaos.seconds, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        await chaos.attempt("good")
    return statistics.median(chaos.seconds)


async def capacity(chaos: Chaos, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Requests/s and latencies of a closed loop of good requests."""
    chaos.seconds, end = [], time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end:
            await chaos.attempt("good")

    await asyncio.gather(*(client() for _ in range(clients)))
    return len(chaos.seconds) / seconds, sorted(chaos.seconds)


async def overload(server: Server, chaos: Chaos, seconds: float) -> dict[str, object]:
    """Three times the capacity for `seconds`, then how long one client waits again."""
    before = await one_client(chaos, 5)
    rate, _ = await capacity(chaos, 64, 10)
    memory = server.memory()
    chaos.seconds, tasks, begin = [], set[asyncio.Task[None]](), time.monotonic()
    for number in range(int(3 * rate * seconds)):
        await asyncio.sleep(max(0.0, begin + number / (3 * rate) - time.monotonic()))
        task = asyncio.create_task(chaos.attempt("good"))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    slowest = max(chaos.seconds, default=0.0)
    accepted = len(chaos.seconds)
    again = await one_client(chaos, 5)
    if again > 1.5 * before:
        chaos.faults.append(f"one client's p50 was {before:.4f} s and is {again:.4f} s")
    if slowest > 5.5:
        chaos.faults.append(f"an accepted request took {slowest:.2f} s")
    if chaos.kinds["good: 503"]:
        chaos.faults.append(f"{chaos.kinds['good: 503']} requests were admitted and then dropped")
    if server.memory() - memory > MEMORY:
        chaos.faults.append(f"memory grew by {(server.memory() - memory) / 2**20:.1f} MB")
    return {
        "capacity_per_s": round(rate, 1),
        "accepted": accepted,
        "refused_429": chaos.kinds["good: 429"],
        "slowest_accepted_s": round(slowest, 2),
        "p50_before_ms": round(1000 * before, 1),
        "p50_after_ms": round(1000 * again, 1),
    }


async def slow_sockets(chaos: Chaos, count: int, seconds: float) -> dict[str, object]:
    """p95 of 16 clients with and without slow sockets beside them, alternated three times."""

    async def slow(end: float) -> None:
        while time.monotonic() < end:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", chaos.port)
                for byte in b"GET /livez HTTP/1.1\r\nX-Slow: " + b"a" * 10_000:
                    if writer.is_closing() or time.monotonic() > end:
                        break
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.5)
                writer.close()
            except OSError:
                await asyncio.sleep(0.1)

    p95: dict[str, list[float]] = {"without": [], "with": []}
    livez: list[float] = []
    for _ in range(3):
        for name in p95:
            end = time.monotonic() + seconds
            others = [asyncio.create_task(slow(end)) for _ in range(count if name == "with" else 0)]
            probe = asyncio.create_task(watch_livez(chaos, end))
            _, found = await capacity(chaos, 16, seconds)
            p95[name].append(found[int(0.95 * len(found))])
            livez += await probe
            await asyncio.gather(*others)
    medians = {name: statistics.median(values) for name, values in p95.items()}
    if medians["with"] > 1.5 * medians["without"]:
        chaos.faults.append(f"p95 with {count} slow sockets: {medians}")
    figures: dict[str, object] = {f"p95_{name}_ms": round(1000 * p, 1) for name, p in medians.items()}
    return {**figures, "livez_asked": len(livez), "livez_slowest_ms": round(1000 * max(livez), 1)}


async def watch_livez(chaos: Chaos, end: float) -> list[float]:
    """Seconds that /livez took, asked twice a second on a connection of its own; all but a 200 is a fault."""
    seconds = []
    while time.monotonic() < end:
        began = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", chaos.port)
            writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            chaos.expect("livez", (await asyncio.wait_for(read_answer(reader), 10))[0], (200,))
            writer.close()
        except (OSError, EOFError, TimeoutError) as error:
            chaos.faults.append(f"livez: {error!r}")
        seconds.append(time.perf_counter() - began)
        await asyncio.sleep(0.5)
    return seconds


async def no_mix_up(num_rows: int) -> int:
    """The batcher alone with a callable that returns a hash of its input: rows that got another's answer."""

    def digest(row: str) -> str:
        return hashlib.sha256(row.encode()).hexdigest()

    batcher = MicroBatcher(lambda rows: [digest(row) for row in rows], QueueLimits(2048, 10_000, 60.0))
    wrong, rng = 0, random.Random(1)

    async def client(name: int) -> None:
        nonlocal wrong
        for start in range(0, num_rows // 50, 4):
            rows = [f"{name}/{start + i}" for i in range(4)]
            answers = await batcher.submit(rows, [rng.randint(1, 64) for _ in rows])
            wrong += sum(answer != digest(row) for answer, row in zip(answers.values, rows, strict=True))

    await asyncio.gather(*(client(name) for name in range(50)))
    await batcher.close()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_dir", default="output")
    parser.add_argument("--pairs", default=str(ROOT / "data" / "dev.tsv"))
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--overload", action="store_true")
    parser.add_argument("--slow", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0, help="of overload (60) or of each slow run (30)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    lines = Path(arguments.pairs).read_text(encoding="utf-8").splitlines()[1:]
    pairs = [(cells[1], cells[2]) for cells in (line.split("\t") for line in lines)][:2000]
    with tempfile.TemporaryDirectory() as folder:
        server = start(arguments.model_dir, [], Path(folder))
        chaos = Chaos(server.port, pairs, random.Random(arguments.seed))
        try:
            if arguments.overload:
                figures = asyncio.run(overload(server, chaos, arguments.seconds or 60))
            elif arguments.slow:
                figures = asyncio.run(slow_sockets(chaos, arguments.slow, arguments.seconds or 30))
            else:
                figures = asyncio.run(mixture(server, chaos, arguments.requests, arguments.minutes))
            figures["largest_change"] = largest_change(
                chaos, PairClassifier.from_pretrained(arguments.model_dir)
            )
        finally:
            server.process.send_signal(signal.SIGTERM)
            code = server.process.wait(60)
        said = server.log.read_text()
    if not arguments.overload and not arguments.slow:
        figures["mix_ups_of_100000"] = asyncio.run(no_mix_up(100_000))
        if figures["mix_ups_of_100000"]:
            chaos.faults.append("answers changed places")
    if float(str(figures["largest_change"])) > TOLERANCE:
        chaos.faults.append("an answer was not that of its own text")
    if "Traceback" in said or code != 0:
        chaos.faults.append(f"exit code {code}, log: {said[-2000:]}")
    print(json.dumps({**figures, "sent": dict(sorted(chaos.kinds.items())), "exit_code": code}))
    for fault, count in Counter(chaos.faults).most_common(20):
        print(f"FAILED: {fault} (× {count})")
    return 1 if chaos.faults else 0


if __name__ == "__main__":
    sys.exit(main())
