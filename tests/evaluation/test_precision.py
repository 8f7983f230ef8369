"""The precision a run has: by a rule, said in one line, stored with the model; the service's is float32."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_hf_folder, write_tiny_bert
from live_server import make_config

from bertpair import PairClassifier
from bertpair.runtime import BF16_HIDDEN_SIZE, cpu_bf16_flag
from bertpair.serving.predictor import load_predictor

ROOT = Path(__file__).parents[2]
ROWS = [("the cat", "sat", "good"), ("the mat", "food", "bad"), ("мир", "hello", "good")]


@pytest.mark.slow
@pytest.mark.parametrize("hidden_size", [32, BF16_HIDDEN_SIZE])
def test_auto_says_what_it_chose_and_stores_it(tmp_path: Path, hidden_size: int) -> None:
    lines = ["index\tsentence1\tsentence2\tlabel", *(f"{i}\t" + "\t".join(row) for i, row in enumerate(ROWS))]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_tiny_bert(tmp_path / "bert", hidden_size=hidden_size, num_hidden_layers=1)
    flags = (
        "--train_file train.tsv --model_name_or_path bert --from_scratch --max_seq_length 16 --max_steps 1"
    )
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *flags.split(),
        "--device",
        "cpu",
        "--output_dir",
        "out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("device: ")]
    flag = cpu_bf16_flag()
    chosen = "bf16" if flag and hidden_size >= BF16_HIDDEN_SIZE else "off"
    assert f"(amp {chosen}: " in line and (flag is None or f"hidden_size {hidden_size}" in line)
    stored = yaml.safe_load((tmp_path / "out" / "training_args.yaml").read_text(encoding="utf-8"))
    assert str({False: "off"}.get(stored["amp"], stored["amp"])) == chosen


def test_the_service_answers_in_float32_unless_it_is_told(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "model")
    found = load_predictor(make_config({"model_dir": str(folder), "num_threads": 1}))
    assert found.precision == "float32" and found.classifier.scorer.precision.reason == "as set"
    told = load_predictor(make_config({"model_dir": str(folder), "num_threads": 1, "amp": "bf16"}))
    assert told.precision == "bf16"


def test_weights_are_converted_once_and_answers_stay_the_same(tmp_path: Path) -> None:
    """As autocast would convert them anew for every batch; norms and embeddings stay in float32."""
    folder = write_hf_folder(tmp_path / "model")
    half = PairClassifier.from_pretrained(folder, amp="bf16", device="cpu", optimize=False)
    exact = PairClassifier.from_pretrained(folder, amp="off", device="cpu", optimize=False)
    pairs = [(a, b) for a, b, _ in ROWS]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = exact.logits(pairs)
    np.testing.assert_array_equal(half.logits(pairs), expected)
    kinds = {name.split(".")[-2]: p.dtype for name, p in half.scorer.model.named_parameters()}
    assert kinds["query"] == kinds["up"] == kinds["classifier"] == torch.bfloat16
    assert kinds["norm"] == kinds["words"] == torch.float32
