"""examples/minimal_train.py trains as train.py does, bit for bit, and its folder is used in the same way."""

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from live_server import make_predictor
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertTokenizerFast

from bertpair import Config, PairClassifier, evaluate, train

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "minimal_train.py"


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_train", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
def test_it_ends_with_the_weights_of_train(tmp_path: Path) -> None:
    for name, rows in (("train", 170), ("dev", 60)):  # 6 steps an epoch, the last of them of 10 rows
        lines = (ROOT / "data" / f"{name}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"{name}.tsv").write_text("".join(lines[: rows + 1]), encoding="utf-8")
    torch.set_num_threads(1)
    example = load_example()
    settings = example.Settings(
        train_file=str(tmp_path / "train.tsv"),
        dev_file=str(tmp_path / "dev.tsv"),
        model_name_or_path=str(ROOT / "data" / "tiny-bert"),
        output_dir=str(tmp_path / "minimal"),
        num_train_epochs=5,
        max_seq_length=29,  # cuts some rows, and is no multiple of 8
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=2.0,
    )
    accuracy = example.main(settings)
    same = Config(
        **{**dataclasses.asdict(settings), "output_dir": str(tmp_path / "library")},
        **{"from_scratch": True, "device": "cpu", "amp": "off", "num_threads": 1},
        **{"logging_steps": 1, "save_steps": 0, "load_best_model_at_end": True},
    )
    result = train(same)
    assert result.global_step == 30 and result.metrics["acc"] == accuracy > 0.3
    records = [json.loads(line) for line in (tmp_path / "library/metrics.jsonl").read_text().splitlines()]
    norms = [record["grad_norm"] for record in records if "grad_norm" in record]
    assert min(norms) < settings.max_grad_norm < max(norms)  # clipped in some steps
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("minimal", "library"))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    tables = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("minimal", "library")]
    assert tables[0] == tables[1]

    measured = evaluate(tmp_path / "minimal")  # on the dev file, as the folder says
    assert measured.metrics["acc"] == accuracy
    predictor, _ = make_predictor(tmp_path / "minimal")
    assert predictor.labels == ("negative", "neutral", "positive")
    texts = ("数据库", "一种 database")
    network = BertForSequenceClassification.from_pretrained(tmp_path / "minimal").eval()
    rows = BertTokenizerFast.from_pretrained(tmp_path / "minimal")(*texts, return_tensors="pt")
    with torch.no_grad():
        logits = network(**rows).logits.numpy()
    ours = PairClassifier.from_pretrained(tmp_path / "minimal").logits([texts])
    np.testing.assert_allclose(ours, logits, atol=2e-6)


def test_it_is_short_and_writes_the_loop_itself() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    imported = [
        f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    ours = [name.removeprefix("bertpair.") for name in imported if name.startswith("bertpair")]
    assert {name.split(".")[0] for name in ours} == {"data", "model", "training"}
    assert [name for name in ours if name.startswith("training")] == ["training.optim.AdamW"]
