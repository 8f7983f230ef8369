"""A client for serve.py with nothing but the standard library.

    python examples/client.py "进程(process)。" "process"
    python examples/client.py --file pairs.tsv > answers.tsv      # two tab-separated texts a line

BERTPAIR_KEY in the environment is sent as the bearer key. Answers are written in UTF-8.
Whatever goes wrong is one line and exit code 1.
"""

import argparse
import http.client
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

ATTEMPTS = 6
MOST_WAIT = 60.0

Pair = tuple[str, str]


class ClientError(Exception):
    """What went wrong, in one line."""


class Client:
    """One connection that is kept, and opened anew when the server has closed it."""

    def __init__(self, url: str, key: str | None = None, timeout: float = 60) -> None:
        try:
            parts = urlsplit(url)
            kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}[parts.scheme]
            if not parts.hostname:
                raise ValueError
            self.connection = kind(parts.hostname, parts.port or kind.default_port, timeout=timeout)
            self.prefix = quote(parts.path.rstrip("/"), safe="/%!$&'()*+,;=:@")
        except (KeyError, ValueError, http.client.InvalidURL) as error:
            found = f"expected a URL such as http://127.0.0.1:8000, found {url}"
            raise ClientError(f"--url: {found}") from error
        self.url, self.timeout = url, timeout
        self.headers = {"Content-Type": "application/json"}
        if key:
            if not key.isascii() or not key.isprintable():
                raise ClientError("BERTPAIR_KEY: expected printable ASCII characters")
            self.headers["Authorization"] = f"Bearer {key}"

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """The answer as Python values. Waits and asks again where the server says so (429, 503)."""
        data = None if body is None else encode(body)
        for attempt in range(ATTEMPTS):
            is_last = attempt == ATTEMPTS - 1
            try:
                self.connection.request(method, self.prefix + path, data, self.headers)
                response = self.connection.getresponse()
                content = response.read()
            except (http.client.HTTPException, ConnectionError) as error:
                self.connection.close()
                if is_last:
                    raise ClientError(f"{self.url} cannot be reached: {reason_of(error)}") from error
                time.sleep(0.2 * 2**attempt)
                continue
            except TimeoutError as error:
                raise ClientError(f"{self.url} did not answer within {self.timeout:g} s") from error
            except UnicodeError as error:
                raise ClientError(f"{self.url} cannot be reached: no host has such a name") from error
            except OSError as error:
                raise ClientError(f"{self.url} cannot be reached: {reason_of(error)}") from error
            if response.status not in (429, 503) or is_last:
                return read_answer(response, content)
            time.sleep(wait_of(response))
        raise AssertionError

    def predict(self, text_a: str, text_b: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("POST", "/v1/predict", {"text_a": text_a, "text_b": text_b})
        return found

    def predict_many(self, pairs: list[Pair]) -> list[dict[str, Any]]:
        body = {"pairs": [{"text_a": a, "text_b": b} for a, b in pairs]}
        found: list[dict[str, Any]] = self.ask("POST", "/v1/predict/batch", body)["predictions"]
        return found

    def batches(self, pairs: Iterator[Pair], max_rows: int) -> Iterator[list[Pair]]:
        """The pairs in lists of at most `max_rows`, each of which fits into one request of this server."""
        limits = self.ask("GET", "/info")["limits"]
        max_rows = min(max_rows, limits["max_request_rows"])
        empty = len(encode({"pairs": []}))
        batch: list[Pair] = []
        num_bytes = empty
        for a, b in pairs:
            added = len(encode({"text_a": a, "text_b": b})) + len(", ")
            if batch and (len(batch) == max_rows or num_bytes + added > limits["max_body_bytes"]):
                yield batch
                batch, num_bytes = [], empty
            batch.append((a, b))
            num_bytes += added
        if batch:
            yield batch


def encode(body: object) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ClientError("the texts are not in UTF-8") from error


def reason_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def wait_of(response: http.client.HTTPResponse) -> float:
    """Seconds that a refusal asks to wait."""
    asked = response.headers.get("Retry-After") or ""
    return min(float(asked), MOST_WAIT) if asked.isdecimal() else 1.0


def read_answer(response: http.client.HTTPResponse, content: bytes) -> Any:
    """The object in a good answer; a bad one, or one that no bertpair server gives, is a ClientError."""
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if response.status == 200 and isinstance(answer, dict):
        return answer
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict):
        raise ClientError(f"{response.status}: {error.get('message')}")
    kind = response.headers.get("Content-Type") or "no type"
    raise ClientError(f"{response.status} {response.reason}: not an answer of a bertpair server ({kind})")


def read_pairs(path: str) -> Iterator[Pair]:
    """The two texts of each line."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                cells = line.rstrip("\r\n").split("\t")
                if len(cells) != 2:
                    found = f"expected 2 tab-separated texts, found {len(cells)}"
                    raise ClientError(f"{path}:{number}: {found}")
                yield cells[0], cells[1]
    except UnicodeDecodeError as error:
        raise ClientError(f"{path}: not in UTF-8") from error
    except OSError as error:
        raise ClientError(f"{path}: {reason_of(error)}") from error


def answer_file(client: Client, path: str, max_rows: int) -> None:
    """Print a line for each line of the file."""
    first = 1
    for rows in client.batches(read_pairs(path), max_rows):
        try:
            answers = client.predict_many(rows)
        except ClientError as error:
            raise ClientError(f"{path}, lines {first} to {first + len(rows) - 1}: {error}") from error
        for (a, b), answer in zip(rows, answers, strict=True):
            print(a, b, answer.get("label", answer.get("value")), answer.get("score", ""), sep="\t")
        first += len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a bertpair server.")
    parser.add_argument("texts", nargs="*", help="two texts")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--file", help="a file of two tab-separated texts a line")
    parser.add_argument("--rows", type=int, default=32, help="most rows of one request (with --file)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for an answer")
    arguments = parser.parse_args()
    if arguments.rows < 1 or not 0 < arguments.timeout < 1e6:
        parser.error("--rows is at least 1, --timeout above 0")
    if not arguments.file and len(arguments.texts) != 2:
        parser.error("give two texts, or --file")
    if sys.stdout is None:
        print("error: standard output is closed", file=sys.stderr)
        return 1
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # as the files are, in every locale
    try:
        client = Client(arguments.url, os.environ.get("BERTPAIR_KEY"), arguments.timeout)
        if arguments.file:
            answer_file(client, arguments.file, arguments.rows)
        else:
            answer = client.predict(*arguments.texts)
            print(json.dumps(answer, ensure_ascii=False, indent=2))
        sys.stdout.flush()
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyError, TypeError):
        print(f"error: {arguments.url} is not a bertpair server, or another version's", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # nobody reads on: no fault
            print(f"error: the answers cannot be written: {reason_of(error)}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
