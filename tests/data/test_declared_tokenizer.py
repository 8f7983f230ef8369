"""Another tokenizer than BERT's WordPiece is refused; what is taken gives the ids of transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import save_tokenizer, tiny_vocabulary, write_tiny_bert
from transformers import AutoTokenizer, BertTokenizerFast

from bertpair import CheckpointError, Config, PairClassifier, train
from bertpair.data.tokenizer import Tokenizer

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
        {"auto_map": ["tokenization.Own", None]},
        {"auto_map": True},
        {"tokenizer_class": "DistilBertTokenizer"},  # it gives no token types
        {"model_input_names": ["input_ids", "attention_mask"]},
        {"truncation_side": "left"},
        {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]},
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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", {"tokenizer_class": "BertJapaneseTokenizer"}),
        ("config.json", {"auto_map": {"AutoTokenizer": ["tokenization.Own", None]}}),
        ("config.json", {"model_type": "roformer"}),  # no class is named, so the network's is meant
        ("special_tokens_map.json", {"cls_token": "<s>"}),
        ("special_tokens_map.json", {"cls_token": {"content": "<s>", "lstrip": False}}),
    ],
)
def test_other_files_declare_too(folder: Path, name: str, said: dict[str, object]) -> None:
    declare(folder, cls_token="[CLS]")
    with pytest.raises(CheckpointError, match=f"{name}: ({'|'.join(said)})"):
        Tokenizer.from_folder(declare(folder, name, **said))


@pytest.mark.parametrize("with_json", [True, False])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tokenizer_config.json", {"additional_special_tokens": ["<e1>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"marker": "<e1>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "<e1>", "special": False}}}),
        ("special_tokens_map.json", {"additional_special_tokens": [{"content": "<e1>", "lstrip": False}]}),
        ("added_tokens.json", {"<e1>": 900}),
    ],
)
def test_a_token_that_another_file_adds_is_not_ignored(
    folder: Path, hf_folder: Path, with_json: bool, name: str, said: dict[str, object]
) -> None:
    with pytest.raises(CheckpointError, match="1 tokens .* add.*'<e1>'"):
        Tokenizer.from_folder(declare(hf_folder if with_json else folder, name, **said))


def assert_ids_of_transformers(folder: Path, words: list[str]) -> None:
    """Ids and token types of random pairs and single texts, cut and whole."""
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    rng = np.random.default_rng(5)
    texts = [" ".join(rng.choice(words, 6)) for _ in range(100)]
    for column in (texts[::-1], None):
        for max_length in (9, 64):
            tokens = ours.encode(texts, column, max_length)
            for i, text in enumerate(texts):
                texts_of_row = (text,) if column is None else (text, column[i])
                expected = theirs(*texts_of_row, truncation=True, max_length=max_length)
                row = tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist()
                first = int(tokens.first_lengths[i])
                assert row == expected["input_ids"]
                assert [0] * first + [1] * (len(row) - first) == expected["token_type_ids"]


@pytest.mark.parametrize("network", ["Bert", "Electra", "MobileBert"])
@pytest.mark.parametrize("lower_case", [False, True])
def test_what_is_taken_gives_the_ids_of_transformers(folder: Path, network: str, lower_case: bool) -> None:
    declare(folder, tokenizer_class=f"{network}Tokenizer", do_lower_case=lower_case, cls_token="[CLS]")
    assert_ids_of_transformers(folder, WORDS)


NO_TYPES = ["input_ids", "attention_mask"]


@pytest.mark.parametrize("names", [{}, {"model_input_names": NO_TYPES}])
@pytest.mark.parametrize(
    ("network", "declared"),
    [
        ("distilbert", {}),
        ("distilbert", {"tokenizer_class": "DistilBertTokenizer"}),
        ("distilbert", {"tokenizer_class": "DistilBertTokenizerFast"}),
        ("roberta", {"tokenizer_class": "BertTokenizer", "bos_token": "[CLS]", "eos_token": "[SEP]"}),
    ],
)
def test_networks_without_token_types_have_the_ids_of_bert(
    folder: Path, network: str, declared: dict[str, str], names: dict[str, list[str]]
) -> None:
    bert = Tokenizer.from_folder(folder).encode(WORDS, WORDS, 64)
    declare(declare(folder, **declared, **names), "config.json", model_type=network)
    ours = Tokenizer.from_folder(folder)
    tokens = ours.encode(WORDS, WORDS, 64)
    np.testing.assert_array_equal(tokens.ids, bert.ids)
    np.testing.assert_array_equal(tokens.first_lengths, tokens.lengths)  # all of type 0
    save_tokenizer(ours, folder, 64)
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.model_input_names == NO_TYPES
    assert saved(WORDS, WORDS)["input_ids"] == [
        ids.tolist() for ids in np.split(bert.ids, bert.offsets[1:-1])
    ]
    assert Tokenizer.from_folder(folder).files(64) == ours.files(64)


def rewrite(folder: Path, **parts: object) -> Path:
    """tokenizer.json with other parts."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **parts}), encoding="utf-8")
    return folder


DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "BertPreTokenizer"}, {"type": "Digits", "individual_digits": True}],
}
LEFT = {"direction": "Left", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
INPUTS = ["input_ids", "token_type_ids", "attention_mask"]


@pytest.mark.parametrize(
    "parts",
    [{"pre_tokenizer": DIGITS}, {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}],
)
def test_a_pipeline_of_its_own_is_followed_unless_a_bert_class_builds_another(
    hf_folder: Path, parts: dict[str, object]
) -> None:
    rewrite(hf_folder, **parts)
    declare(hf_folder, tokenizer_class="BertTokenizer", do_lower_case=True)
    with pytest.raises(CheckpointError, match="its pipeline is another than that of BertTokenizer"):
        Tokenizer.from_folder(hf_folder)
    declare(hf_folder, tokenizer_class="PreTrainedTokenizerFast", model_input_names=INPUTS)
    assert_ids_of_transformers(hf_folder, WORDS)
    saved = hf_folder / "saved"
    saved.mkdir()
    save_tokenizer(Tokenizer.from_folder(hf_folder), saved, 64)
    assert_ids_of_transformers(saved, WORDS)  # token types too


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("network", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_markers_of_tokenizer_json_are_read_in_texts(hf_folder: Path, special: bool, network: str) -> None:
    document = json.loads((hf_folder / "tokenizer.json").read_text(encoding="utf-8"))
    marker = {"id": max(document["model"]["vocab"].values()) + 1, "content": "<e1>", "special": special}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    rewrite(hf_folder, added_tokens=[*document["added_tokens"], {**marker, **flags}])
    (hf_folder / "vocab.txt").unlink(missing_ok=True)
    declare(hf_folder, tokenizer_class=network, model_input_names=INPUTS)
    assert marker["id"] in Tokenizer.from_folder(hf_folder).encode(["the<e1>cat"], None, 20).ids
    assert_ids_of_transformers(hf_folder, [*WORDS, "<e1>", "x<e1>y"])
    typed = Tokenizer.from_folder(hf_folder).encode(["[SEP]"], None, 20)
    assert typed.ids.tolist().count(document["model"]["vocab"]["[SEP]"]) == 1


def test_a_cut_at_the_left_is_refused(hf_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="cuts texts at the left"):
        Tokenizer.from_folder(rewrite(hf_folder, truncation=LEFT))


def test_another_template_in_tokenizer_json_is_refused(hf_folder: Path) -> None:
    path = hf_folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert PairClassifier.from_pretrained(hf_folder).predict([("the", "cat")])
    pair = document["post_processor"]["pair"]
    document["post_processor"]["pair"] = [*pair[:2], pair[2], pair[2], *pair[3:]]  # a [SEP] [SEP] b
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"post_processor makes \[CLS\] a \[SEP\] \[SEP\] b \[SEP\]"):
        PairClassifier.from_pretrained(hf_folder)
    first_types = json.loads(json.dumps(pair).replace('"type_id": 1', '"type_id": 0'))
    assert first_types != pair
    document["post_processor"]["pair"] = first_types  # the second text as if it were the first
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"types \[0, 0, 0, 0, 0\]"):
        PairClassifier.from_pretrained(hf_folder)
    document["post_processor"]["pair"] = pair
    single = document["post_processor"]["single"]
    document["post_processor"]["single"] = single[1:]
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"post_processor makes a \[SEP\] \(ids"):
        PairClassifier.from_pretrained(hf_folder)
    document["post_processor"]["single"] = single
    document["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [0]  # [CLS] by name, not by id
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match="post_processor makes"):
        PairClassifier.from_pretrained(hf_folder)


def test_transformers_own_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(tiny_vocabulary()) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=False).save_pretrained(
        tmp_path / "saved"
    )
    Tokenizer.from_folder(tmp_path / "saved")
