"""A client for serve.py with nothing but the standard library.

    python examples/client.py "进程(process)。" "process"
    python examples/client.py --file pairs.tsv > answers.tsv      # two tab-separated texts a line

BERTPAIR_KEY in the environment is sent as the bearer key.
"""

import argparse
import http.client
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

ATTEMPTS = 6


class Client:
    """One connection that is kept, and opened anew when the server has closed it."""

    def __init__(self, url: str, key: str | None = None, timeout: float = 60) -> None:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=timeout)
        self.prefix = parts.path.rstrip("/")
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def post(self, path: str, body: object) -> Any:
        """The answer as Python values. Waits and asks again where the server says so (429, 503)."""
        data = json.dumps(body).encode()
        for attempt in range(ATTEMPTS):
            try:
                self.connection.request("POST", self.prefix + path, data, self.headers)
                response = self.connection.getresponse()
                answer = json.loads(response.read())
            except (http.client.HTTPException, ConnectionError):
                self.connection.close()
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(0.2 * 2**attempt)
                continue
            if response.status == 200:
                return answer
            if response.status not in (429, 503) or attempt == ATTEMPTS - 1:
                raise SystemExit(f"error: {response.status}: {answer['error']['message']}")
            time.sleep(float(response.headers.get("Retry-After") or 1))
        raise AssertionError

    def predict(self, text_a: str, text_b: str) -> dict[str, Any]:
        found: dict[str, Any] = self.post("/v1/predict", {"text_a": text_a, "text_b": text_b})
        return found

    def predict_many(self, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
        body = {"pairs": [{"text_a": a, "text_b": b} for a, b in pairs]}
        found: list[dict[str, Any]] = self.post("/v1/predict/batch", body)["predictions"]
        return found


def read_pairs(path: str) -> Iterator[tuple[str, str]]:
    """The two texts of each line."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != 2:
                raise SystemExit(
                    f"error: {path}:{number}: expected 2 tab-separated texts, found {len(cells)}"
                )
            yield cells[0], cells[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a bertpair server.")
    parser.add_argument("texts", nargs="*", help="two texts")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--file", help="a file of two tab-separated texts a line")
    parser.add_argument("--rows", type=int, default=32, help="rows of one request (with --file)")
    arguments = parser.parse_args()
    client = Client(arguments.url, os.environ.get("BERTPAIR_KEY"))
    if arguments.file:
        pairs = read_pairs(arguments.file)
        while rows := list(islice(pairs, arguments.rows)):
            for (a, b), answer in zip(rows, client.predict_many(rows), strict=True):
                print(a, b, answer.get("label", answer.get("value")), answer.get("score", ""), sep="\t")
    elif len(arguments.texts) == 2:
        json.dump(client.predict(*arguments.texts), sys.stdout, ensure_ascii=False, indent=2)
        print()
    else:
        parser.error("give two texts, or --file")


if __name__ == "__main__":
    main()
