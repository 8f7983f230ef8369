"""What several test files need: a tiny vocabulary, a tiny Hugging Face BERT folder, TSV files."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared out already
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from bertpair.console import stop_flag
from bertpair.data.tokenizer import Tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789äéñßøżпривет"
WORDS = "the The cat sat mat good bad food service café Straße мир hello".split()
CHINESE = "中文数据库进程线程内存地址索引事务协议网络是不一的个有错对"
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~。,、;:?!“”()…—"

TINY_CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


def tiny_vocabulary() -> list[str]:
    """A cased WordPiece vocabulary that spells every text the tests use."""
    words = [*SPECIAL, *WORDS, *LETTERS, *("##" + c for c in LETTERS), *CHINESE, *PUNCTUATION]
    return list(dict.fromkeys(words))


@pytest.fixture
def vocab_file(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(tiny_vocabulary()) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tiny_config_folder(tmp_path: Path) -> Path:
    """Only config.json and vocab.txt: what `from_scratch` trains from."""
    return write_tiny_bert(tmp_path / "tiny-bert")


def write_tiny_bert(folder: Path, **changes: object) -> Path:
    """A folder with config.json (with `changes`) and vocab.txt."""
    folder.mkdir()
    vocabulary = tiny_vocabulary()
    config = {**TINY_CONFIG, "vocab_size": len(vocabulary), **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A tiny random BertForSequenceClassification with three named labels, as transformers saves it."""
    return write_hf_folder(tmp_path / "hf-tiny")


def write_hf_folder(folder: Path) -> Path:
    """Write it to `folder`, which is made."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    vocabulary = tiny_vocabulary()
    labels = ["negative", "neutral", "positive"]
    config = BertConfig(
        **{**TINY_CONFIG, "vocab_size": len(vocabulary)},
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(7)
    model = BertForSequenceClassification(config)
    for parameter in model.parameters():  # biases and LayerNorms too: zeros and ones would hide mix-ups
        torch.nn.init.normal_(parameter, std=0.2)
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    vocab = folder.parent / "hf-vocab.txt"
    vocab.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(vocab), do_lower_case=False, strip_accents=False)
    assert len(tokenizer) == len(vocabulary)
    tokenizer.save_pretrained(folder)
    return folder


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Its files, as a run writes them into a model folder."""
    for name, content in tokenizer.files(max_length).items():
        (folder / name).write_bytes(content)


def write_repeats(
    path: Path, count: int, rng: np.random.Generator, shares: Sequence[float] | None = None
) -> None:
    """Rows of a task that a tiny model learns: how much of the first text does the second one repeat?"""
    words = ["cat", "sat", "mat", "good", "bad", "food", "中文", "数据库"]
    rows = ["index\tsentence1\tsentence2\tlabel"]
    for i in range(count):
        a, b, c = rng.choice(words, 3, replace=False)
        label = rng.choice(["right", "wrong", "partly"], p=shares)
        answer = {"right": f"{a} {b}", "wrong": c, "partly": a}[label]
        rows.append(f"{i}\t{a} {b}{' the' * int(rng.integers(0, 6))}\t{answer}\t{label}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture
def write_tsv(tmp_path: Path) -> Callable[..., Path]:
    """write_tsv(name, rows, header=…) -> path of a tab-separated file."""

    def write(name: str, rows: Sequence[Sequence[object]], header: Sequence[str] | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [*([header] if header else []), *rows]
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing outside temporary folders is read or written; the stop flag is clear; threads come back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    stop_flag.clear()
    torch.set_num_threads(threads)
