"""The CPU engines beside their peers: one pair, many pairs, and HTTP under load. For BERT with labels.

    pip install "bertpair[openvino]" transformers flask gunicorn
    python benchmarks/serve_engines.py --model_dir DIR --pairs FILE --calibration_file FILE

Both files: index, sentence1, sentence2, … with a header. Every contender is a process of its own, with the
same model folder, pairs, cut and number of threads. They take turns; whoever waits is idle. The tables show
the medians of all turns.

  library   PairClassifier on each engine, beside a bare OpenVINO loop: transformers loads the folder,
            openvino converts it with dynamic shapes, and nncf quantises it for int8 on the same calibration
            pairs. One pair: latency hint, no padding. Many pairs: sorted by length, with the best of four
            batch sizes and two performance hints. Both sides use the same tokenizers library.
  service   serve.py on each engine, beside Flask (one gunicorn worker, one float32 forward pass for each
            request, padded to the cut), and beside the bare int8 loop, one pair at a time, without HTTP.

The last table compares the ratios with the marks that the project has set itself.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from timeit import repeat
from typing import Any

from serve_load import PATH, Seen, in_process, read_bodies

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {
    "torch-float32": {"engine": "torch"},
    "torch-bf16": {"engine": "torch", "amp": "bf16"},
    "openvino-float32": {"engine": "openvino"},
    "openvino-bf16": {"engine": "openvino", "amp": "bf16"},
    "openvino-int8": {"engine": "openvino", "quantize": "int8"},
}
INT8, BARE_INT8 = "openvino-int8", "bare-int8"
PEERS = {  # and what their Python needs
    "flask": {"torch", "transformers", "flask", "gunicorn"},
    "bare-float32": {"torch", "transformers", "openvino"},
    BARE_INT8: {"torch", "transformers", "openvino", "nncf"},
}
PACKAGES = ["torch", "openvino", "nncf", "transformers", "tokenizers", "flask", "gunicorn"]
FEATURES = {  # and their names in /proc/cpuinfo
    **{"avx2": "avx2", "avx512": "avx512f", "avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni"},
    **{"avx512_bf16": "avx512_bf16", "amx": "amx_tile"},
}
TO_BARE = {1: 0.85, 16: 1.3, 64: 1.3}  # marks by number of clients
TO_FLASK = {
    "bf16": {1: 2.8, 16: 4.8, 64: 4.6},
    "float32": {1: 1.7, 16: 2.4, 64: 2.3},
    "int8": {1: 4.5, 16: 8, 64: 8},
}
CALIBRATION_ROWS = 200
Mark = tuple[str, float, float]  # what, at least, measured
Row = tuple[list[int], list[int]]  # token ids and their types


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, work = parser.add_argument, Path(tempfile.gettempdir(), "bertpair-serve-engines")
    add("--model_dir", required=True, type=Path)
    add("--pairs", default=ROOT / "data/dev.tsv", type=Path, help="pairs to ask")
    add("--calibration_file", default=ROOT / "data/train.tsv", type=Path, help="its first 200 pairs are used")
    add("--part", choices=["library", "service"], help="one part alone (default: both)")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--peer-python", default=sys.executable, help="Python of the peers; it needs no bertpair")
    add("--tokenizing", action=argparse.BooleanOptionalAction, default=True, help="no: ids in (library)")
    add("--num_pairs", type=int, default=256, help="pairs in a turn of the library (default: 256)")
    add("--num_threads", type=int, default=2, help="default: 2")
    add("--max_seq_length", type=int, default=40, help="tokens of a pair at most (default: 40)")
    add("--turns", type=int, default=3, help="turns of each contender (default: 3)")
    add("--clients", type=int, nargs="+", default=[1, 16, 64], help="default: 1 16 64")
    add("--seconds", type=float, default=20, help="load in a turn of the service (default: 20)")
    add("--work", type=Path, default=work, help=f"folder for logs and converted models (default: {work})")
    add("--run", choices=["versions", *ENGINES, *PEERS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return print(json.dumps(versions())) if arguments.run == "versions" else contend(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contenders are ended
    arguments.work.mkdir(parents=True, exist_ok=True)
    theirs = json.loads(subprocess.check_output(again("versions", arguments.peer_python)))
    print_header(theirs)
    if "openvino" not in versions():
        arguments.engines = [name for name in arguments.engines if ENGINES[name]["engine"] == "torch"]
        print('\nThe openvino engines are left out. To add them: pip install "bertpair[openvino]"')
    lacks = {peer: packages - theirs.keys() for peer, packages in PEERS.items()}
    arguments.peers = [peer for peer in PEERS if not lacks[peer]]
    for peer, packages in lacks.items():
        if packages:
            print(f"\n{peer} is left out: {arguments.peer_python} lacks", *sorted(packages))
    marks = measure_library(arguments) if arguments.part != "service" else []
    marks += measure_service(arguments) if arguments.part != "library" else []
    if marks:
        print("\n| mark | at least | measured | held |\n|---|---|---|---|")
    for what, least, found in marks:
        print(f"| {what} | {least} | {found:.2f} | {'yes' if found >= least else 'no'} |")


def again(name: str, python: str) -> list[str]:
    return [python, __file__, *sys.argv[1:], "--run", name]


def versions() -> dict[str, str]:
    found = {each.name.lower(): each.version for each in importlib.metadata.distributions()}
    return {name: found[name] for name in PACKAGES if name in found}


def print_header(theirs: dict[str, str]) -> None:
    text = Path("/proc/cpuinfo").read_text()
    name, flags = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE), text.split()
    has = ", ".join(f"{feature} {'yes' if flag in flags else 'no'}" for feature, flag in FEATURES.items())
    print(f"{date.today()}, {name[1] if name else os.uname().machine}, {os.cpu_count()} cores ({has})\n")
    print(f"- load average of the machine before the run: {os.getloadavg()[0]:.2f}")
    for side, found in (("bertpair", versions()), ("peers", theirs)):
        print(f"- {side}: " + ", ".join(f"{package} {version}" for package, version in found.items()))
    print(f"- `python {shlex.join([os.path.relpath(__file__), *sys.argv[1:]])}`")


class Contender:
    """A process that ends with the stack. What it logs is in the folder `work`."""

    def __init__(
        self, stack: ExitStack, name: str, command: list[str], arguments: argparse.Namespace, stdout: int
    ) -> None:
        self.name, self.log, count = name, arguments.work / f"{name}.log", str(arguments.num_threads)
        given: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": stdout, "text": True}
        given["env"] = {**os.environ, "OMP_NUM_THREADS": count, "RAYON_NUM_THREADS": count}
        with self.log.open("wb") as log:  # a session of its own: only this script sees Ctrl-C
            self.process = subprocess.Popen(command, stderr=log, start_new_session=True, **given)
        stack.callback(self.end)

    def ask(self, work: str) -> dict[str, Any]:
        """Of a process that runs `contend`."""
        with suppress(BrokenPipeError):
            print(work, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        return json.loads(line) if line else self.fail()

    def find_port(self) -> int:
        """Of a server, once it is ready."""
        while self.process.poll() is None:
            said = self.log.read_text(errors="replace")
            port = re.search(r"[Ll]istening \S+ http://127\.0\.0\.1:(\d+)", said)
            if port and re.search("^ready", said, re.MULTILINE):
                return int(port[1])
            time.sleep(0.1)
        return self.fail()

    def fail(self) -> Any:
        self.process.wait(30)
        last = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
        sys.exit(f"{self.name} ended too early: {last} (its log: {self.log})")

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_loop(stack: ExitStack, name: str, arguments: argparse.Namespace, *flags: str) -> Contender:
    python = arguments.peer_python if name in PEERS else sys.executable
    loop = Contender(stack, name, [*again(name, python), *flags], arguments, subprocess.PIPE)
    loop.ask("ready")  # so that they load one after the other
    return loop


def measure_library(arguments: argparse.Namespace) -> list[Mark]:
    peers = [peer for peer in arguments.peers if peer != "flask"]
    names = [*arguments.engines, *peers]
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        loops = [start_loop(stack, name, arguments) for name in names]
        for _ in range(1 + arguments.turns):  # the first turn warms up
            for work in ("one", "many"):
                for loop in loops:
                    turns.setdefault((loop.name, work), []).append(loop.ask(work))
    seconds = {key: median(s for turn in found[1:] for s in turn["seconds"]) for key, found in turns.items()}
    labels = {key: found[0]["labels"] for key, found in turns.items()}
    expected = labels[names[0], "one"]
    one = {name: 1000 * seconds[name, "one"] for name in names}
    many = {name: len(expected) / seconds[name, "many"] for name in names}
    columns = [("one pair, ms", one), *ratios(one, peers, -1), ("many, pairs/s", many), *ratios(many, peers)]
    for work in ("one", "many"):
        same = {name: sum(map(str.__eq__, labels[name, work], expected)) for name in names}
        columns.append((f"labels as {names[0]}'s: {work}", same))
    columns.append(("many in", {name: turns[name, "many"][0].get("way", "") for name in names}))
    given = "texts" if arguments.tokenizing else "token ids"
    print_table(f"Library: {len(expected)} pairs, {given} in, labels out; ratios of speed", columns)
    if not {INT8, BARE_INT8} <= set(names):
        return []
    to_bare = one[BARE_INT8] / one[INT8], many[INT8] / many[BARE_INT8]
    what = (f"{work}, {INT8} / {BARE_INT8}" for work in ("one pair", "many pairs"))
    return list(zip(what, (0.9, 1.0), to_bare, strict=True))


def measure_service(arguments: argparse.Namespace) -> list[Mark]:
    bodies = read_bodies(str(arguments.pairs))
    turns: dict[tuple[int, str], list[Seen]] = {}
    peers = [peer for peer in arguments.peers if peer != "bare-float32"]
    with ExitStack() as stack:
        asks = {name: partial(ask_server, name, url, bodies) for name, url in start_servers(stack, arguments)}
        if BARE_INT8 in peers:
            asks[BARE_INT8] = partial(ask_loop, start_loop(stack, BARE_INT8, arguments, "--tokenizing"))
        for ask in asks.values():  # warms up
            ask(max(arguments.clients), 2.0)
        for _ in range(arguments.turns):
            for clients in arguments.clients:
                for name, ask in asks.items():
                    turns.setdefault((clients, name), []).append(ask(clients, arguments.seconds))
    marks: list[Mark] = []
    for clients in arguments.clients:
        seen = {name: turns[clients, name] for name in asks}
        rows = {name: [each.describe(name, each.lasted) for each in found] for name, found in seen.items()}
        rate, p50, p99 = (
            {name: float(median(row[figure] for row in found)) for name, found in rows.items()}
            for figure in ("requests_per_s", "p50_ms", "p99_ms")
        )
        failed = {n: sum(each.kinds.total() - each.kinds["200"] for each in seen[n]) for n in asks}
        columns = [("requests/s", rate), *ratios(rate, peers), ("p50, ms", p50), ("p99, ms", p99)]
        print_table(
            f"Service, clients: {clients} ({BARE_INT8}: one pair at a time, no HTTP)",
            [*columns, *ratios(p99, peers), ("not answered", failed)],
        )
        for name in arguments.engines:
            precision = name.partition("-")[2]
            least = {"flask": TO_FLASK[precision], BARE_INT8: TO_BARE if name == INT8 else {}}
            for peer in peers:
                if clients in least[peer]:
                    what = f"clients: {clients}, {name} / {peer}"
                    marks.append((what, least[peer][clients], rate[name] / rate[peer]))
    return marks


def ratios(values: dict[str, float], peers: list[str], power: int = 1) -> list[tuple[str, Any]]:
    by_peer = {peer: {name: (values[name] / values[peer]) ** power for name in values} for peer in peers}
    return [(f"/ {peer}", found) for peer, found in by_peer.items()]


def print_table(title: str, columns: list[tuple[str, Any]]) -> None:
    print(f"\n{title}\n\n| contender | {' | '.join(head for head, _ in columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name in columns[0][1]:
        cells = [values[name] for _, values in columns]
        texts = [f"{x:{'.2f' if x < 100 else '.0f'}}" if isinstance(x, float) else str(x) for x in cells]
        print(f"| {name} | {' | '.join(texts)} |", flush=True)


def start_servers(stack: ExitStack, arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Their names and addresses, once they are ready."""
    model, threads, cut = str(arguments.model_dir.resolve()), arguments.num_threads, arguments.max_seq_length
    int8 = {"calibration_file": calibration_of(arguments), "quantize_check": arguments.pairs.resolve()}
    common = {"model_dir": model, "num_threads": threads, "max_seq_length": cut, "port": 0}
    common |= {"queue_deadline": 60, "grace_seconds": 61}  # as Flask, which lets everybody wait
    commands = {}
    for name in arguments.engines:
        settings = common | ENGINES[name] | (int8 if name == INT8 else {})
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        commands[name] = [sys.executable, str(ROOT / "serve.py"), *flags]
    if "flask" in arguments.peers:
        gunicorn = "-m gunicorn -w 1 -b 127.0.0.1:0 --timeout 600 --pythonpath".split()
        call = f"serve_engines:make_flask({model!r}, {threads}, {cut})"
        commands["flask"] = [arguments.peer_python, *gunicorn, str(ROOT / "benchmarks"), call]
    servers = []
    for name, command in commands.items():
        server = Contender(stack, name, command, arguments, subprocess.DEVNULL)
        servers.append((name, f"http://127.0.0.1:{server.find_port()}"))
    return servers


def calibration_of(arguments: argparse.Namespace) -> Path:
    """A file with the rows that the bare loop is calibrated with."""
    path: Path = arguments.work / "calibration.tsv"
    lines = arguments.calibration_file.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[: 1 + CALIBRATION_ROWS]), encoding="utf-8")
    return path


def ask_server(name: str, url: str, bodies: list[bytes], clients: int, seconds: float) -> Seen:
    seen = in_process(url, None, bodies, "closed", clients, seconds)
    return seen if seen.seconds else sys.exit(f"{name}: no good answer, but {dict(seen.kinds)}")


def ask_loop(loop: Contender, _clients: int, seconds: float) -> Seen:
    seen = Seen()
    while seen.lasted < seconds:
        seen.seconds += loop.ask("one")["seconds"]
        seen.lasted = sum(seen.seconds)
    return seen


# What follows runs in the processes of the contenders.


def contend(arguments: argparse.Namespace) -> None:
    """Answer each line of standard input, `one` or `many`, with a line of JSON on standard output."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what libraries print goes to the log
        works = (prepare_bare if arguments.run in PEERS else prepare_bertpair)(arguments)
        works["ready"] = dict
        for line in sys.stdin:
            print(json.dumps(works[line.strip()]()), file=out, flush=True)


def clock(answer: Callable[[Any], list[str]], parts: list[Any]) -> dict[str, Any]:
    labels, seconds = [], []
    for part in parts:
        began = time.perf_counter()
        labels += answer(part)
        seconds.append(time.perf_counter() - began)
    return {"labels": labels, "seconds": seconds}


def read_pairs(path: Path, limit: int) -> list[tuple[str, str]]:
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1 : 1 + limit])
    return [(row[1], row[2]) for row in rows]


def prepare_bertpair(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    sys.path.insert(0, str(ROOT))
    from bertpair import PairClassifier

    options: dict[str, Any] = {**ENGINES[arguments.run], "num_threads": arguments.num_threads}
    if arguments.run == INT8:
        options |= {"calibration_pairs": calibration_of(arguments), "quantize_check": arguments.pairs}
    cut, pairs = arguments.max_seq_length, read_pairs(arguments.pairs, arguments.num_pairs)
    classifier = PairClassifier.from_pretrained(arguments.model_dir, max_seq_length=cut, **options)
    predict, parts = classifier.predict, [[pair] for pair in pairs] + [pairs]
    if not arguments.tokenizing:
        columns = [[list(column) for column in zip(*part, strict=True)] for part in parts]
        predict = classifier.predict_tokens
        parts = [classifier.tokenizer.encode(*texts, cut) for texts in columns]

    def answer(part: Any) -> list[str]:
        return [prediction.label for prediction in predict(part)]

    return {"one": partial(clock, answer, parts[:-1]), "many": partial(clock, answer, parts[-1:])}


def prepare_bare(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it would use the network
    import openvino as ov
    from transformers import AutoConfig

    precision = arguments.run.partition("-")[2]
    names = AutoConfig.from_pretrained(arguments.model_dir).id2label
    tokenizer = read_tokenizer(arguments.model_dir, arguments.max_seq_length)
    model = ov.Core().read_model(convert(arguments, precision, tokenizer))

    def compile_model(hint: str) -> Any:
        options = {"PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": arguments.num_threads}
        options |= {"INFERENCE_PRECISION_HINT": "f32"} if precision == "float32" else {}
        return ov.Core().compile_model(model, "CPU", options)

    def encode(pairs: list[tuple[str, str]]) -> list[Row]:
        return [(each.ids, each.type_ids) for each in tokenizer.encode_batch_fast(pairs)]

    pairs = read_pairs(arguments.pairs, arguments.num_pairs)
    given, prepare = (pairs, encode) if arguments.tokenizing else (encode(pairs), list)
    latency = compile_model("LATENCY")
    request = latency.create_infer_request()

    def answer_one(part: list[Any]) -> list[str]:
        return [names[int(request.infer(pad(prepare(part)), share_inputs=True)[0].argmax())]]

    def answer_many(queue: Any, size: int, part: list[Any]) -> list[str]:
        found: dict[int, str] = {}

        def keep(done: Any, numbers: list[int]) -> None:
            best = done.get_output_tensor().data.argmax(1)
            found.update({number: names[int(i)] for number, i in zip(numbers, best, strict=True)})

        queue.set_callback(keep)
        rows = prepare(part)
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number][0]))
        for numbers in (order[start : start + size] for start in range(0, len(order), size)):
            queue.start_async(pad([rows[number] for number in numbers]), numbers)
        queue.wait_all()
        return [found[number] for number in range(len(rows))]

    @functools.cache
    def choose() -> tuple[str, Any]:
        hints = {"latency": latency, "throughput": compile_model("THROUGHPUT")}
        ways = {
            f"batches of {size}, {hint}": partial(answer_many, queue, size)
            for hint, queue in ((hint, ov.AsyncInferQueue(compiled)) for hint, compiled in hints.items())
            for size in (1, 8, 16, 32)
        }
        return min(ways.items(), key=lambda way: min(repeat(partial(way[1], given), number=1, repeat=2)))

    def clock_many() -> dict[str, Any]:
        way, answer = choose()
        return clock(answer, [given]) | {"way": way}

    return {"one": partial(clock, answer_one, [[row] for row in given]), "many": clock_many}


def convert(arguments: argparse.Namespace, precision: str, tokenizer: Any) -> Path:
    """openvino's file of the model. It is kept for the same files, calibration pairs, cut and versions."""
    import openvino as ov

    paths = [*arguments.model_dir.glob("*.json"), *arguments.model_dir.glob("*.safetensors")]
    state = sorted((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    pairs = read_pairs(arguments.calibration_file, CALIBRATION_ROWS)
    key = hashlib.sha256(repr([state, pairs, arguments.max_seq_length, versions()]).encode()).hexdigest()
    folder = arguments.work / f"{key[:12]}-{precision}"
    if folder.exists():
        return folder / "model.xml"
    if precision == "float32":
        import torch
        from transformers import AutoModelForSequenceClassification

        network = AutoModelForSequenceClassification.from_pretrained(arguments.model_dir).eval()
        example = pad([([1] * 8, [0] * 8), ([1] * 4, [0] * 4)])
        tensors = {name: torch.from_numpy(array) for name, array in example.items()}
        made = ov.convert_model(network, example_input=tensors)
    else:
        import nncf

        exact = ov.Core().read_model(convert(arguments, "float32", tokenizer))
        rows = [tokenizer.encode(*pair) for pair in pairs]
        data = nncf.Dataset([pad([(row.ids, row.type_ids)]) for row in rows])
        kind = nncf.ModelType.TRANSFORMER
        made = nncf.quantize(exact, data, model_type=kind, subset_size=CALIBRATION_ROWS)
    part = folder.with_suffix(".part")
    part.mkdir(exist_ok=True)
    ov.save_model(made, part / "model.xml", compress_to_fp16=False)
    part.rename(folder)
    return folder / "model.xml"


def read_tokenizer(folder: Path, cut: int) -> Any:
    """Of the tokenizers library: transformers 5 reads a bare vocab.txt in another way."""
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        lowercase = config.get("do_lower_case", True)
        made = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lowercase)
        tokenizer = Tokenizer.from_str(made.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(cut)
    return tokenizer


def pad(rows: list[Row], length: int = 0) -> dict[str, Any]:
    """A network's inputs. `length` 0: the longest row's."""
    import numpy as np

    arrays = np.zeros((3, len(rows), length or max(len(ids) for ids, _ in rows)), np.int64)
    for i, (ids, types) in enumerate(rows):
        arrays[:, i, : len(ids)] = ids, types, [1] * len(ids)
    return dict(zip(("input_ids", "token_type_ids", "attention_mask"), arrays, strict=True))


def make_flask(folder: str, num_threads: int, cut: int) -> Any:
    """The application of gunicorn's worker."""
    import torch
    from flask import Flask, request
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(num_threads)
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, app = read_tokenizer(Path(folder), cut), Flask("peer")

    @app.post(PATH)
    def answer() -> dict[str, object]:
        row = request.get_json()
        found = tokenizer.encode(row["sentence1"], row["sentence2"])
        inputs = pad([(found.ids, found.type_ids)], cut)
        with torch.inference_mode():
            logits = network(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits
        score, best = logits[0].softmax(0).max(0)
        return {"label": network.config.id2label[int(best)], "score": float(score)}

    print("ready", file=sys.stderr, flush=True)
    return app


if __name__ == "__main__":
    main()
