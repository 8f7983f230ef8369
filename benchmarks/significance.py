"""How often the 95 % intervals hold the truth, and how often luck alone is called a difference.

    python benchmarks/significance.py
    python benchmarks/significance.py --trials 500 --plain

Data sets are drawn from a table of gold and predicted classes, from which the true accuracy and macro-F1
follow exactly. The second model names the first one's class with probability 0.8, else draws its own from the
same table: both are equally good, so that every rejection is an error. A `!` marks a coverage outside 93 to
97 % and more than 7 % of errors. `--plain` measures percentile intervals, which were not chosen.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # every process computes on its own core
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray

from bertpair.evaluation import significance
from bertpair.evaluation.metrics import confusion_matrix
from bertpair.evaluation.report import text_table

Floats = NDArray[np.float64]

SHARES = {  # of the gold classes
    "2 balanced": (0.5, 0.5),
    "2 skewed": (0.8, 0.2),
    "3 balanced": (1 / 3, 1 / 3, 1 / 3),
    "3 skewed": (0.7, 0.2, 0.1),
    "3 rare": (0.85, 0.14, 0.01),
    "5 balanced": (0.2, 0.2, 0.2, 0.2, 0.2),
    "5 skewed": (0.5, 0.25, 0.15, 0.07, 0.03),
}
ROWS = 500, 1500
ACCURACIES = 0.6, 0.75, 0.9
SAME = 0.8
HEAD = ["classes", "rows", "true acc", "macro_f1", "acc held", "macro_f1 held"]
HEAD += ["McNemar", "acc differs", "macro_f1 differs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=2000, help="data sets per line")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="percentile intervals")
    given = parser.parse_args()
    if given.plain:
        significance._interval = lambda drawn, value, acceleration: percentiles(drawn)
        significance._difference = lambda drawn, value: significance.Difference(value, *percentiles(drawn))
    started = time.monotonic()
    with ProcessPoolExecutor(given.processes, get_context("fork")) as pool:
        settings = list(product(SHARES, ROWS, ACCURACIES, [given.trials]))
        classes = list(pool.map(classification, *zip(*settings, strict=True)))
        plan = list(product(("normal", "heavy tails"), ROWS, [given.trials]))
        values = list(pool.map(regression, *zip(*plan, strict=True)))
    print(text_table(HEAD, classes), end="\n\n")
    print(text_table(["errors of a regression", "rows", "sign test", "loss differs"], values), end="\n\n")
    noise = 100 * np.sqrt(0.05 * 0.95 / given.trials)
    print(f"% of {given.trials} data sets (standard error {noise:.1f}); {time.monotonic() - started:.0f} s")


def classification(name: str, rows: int, accuracy: float, trials: int) -> list[str]:
    """A line of the table."""
    shares = np.array(SHARES[name])
    C, table = len(shares), population(shares, accuracy)
    both = twice(table)
    truth = {"acc": np.trace(table), "macro_f1": np.mean(2 * np.diag(table) / (table.sum(0) + table.sum(1)))}
    generator = np.random.default_rng([C, rows, round(100 * accuracy)])
    held, wrong = dict.fromkeys(truth, 0), dict.fromkeys(("McNemar", *truth), 0)
    for _ in range(trials):
        cells = generator.choice(C**3, rows, p=both.ravel())
        gold, ours, theirs = np.unravel_index(cells, (C, C, C))
        intervals = significance.bootstrap_intervals(confusion_matrix(gold, ours, C))
        compared = significance.compare_labels(gold, ours, theirs, C)
        wrong["McNemar"] += compared.p_value <= 0.05
        for metric, (low, high) in intervals.items():
            held[metric] += low <= truth[metric] <= high
            wrong[metric] += not includes_zero(compared.differences[metric])
    marks = [mark(count, trials, 93, 97) for count in held.values()]
    marks += [mark(count, trials, 0, 7) for count in wrong.values()]
    return [name, str(rows), *(f"{value:.3f}" for value in truth.values()), *marks]


def population(shares: Floats, accuracy: float) -> Floats:
    """How likely each gold (rows) and predicted class is: errors go to the other classes by their share."""
    table = np.tile(shares, (len(shares), 1))
    np.fill_diagonal(table, 0)
    table *= (1 - accuracy) / table.sum(axis=1, keepdims=True)
    return shares[:, None] * (table + accuracy * np.eye(len(shares)))


def twice(table: Floats) -> Floats:
    """Gold, ours and theirs (C, C, C): theirs as ours with probability SAME, else drawn from the same row."""
    row = table / table.sum(axis=1, keepdims=True)
    same = row[:, :, None] * np.eye(len(row))
    return table.sum(axis=1)[:, None, None] * (SAME * same + (1 - SAME) * row[:, :, None] * row[:, None, :])


def regression(errors: str, rows: int, trials: int) -> list[str]:
    """A line of the table: errors in common and of each model's own, with normal or Laplace's tails."""
    generator = np.random.default_rng(rows)
    draw = generator.normal if errors == "normal" else generator.laplace
    wrong = [0, 0]
    for _ in range(trials):
        gold, shared = generator.uniform(0, 5, rows), draw(size=rows)
        ours, theirs = (gold + shared + draw(size=rows) for _ in range(2))
        compared = significance.compare_values(gold, ours, theirs)
        wrong[0] += compared.p_value <= 0.05
        wrong[1] += not includes_zero(compared.differences["loss"])
    return [errors, str(rows), *(mark(count, trials, 0, 7) for count in wrong)]


def includes_zero(difference: significance.Difference) -> bool:
    return difference.low <= 0 <= difference.high


def percentiles(drawn: Floats) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def mark(count: int, trials: int, least: float, most: float) -> str:
    percent = 100 * count / trials
    return f"{percent:.1f}{' ' if least <= percent <= most else '!'}"


if __name__ == "__main__":
    main()
