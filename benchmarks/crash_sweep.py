"""A sweep that is killed at drawn moments and started again ends with the table of an unbroken one.

    python benchmarks/crash_sweep.py --kills 20
    python benchmarks/crash_sweep.py --kills 5 --workers 2 --storage postgresql://user@host/database

The sample's data and a grid of two settings with two seeds. With several workers one of them is killed each
time. Every worker is a forked child, at work within milliseconds. Seconds and hosts are left out of the
comparison; everything else must be equal to the last digit.
"""

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bertpair.search.sweep
from bertpair import Config
from bertpair.console import configure_logging
from bertpair.evaluation.plots import draw_confusion

DATA = Path(__file__).resolve().parents[1] / "data"
SETTINGS: dict[str, Any] = {
    **{"model_name_or_path": str(DATA / "tiny-bert"), "from_scratch": True, "data_dir": str(DATA)},
    **{"max_seq_length": 40, "max_train_samples": 400, "max_eval_samples": 200, "max_steps": 8},
    **{"save_steps": 3, "eval_strategy": "no", "num_threads": 1, "amp": "off"},
}
SWEEP: dict[str, Any] = {
    "space": {"weight_decay": [0.0, 0.1], "learning_rate": [3e-4, 1e-3, 3e-3]},
    "seeds": 2,
    "metric": "loss",  # every digit of it would tell of a difference
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--storage", help="a database; by default a SQLite file for each sweep")
    parser.add_argument("--sampler", default="grid", choices=("grid", "random"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    configure_logging()
    logging.getLogger("bertpair").setLevel(logging.ERROR)
    draw_confusion([[1, 0], [0, 1]], ["a", "b"])  # what children would each import anew
    draw = random.Random(given.seed)
    plan = {**SWEEP, "sampler": given.sampler}
    if given.sampler == "random":
        plan |= {"trials": 6, "space": {**SWEEP["space"], "learning_rate": {"log": [1e-4, 1e-2]}}}
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name, "whole"), Path(name, "broken")
        started = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(start(whole, plan), 0)[1]) == 0
        seconds, expected = time.monotonic() - started, table(whole)
        print(f"unbroken: {len(expected) - 1} trials in {seconds:.1f} s", flush=True)
        stored = {**plan, "storage": given.storage}
        kills = run_and_kill(broken, stored, given.kills, given.workers, seconds, draw)
        found = table(broken)
        models = [str(path.parent.relative_to(broken)) for path in broken.glob("*/*/model.safetensors")]
        verdict = "the same table" if found == expected else "ANOTHER TABLE"
        print(f"{kills} kills, workers at once: {given.workers}: {verdict}; models left: {models}")
        if found != expected or len(models) != 1:
            print("\n".join(["expected", *expected, "found", *found]))
            sys.exit(1)


def start(folder: Path, plan: dict[str, Any]) -> int:
    """The process id of a new worker."""
    child = os.fork()
    if child == 0:
        try:
            bertpair.search.sweep.sweep(Config(**SETTINGS, output_dir=str(folder)), plan)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def run_and_kill(
    folder: Path, plan: dict[str, Any], kills: int, workers: int, seconds: float, draw: random.Random
) -> int:
    """Kill workers at drawn moments, start others in their place, then let all end; how many were killed."""
    crew, done = [start(folder, plan) for _ in range(workers)], 0
    while done < kills:
        time.sleep(draw.uniform(0.0, 0.2) * seconds)
        victim = crew.pop(draw.randrange(len(crew)))
        os.kill(victim, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        if code == 0:  # it was done before: nothing is left to kill
            break
        done += 1
        crew.append(start(folder, plan))
    codes = [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in crew]
    assert codes == [0] * len(crew), codes
    return done


def table(folder: Path) -> list[str]:
    """The rows of sweep_results.tsv without seconds and host."""
    rows = [line.split("\t") for line in (folder / "sweep_results.tsv").read_text().splitlines()]
    left_out = [rows[0].index(name) for name in ("seconds", "host")]
    return ["\t".join(cell for k, cell in enumerate(row) if k not in left_out) for row in rows]


if __name__ == "__main__":
    main()
