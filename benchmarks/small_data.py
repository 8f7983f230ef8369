"""A recipe against the default settings on few training rows: each seed's figures, and the difference.

    python benchmarks/small_data.py --recipe recipes/small-data.yaml --rows 300 --seeds 10 --out small300 \
        --train_file train.tsv --dev_file dev.tsv --model_name_or_path MODEL --max_seq_length 64

For each seed, so many rows are drawn from the training file, and `python train.py` is run on them twice with
this seed: with the flags alone, and with the recipe too. Both are measured on the dev file with their last
weights. Flags that this script does not know go to train.py. OUT/figures.jsonl has the figures; the same
command goes on where it was stopped.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats

ROOT = Path(__file__).resolve().parent.parent


def draw(train: Path, rows: int, seed: int, target: Path) -> None:
    """The header of `train` and `rows` of its lines, drawn by `seed`, in the order of the file."""
    header, *lines = train.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    drawn = sorted(random.Random(seed).sample(range(len(lines)), rows))
    target.write_text("\n".join([header, *(lines[index] for index in drawn), ""]), encoding="utf-8")


def run(flags: list[str], output: Path) -> dict[str, Any]:
    """The metrics of a whole run; its folder is deleted."""
    more = "--eval_strategy", "no", "--save_steps", "0", "--overwrite_output_dir", "--output_dir", str(output)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags, *more], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    shutil.rmtree(output)
    metrics: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["metrics"]
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train_file", type=Path, required=True)
    parser.add_argument("--metric", default="acc")
    given, flags = parser.parse_known_args()
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.resolve()
    kept = out / "figures.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    figures = {(each["seed"], each["recipe"]): each[given.metric] for each in map(json.loads, lines)}
    seeds = range(42, 42 + given.seeds)
    for seed in seeds:
        drawn = out / "rows.tsv"
        draw(given.train_file, given.rows, seed, drawn)
        same = ["--train_file", str(drawn), "--seed", str(seed), *flags]
        for name, more in {"default": [], "recipe": ["--config", str(given.recipe.resolve())]}.items():
            if (seed, name) not in figures:
                metrics = run([*more, *same], out / "model")
                with kept.open("a") as file:
                    file.write(json.dumps({"seed": seed, "recipe": name, **metrics}) + "\n")
                figures[seed, name] = metrics[given.metric]
        print(seed, *(f"{name} {figures[seed, name]:.4f}" for name in ("default", "recipe")), flush=True)
    sides = {name: [figures[seed, name] for seed in seeds] for name in ("default", "recipe")}
    for name, values in sides.items():
        print(f"{name}: {given.metric} {mean(values):.4f} ± {stdev(values):.4f}")
    gains = [new - old for old, new in zip(*sides.values(), strict=True)]
    half = float(stats.t.ppf(0.975, len(gains) - 1)) * stdev(gains) / len(gains) ** 0.5
    middle = mean(gains)
    print(f"difference: {middle:+.4f}, 95 % interval {middle - half:+.4f} to {middle + half:+.4f} (paired t)")


if __name__ == "__main__":
    main()
