"""Labelling a large file: memory, restart, processes, and throughput beside `PairClassifier.predict`.

    python train.py --max_steps 1 --output_dir one_step
    python benchmarks/stream.py one_step --rows 1000000

Rows are drawn from the embedded dev set. It prints the peak memory of 10,000 rows and of all, whether the
predictions of a run that is killed five times, and of two processes, are the same bytes, and the rows per
second of `evaluate.py --predict` (first pass, reading and writing included) and of `predict` on the same rows
in memory, alternated.
"""

import argparse
import hashlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FEW = 10_000
IN_MEMORY = """
import sys, time
from bertpair import PairClassifier
model = PairClassifier.from_pretrained(sys.argv[1], num_threads=int(sys.argv[3]))
rows = [tuple(line.rstrip("\\n").split("\\t")[1:3]) for line in open(sys.argv[2], encoding="utf-8")][1:]
model.predict(rows[:2000])
started = time.monotonic()
model.predict(rows)
print(len(rows) / (time.monotonic() - started))
"""


def write_rows(path: Path, count: int) -> Path:
    """A file of so many rows without labels, each text from any row of the embedded dev set."""
    rng = random.Random(1)
    header, *lines = (ROOT / "data/dev.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    with path.open("w", encoding="utf-8") as file:
        file.write("\t".join(header.split("\t")[:3]) + "\n")
        for number in range(count):
            file.write(f"{number}\t{rng.choice(rows)[1]}\t{rng.choice(rows)[2]}\n")
    return path


def command(model: str, data: Path, output: Path, threads: int, processes: int = 1) -> list[str]:
    """evaluate.py in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = ["--model_dir", model, "--data_file", str(data), "--output_dir", str(output), "--predict"]
    script = [str(ROOT / "evaluate.py"), *words, "--num_threads", str(threads)]
    return [sys.executable, *(launcher if processes > 1 else []), *script]


def run(words: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command; its output is shown if it fails."""
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(said)
    return time.monotonic() - started, usage.ru_maxrss * 1024


def kill_and_go_on(words: list[str], seconds: float, times: int) -> int:
    """Kill the command at drawn moments, start it again each time, then let it end; how often it died."""
    rng, killed = random.Random(7), 0
    for _ in range(times):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.15, 0.3) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    run(words)
    return killed


def digest(folder: Path) -> str:
    """Of the predictions in a folder."""
    return hashlib.sha256((folder / "predictions.tsv").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--timed_rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    model, threads = given.model_dir, given.threads
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        few, timed, many = (
            write_rows(place / f"{count}.tsv", count) for count in (FEW, given.timed_rows + FEW, given.rows)
        )
        ours, theirs = [], []
        for _ in range(given.repeats):
            short, _ = run(command(model, few, place / "few", threads))
            long, _ = run(command(model, timed, place / "timed", threads))
            ours.append(given.timed_rows / (long - short))
            in_memory = [sys.executable, "-c", IN_MEMORY, model, str(timed), str(threads)]
            theirs.append(float(subprocess.check_output(in_memory, cwd=ROOT, text=True)))
        ratio = statistics.median(ours) / statistics.median(theirs)
        print(f"rows per second: evaluate.py {statistics.median(ours):,.0f}", end="; ")
        print(f"predict {statistics.median(theirs):,.0f}; ratio {ratio:.3f}", flush=True)
        _, peak_few = run(command(model, few, place / "few", threads))
        seconds, peak = run(command(model, many, place / "unbroken", threads))
        print(f"{given.rows:,} rows: {seconds:.0f} s, peak {peak / 1e6:,.0f} MB", end="; ")
        print(
            f"{FEW:,} rows: {peak_few / 1e6:,.0f} MB; difference {(peak - peak_few) / 1e6:.1f} MB", flush=True
        )
        killed = kill_and_go_on(command(model, many, place / "broken", threads), seconds, 5)
        same = digest(place / "broken") == digest(place / "unbroken")
        print(
            f"killed {killed} times and gone on with: {'the same bytes' if same else 'OTHER BYTES'}",
            flush=True,
        )
        seconds, _ = run(command(model, many, place / "two", threads, processes=2))
        same = digest(place / "two") == digest(place / "unbroken")
        print(f"two processes: {seconds:.0f} s, {'the same bytes' if same else 'OTHER BYTES'}")


if __name__ == "__main__":
    main()
