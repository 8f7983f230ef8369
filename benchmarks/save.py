"""How long a durable checkpoint of mBERT's size takes, beside safetensors.save_file + torch.save + fsync.

Both write the same 0.7 GB of weights and 1.4 GB of optimizer state (random numbers) to the same disk, turn
by turn. bertpair's also takes checksums, a manifest, fsync of the folders and a rename.

    python benchmarks/save.py [--folder DIR] [--repeats N] [--layers N]
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bertpair.checkpoints.atomic import staged_folder
from bertpair.checkpoints.checkpoint import load_tensors, newest_whole

VOCABULARY, HIDDEN, INTERMEDIATE, POSITIONS = 119_547, 768, 3_072, 512


def main() -> None:
    arguments = parse_arguments()
    weights = random_weights(arguments.layers)
    moments = ("exp_avg", "exp_avg_sq")
    optimizer = {f"{moment}.{name}": torch.rand_like(t) for moment in moments for name, t in weights.items()}
    print(machine())
    print(f"weights {size_of(weights):.2f} GB, optimizer {size_of(optimizer):.2f} GB")
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bertpair-save-") as folder:
        compare(Path(folder), weights, optimizer, arguments.repeats)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to write (default: here)")
    parser.add_argument("--repeats", type=int, default=8, help="timed saves of each kind (default: 8)")
    parser.add_argument("--layers", type=int, default=12, help="encoder layers (default: 12, mBERT's)")
    return parser.parse_args()


def random_weights(num_layers: int) -> dict[str, Tensor]:
    """Tensors of mBERT's names and shapes, the classifier left out."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCABULARY, HIDDEN),
        "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "pooler.dense.weight": (HIDDEN, HIDDEN),
        "pooler.dense.bias": (HIDDEN,),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(num_layers):
        prefix = f"encoder.layer.{layer}."
        norms += [prefix + "attention.output.LayerNorm", prefix + "output.LayerNorm"]
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{prefix}attention.{part}.weight"] = (HIDDEN, HIDDEN)
            shapes[f"{prefix}attention.{part}.bias"] = (HIDDEN,)
        shapes[prefix + "intermediate.dense.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[prefix + "intermediate.dense.bias"] = (INTERMEDIATE,)
        shapes[prefix + "output.dense.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[prefix + "output.dense.bias"] = (HIDDEN,)
    shapes |= {f"{norm}.{part}": (HIDDEN,) for norm in norms for part in ("weight", "bias")}
    generator = torch.Generator().manual_seed(0)
    return {f"bert.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def compare(folder: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor], repeats: int) -> None:
    def ours() -> None:
        with staged_folder(folder / "checkpoint-1", meta={"step": 1}) as staging:
            staging.write_tensors("model.safetensors", weights, {"format": "pt"})
            staging.write_tensors("optimizer.safetensors", optimizer)

    def plain() -> None:
        (folder / "plain").mkdir()
        safetensors.torch.save_file(weights, folder / "plain" / "model.safetensors")
        torch.save(optimizer, folder / "plain" / "optimizer.pt")
        for path in (folder / "plain").iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

    seconds: dict[str, list[float]] = {"bertpair": [], "plain": []}
    for turn in range(repeats + 1):  # the first only warms up
        turns = [("bertpair", ours, "checkpoint-1"), ("plain", plain, "plain")]
        for name, save, written in turns if turn % 2 == 0 else turns[::-1]:
            seconds[name].append(timed(save))
            if name == "bertpair" and turn == repeats:
                check(folder, weights)
            shutil.rmtree(folder / written)
            os.sync()
    report({name: values[1:] for name, values in seconds.items()})


def timed(save: Callable[[], None]) -> float:
    started = time.monotonic()
    save()
    return time.monotonic() - started


def check(folder: Path, weights: dict[str, Tensor]) -> None:
    """What was saved verifies and loads; says how long that takes."""
    started = time.monotonic()
    newest = newest_whole(folder)
    verified = time.monotonic()
    assert newest.path is not None
    loaded = load_tensors(newest.path, "model.safetensors", newest.manifest)
    done = time.monotonic()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    print(f"verified whole in {verified - started:.2f} s; weights loaded in {done - verified:.2f} s")


def report(seconds: dict[str, list[float]]) -> None:
    for name, values in seconds.items():
        listed = " ".join(f"{value:.2f}" for value in values)
        print(f"{name:9} {statistics.median(values):6.2f} s median, {min(values):.2f} s best   ({listed})")
    ratio = statistics.median(seconds["bertpair"]) / statistics.median(seconds["plain"])
    best = min(seconds["bertpair"]) / min(seconds["plain"])
    print(json.dumps({"ratio": round(ratio, 3), "ratio_of_best": round(best, 3), "allowed": 1.5}))


def size_of(tensors: dict[str, Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e9


def machine() -> str:
    versions = f"torch {torch.__version__}, safetensors {safetensors.__version__}"
    return f"{date.today()}, {platform.platform()}, {os.cpu_count()} cores, {versions}"


if __name__ == "__main__":
    main()
