"""config.json: what transformers writes is understood, what makes no sense is refused by file and field."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_CONFIG
from transformers import AutoConfig
from transformers import BertConfig as HuggingFaceConfig

from bertpair.errors import CheckpointError, ConfigError
from bertpair.model.bert import BertConfig
from bertpair.model.config import ModelFolder, check_model_type, config_json, label_order, read_folder
from bertpair.model.families import FAMILIES
from bertpair.model.modernbert import ModernBertConfig

FULL = {**TINY_CONFIG, "vocab_size": 100}


def read(tmp_path: Path, raw: dict[str, Any]) -> ModelFolder:
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return read_folder(tmp_path)


def changed(**changes: Any) -> dict[str, Any]:
    return {**FULL, **changes}


def test_fields_are_read(tmp_path: Path) -> None:
    config = read(tmp_path, changed(classifier_dropout=0, hidden_act="gelu_new", pad_token_id=7)).config
    for name in set(FULL) - {"architectures", "model_type", "hidden_act", "pad_token_id"}:
        assert getattr(config, name) == FULL[name], name
    assert (config.classifier_dropout, config.hidden_act, config.pad_token_id) == (0, "gelu_new", 7)


def test_absent_fields_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    ours = read(tmp_path, {"model_type": "bert"})
    theirs = HuggingFaceConfig()
    assert ours.config == BertConfig()
    for name, value in ours.config.model_dump().items():
        assert value == getattr(theirs, name), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_fields_of_every_family_have_the_defaults_of_transformers(
    tmp_path: Path, model_type: str
) -> None:
    ours, theirs = read(tmp_path, {"model_type": model_type}).config, AutoConfig.for_model(model_type)
    written = ours.model_dump(by_alias=True)
    if model_type == "modernbert":  # which transformers has made of others already
        assert written.pop("layer_types") is None and ours.kinds == theirs.layer_types
        assert written.pop("rope_parameters") is None
        for kind, rope in theirs.rope_parameters.items():
            assert ours.theta(kind) == rope["rope_theta"]
        for name in ("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers", "rope_scaling"):
            del written[name]
    for name, value in written.items():
        assert value == getattr(theirs, name), name


OLD = {"model_type": "modernbert", "global_rope_theta": 5e4, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("changes", "thetas", "local"),
    [
        ({}, (5e4, 1e4), [1, 2]),
        ({"local_rope_theta": 7}, (5e4, 7), [1, 2]),
        ({"local_rope_theta": None}, (5e4, 5e4), [1, 2]),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 3}}}, (5e4, 3), [1, 2]),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 3}}},
            (3, 1e4),
            [1, 2],
        ),
        ({"global_attn_every_n_layers": 1}, (5e4, 1e4), []),
        ({"global_attn_every_n_layers": 2}, (5e4, 1e4), [1, 3]),
        ({"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2}, (5e4, 1e4), [0, 1]),
        ({"position_embedding_type": "sans_pos"}, (5e4, 1e4), [1, 2]),
    ],
)
def test_old_and_new_words_of_a_modernbert_are_understood(
    tmp_path: Path, changes: dict[str, Any], thetas: tuple[float, float], local: list[int]
) -> None:
    config = read(tmp_path, OLD | changes).config
    assert isinstance(config, ModernBertConfig)
    assert (config.theta("full_attention"), config.theta("sliding_attention")) == thetas
    assert [i for i, kind in enumerate(config.kinds) if kind == "sliding_attention"] == local


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types: expected one for each of 4 layers, found 1"),
        ({"layer_types": ["chunked"] * 4}, "layer_types: expected a kind of attention for each layer"),
        (
            {"hidden_size": 30, "num_attention_heads": 6},
            "num_attention_heads: expected heads of an even size",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: expected "),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_parameters: expected rope_theta",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 0}}}, "rope_parameters: expected rope_theta"),
        ({"rope_parameters": {"full_attention": {"factor": 2}}}, "rope_parameters: expected rope_theta"),
        ({"classifier_pooling": "max"}, None),
        ({"classifier_pooling": "sum"}, "classifier_pooling: expected one of cls, mean, max, found 'sum'"),
    ],
)
def test_what_no_modernbert_has_is_named(tmp_path: Path, changes: dict[str, Any], fault: str | None) -> None:
    if fault is None:
        assert read(tmp_path, OLD | changes).config.pooling == "max"
        return
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, OLD | changes)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {fault}")


def test_without_model_type_the_fields_of_bert_make_a_bert(tmp_path: Path) -> None:
    old = {name: value for name, value in FULL.items() if name not in ("model_type", "architectures")}
    assert read(tmp_path, old).config.hidden_size == 32
    assert read(tmp_path, {**old, "architectures": ["BertForMaskedLM"]}).config.hidden_size == 32
    del old["num_attention_heads"]
    assert read(tmp_path, {**old, "hidden_size": 768}).config.num_attention_heads == 12


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"n_embd": 768, "n_layer": 12},
        {**FULL, "model_type": None, "architectures": ["RobertaForMaskedLM"]},
        {**FULL, "model_type": None, "architectures": "Bert"},
        {**FULL, "model_type": None, "architectures": 3},
    ],
)
def test_what_says_neither_bert_nor_its_fields_is_none(tmp_path: Path, raw: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="BERT"):
        read(tmp_path, raw)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "xlnet"}, "'xlnet'; "),
        ({"model_type": "BERT"}, "'BERT'; "),
        ({"model_type": ""}, "''; "),
        ({"model_type": 3}, "3; "),
        ({"model_type": ["bert"]}, "a list; "),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "'gpt2', a decoder; "),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "'llama', a decoder; "),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5', an encoder-decoder; "),
    ],
)
def test_an_unknown_model_type_is_named_with_those_that_are_known(
    tmp_path: Path, changes: dict[str, Any], found: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, changed(**changes))
    place = f"{tmp_path / 'config.json'}: model_type: found {found}"
    assert str(caught.value) == f"{place}supported are {', '.join(FAMILIES)}, all encoders"


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantised_weights_are_refused(tmp_path: Path, method: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, changed(quantization_config={"quant_method": method, "bits": 4}))
    said = f"found weights quantised by '{method}'; only the original ones are supported"
    assert str(caught.value) == f"{tmp_path / 'config.json'}: quantization_config: {said}"
    assert read(tmp_path, changed(quantization_config=None)).config.hidden_size == 32


def test_adapters_alone_are_refused_with_the_way_to_merge_them(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "xlm-roberta-base"}')
    with pytest.raises(
        CheckpointError, match="LoRA adapters alone, of the base model 'xlm-roberta-base': .*merge"
    ):
        read_folder(tmp_path)


def test_the_inner_folder_of_a_sentence_transformer_is_named(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    for name in ("1_Pooling", "0_Transformer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"name its sub-folder {tmp_path / '0_Transformer'}$"):
        read_folder(tmp_path)


def test_the_fields_of_another_family_are_named_as_its_file_names_them(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(
            tmp_path, {"model_type": "distilbert", "dim": 30, "n_heads": 4, "n_layers": 0, "hidden_size": "?"}
        )
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'config.json'}: n_layers: expected a whole number from 1 to 1000, found 0",
        f"{tmp_path / 'config.json'}: dim: expected a multiple of n_heads (4), found 30",
    ]


@pytest.mark.parametrize("given", ["bert", "BERT", "Bert", None])
def test_a_model_type_that_is_given_is_the_folders_in_any_case(tmp_path: Path, given: str | None) -> None:
    check_model_type(read(tmp_path, FULL), given)


@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("xlm-roberta", "xlmroberta"),
        ("xlm-roberta", "XLM_RoBERTa"),
        ("roberta", "roBERTa"),
        ("distilbert", "distilBERT"),
    ],
)
def test_the_spellings_of_2020_are_understood(tmp_path: Path, model_type: str, given: str) -> None:
    folder = read(tmp_path, {"model_type": model_type})
    check_model_type(folder, given)
    with pytest.raises(ConfigError, match=f"model_type: found BERT; {tmp_path} is a {model_type} model"):
        check_model_type(folder, "BERT")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, value)
            for name in ("vocab_size", "hidden_size")
            for value in (0, -1, True, 2.5, "32", None)
        ],
        *[("num_hidden_layers", value) for value in (0, -3, False, [12], 10**9)],
        *[("num_attention_heads", value) for value in (0, -4, 10**30, {})],
        *[("intermediate_size", value) for value in (0, "64", 64.0)],
        *[("max_position_embeddings", value) for value in (0, True)],
        *[("type_vocab_size", value) for value in (0, None)],
        ("hidden_size", 30),
        ("num_attention_heads", 5),
        *[("pad_token_id", value) for value in (-1, 100, 0.0, True, "0")],
        *[
            ("hidden_dropout_prob", value)
            for value in (-0.1, 1, 1.5, None, "0.1", True, float("nan"), 10**400)
        ],
        *[("attention_probs_dropout_prob", value) for value in (2, None)],
        *[("classifier_dropout", value) for value in (-1, "none", False)],
        *[("initializer_range", value) for value in (0, -0.02, float("inf"), "0.02")],
        *[("layer_norm_eps", value) for value in (0, -1e-12, 5, None)],
        *[("hidden_act", value) for value in ("swish", None, 3, ["gelu"])],
        *[("position_embedding_type", value) for value in ("relative_key", "relative_key_query", 1)],
        *[("is_decoder", value) for value in (True, 1, "false")],
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        *[("bertpair", value) for value in (1, {}, {"takes_pairs": 5}, {"takes_pairs": True, "header": []})],
        ("bertpair", {"takes_pairs": True, "pooling": "sum"}),
        *[("num_labels", value) for value in (0, -2, True, "3", 3.0)],
        *[("problem_type", value) for value in ("multi_label_classification", "Regression", 1)],
        *[("id2label", value) for value in ({}, [], "a", {"1": "a"}, {"0": "a", "2": "b"}, {"00": "a"})],
        *[("id2label", value) for value in ({"0": "a", "1": "a"}, {"0": ""}, {"0": 5}, {"0": "\ud800"})],
        *[("label2id", value) for value in ({}, ["a"], {"a": 0, "b": 2}, {"a": 0, "b": 0}, {"a": "0"})],
        *[("label2id", value) for value in ({"a": True, "b": 0}, {"": 0}, {"a": -1, "b": 0})],
    ],
)
def test_absurd_values_are_named(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, changed(**{field: value}))
    named = "hidden_size" if (field, value) == ("num_attention_heads", 5) else field
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {named}: ")
    assert "\n" not in str(caught.value)


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, changed(hidden_size=-1, hidden_act="tanh", is_decoder=True, num_labels=0))
    lines = str(caught.value).splitlines()
    fields = [line.removeprefix(f"{tmp_path / 'config.json'}: ").split(":")[0] for line in lines]
    assert fields == ["hidden_size", "hidden_act", "is_decoder", "num_labels"], "in the file's order"


def test_a_missing_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        read_folder(tmp_path)


def test_what_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("hidden_size: 32")
    with pytest.raises(CheckpointError, match="config.json: not usable JSON"):
        read_folder(tmp_path)


def test_another_config_can_be_named(tmp_path: Path) -> None:
    weights, other = tmp_path / "weights", tmp_path / "other"
    weights.mkdir()
    other.mkdir()
    (other / "config.json").write_text(json.dumps(FULL))
    for config_name in (other, other / "config.json"):
        folder = read_folder(weights, config_name=config_name)
        assert (folder.path, folder.config.hidden_size) == (weights, 32)
    with pytest.raises(CheckpointError, match="nowhere: no such file"):
        read_folder(weights, config_name=tmp_path / "nowhere")


NAMED = {"0": "wrong", "1": "partly", "2": "right"}
REVERSED = {"right": 2, "wrong": 0, "partly": 1}
GENERIC = {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
GENERIC_REVERSED = {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


@pytest.mark.parametrize(
    ("tables", "labels", "num_labels"),
    [
        ({}, None, 2),
        ({"num_labels": 4}, None, 4),
        ({"id2label": NAMED, "label2id": REVERSED}, ("wrong", "partly", "right"), 3),
        ({"id2label": NAMED}, ("wrong", "partly", "right"), 3),
        ({"id2label": NAMED, "label2id": None}, ("wrong", "partly", "right"), 3),
        ({"label2id": REVERSED}, ("wrong", "partly", "right"), 3),
        ({"id2label": {"2": "c", "0": "b", "1": "a"}}, ("b", "a", "c"), 3),
        ({"id2label": {str(i): f"name {i}" for i in range(12)}}, tuple(f"name {i}" for i in range(12)), 12),
        ({"id2label": GENERIC, "label2id": GENERIC_REVERSED}, None, 3),
        ({"id2label": GENERIC}, None, 3),
        ({"label2id": GENERIC_REVERSED}, None, 3),
        ({"id2label": NAMED, "label2id": GENERIC_REVERSED}, ("wrong", "partly", "right"), 3),
        ({"id2label": GENERIC, "label2id": REVERSED}, ("wrong", "partly", "right"), 3),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "num_labels": 5}, None, 5),
        ({"id2label": {"0": "LABEL_1", "1": "LABEL_0"}}, ("LABEL_1", "LABEL_0"), 2),
        ({"id2label": NAMED, "num_labels": 3}, ("wrong", "partly", "right"), 3),
        ({"id2label": NAMED, "problem_type": "single_label_classification"}, ("wrong", "partly", "right"), 3),
    ],
)
def test_labels_are_read_in_the_order_of_their_ids(
    tmp_path: Path, tables: dict[str, Any], labels: tuple[str, ...] | None, num_labels: int
) -> None:
    folder = read(tmp_path, changed(**tables))
    assert (folder.labels, folder.config.num_labels, folder.regression) == (labels, num_labels, False)


@pytest.mark.parametrize(
    "tables",
    [
        {"num_labels": 1},
        {"problem_type": "regression"},
        {"problem_type": "regression", "num_labels": 1},
        {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
        {"id2label": {"0": "score"}},
    ],
)
def test_one_output_is_a_regression(tmp_path: Path, tables: dict[str, Any]) -> None:
    folder = read(tmp_path, changed(**tables))
    assert (folder.labels, folder.config.num_labels, folder.regression) == (None, 1, True)


@pytest.mark.parametrize(
    ("tables", "complaint"),
    [
        (
            {"id2label": NAMED, "label2id": {"wrong": 1, "partly": 0, "right": 2}},
            "label2id: contradicts id2label",
        ),
        ({"id2label": NAMED, "label2id": {"wrong": 0, "partly": 1}}, "label2id: contradicts id2label"),
        ({"id2label": NAMED, "num_labels": 4}, "num_labels: found 4, but 3 labels are named"),
        ({"id2label": NAMED, "problem_type": "regression"}, "problem_type: found regression with 3 labels"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "problem_type: .* with 1 labels"),
    ],
)
def test_contradictions_among_labels_are_refused(
    tmp_path: Path, tables: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read(tmp_path, changed(**tables))


def test_the_data_keep_the_order_of_a_model_with_the_same_labels(tmp_path: Path) -> None:
    folder = read(tmp_path, changed(id2label=NAMED))
    for new_head in (False, True):
        assert label_order(folder, ["partly", "right", "wrong"], new_head=new_head) == tuple(NAMED.values())


def test_the_data_give_labels_to_a_model_without_names(tmp_path: Path) -> None:
    folder = read(tmp_path, changed(id2label=GENERIC))
    assert label_order(folder, ["b", "a", "c"], new_head=False) == ("b", "a", "c")


@pytest.mark.parametrize(
    "labels", [["partly", "right"], ["wrong", "partly", "right", "unknown"], ["a", "b", "c"]]
)
def test_another_set_of_labels_needs_a_new_head(tmp_path: Path, labels: list[str]) -> None:
    folder = read(tmp_path, changed(id2label=NAMED))
    with pytest.raises(CheckpointError, match="new_head: true") as caught:
        label_order(folder, labels, new_head=False)
    assert "'wrong', 'partly', 'right'" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert label_order(folder, labels, new_head=True) == tuple(labels)


def test_an_order_that_is_given_goes_over_the_folders_with_a_new_head_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = list(NAMED.values())
    folder = read(tmp_path, changed(id2label=NAMED))
    other = own[::-1]
    assert label_order(folder, other, new_head=True, given=True) == tuple(other)
    assert label_order(folder, other, new_head=True) == tuple(own)
    assert label_order(folder, other, new_head=False, given=True) == tuple(own)
    assert "keeps the order" in caplog.text


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_attention_heads=4, pad_token_id=None, num_labels=3
    )
    kinds = (
        (("错", "b", "right"), 3, True, ("句一", "b", "")),
        (("错", "b", "right"), 3, False, None),
        (None, 1, True, None),
    )
    for labels, count, takes_pairs, header in kinds:
        written = BertConfig(**{**vars(config), "num_labels": count})
        (tmp_path / "config.json").write_bytes(
            config_json(written, labels, takes_pairs=takes_pairs, header=header)
        )
        folder = read_folder(tmp_path)
        assert (folder.config, folder.labels, folder.regression) == (written, labels, labels is None)
        assert (folder.takes_pairs, folder.header) == (takes_pairs, header)
        theirs = HuggingFaceConfig.from_pretrained(tmp_path)
        assert theirs.num_labels == count
        assert theirs.problem_type == ("regression" if labels is None else "single_label_classification")
        assert labels is None or tuple(theirs.id2label[i] for i in range(3)) == labels
        for name, value in written.model_dump().items():
            assert value == getattr(theirs, name), name


def test_other_keys_of_the_original_stay_and_untrue_ones_go(tmp_path: Path) -> None:
    raw = changed(
        directionality="bidi",
        odd="\ud800",
        torch_dtype="float16",
        dtype="float16",
        num_labels=2,
        _name_or_path="/home/somebody",
        architectures=["BertModel"],
        problem_type="regression",
        id2label={"0": "old"},
        label2id={"old": 0},
        transformers_version="4.8.2",
        auto_map={"AutoModel": "evil.py"},
    )
    document = json.loads(config_json(BertConfig(), ["词", "b"], raw, takes_pairs=True, header=None))
    assert (document["directionality"], document["odd"]) == ("bidi", "\ud800")
    assert document["dtype"] == "float32"
    assert document["architectures"] == ["BertForSequenceClassification"]
    assert document["id2label"] == {"0": "词", "1": "b"}
    assert document["label2id"] == {"词": 0, "b": 1}
    assert document["problem_type"] == "single_label_classification"
    gone = {"torch_dtype", "num_labels", "_name_or_path", "transformers_version", "auto_map"}
    assert not gone & set(document)
