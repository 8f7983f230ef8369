"""Another tokenizer than BERT's WordPiece is refused; what is taken gives the ids of transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_vocabulary, write_tiny_bert
from transformers import AutoTokenizer, BertTokenizerFast

from bertpair import CheckpointError, Config, PairClassifier, train
from bertpair.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("fresh_process")

WORDS = "the The café Straße мир hello 中文数据 good-bad x.y (z) 1,2 ÄÉ".split()


def declare(folder: Path, name: str = "tokenizer_config.json", **settings: object) -> Path:
    path = folder / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **settings}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_bert(tmp_path / "tiny")


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"},
        {"tokenizer_class": "KoBertTokenizer"},
        {"tokenizer_class": "BertweetTokenizer"},
        {"tokenizer_class": "RoFormerTokenizer"},
        {"tokenizer_class": "SomethingElse"},
        {"tokenizer_class": "PreTrainedTokenizerFast"},  # without a tokenizer.json it says nothing
        {"word_tokenizer_type": "mecab"},
        {"subword_tokenizer_type": "character"},
        {"do_basic_tokenize": False},
        {"never_split": ["the"]},
        {"cls_token": "<s>", "sep_token": "</s>"},
        {"sep_token": {"content": "</s>", "lstrip": False}},
        {"auto_map": {"AutoTokenizer": ["tokenization.Own", None]}},
    ],
)
def test_another_pipeline_is_refused_before_training(folder: Path, settings: dict[str, object]) -> None:
    declare(folder, **settings)
    Path("train.tsv").write_text("i\ta\tb\tl\n0\tcat\tsat\tx\n1\tmat\tgood\ty\n")
    config = Config(
        model_name_or_path=str(folder),
        from_scratch=True,
        train_file=["train.tsv"],
        output_dir="out",
        max_seq_length=24,
        amp="off",
    )
    with pytest.raises(CheckpointError, match="supported|never run") as caught:
        train(config)
    assert str(folder) in str(caught.value) and not Path("out").exists()


@pytest.mark.parametrize("name", ["config.json", "special_tokens_map.json"])
def test_other_files_declare_too(folder: Path, name: str) -> None:
    said = {"tokenizer_class": "BertJapaneseTokenizer"} if name == "config.json" else {"cls_token": "<s>"}
    with pytest.raises(CheckpointError, match="tokenizer_class|cls_token"):
        Tokenizer.from_folder(declare(folder, name, **said))


@pytest.mark.parametrize("network", ["Bert", "DistilBert", "Electra", "MobileBert"])
@pytest.mark.parametrize("lower_case", [False, True])
def test_what_is_taken_gives_the_ids_of_transformers(folder: Path, network: str, lower_case: bool) -> None:
    declare(folder, tokenizer_class=f"{network}Tokenizer", do_lower_case=lower_case, cls_token="[CLS]")
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    rng = np.random.default_rng(5)
    texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(200)]
    tokens = ours.encode(texts, texts[::-1], 64)
    for i, (a, b) in enumerate(zip(texts, texts[::-1], strict=True)):
        row = tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]]
        assert row.tolist() == theirs(a, b, truncation=True, max_length=64)["input_ids"]


def test_another_template_in_tokenizer_json_is_refused(hf_folder: Path) -> None:
    path = hf_folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert PairClassifier.from_pretrained(hf_folder).predict([("the", "cat")])
    pair = document["post_processor"]["pair"]
    document["post_processor"]["pair"] = [*pair[:2], pair[2], pair[2], *pair[3:]]  # a [SEP] [SEP] b
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"post_processor makes \[CLS\] a \[SEP\] \[SEP\] b \[SEP\]"):
        PairClassifier.from_pretrained(hf_folder)


def test_transformers_own_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(tiny_vocabulary()) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=False).save_pretrained(
        tmp_path / "saved"
    )
    Tokenizer.from_folder(tmp_path / "saved")
